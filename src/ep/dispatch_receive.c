/* SPDX-License-Identifier: MIT */
/* Dispatch: what arrived, as the caller gets it. */
#include "ep/dispatch.h"

#include "base/error.h"
#include "ep/args.h"
#include "ep/backend.h"
#include "ep/event.h"

#include <stdlib.h>
#include <string.h>

/* Owner of a result's memory: a block of the window or of the caller's allocator. */
typedef struct epi_owner {
    ep_buffer *buffer;
    bool running, released; /* the call goes on; the result was released meanwhile. pool_lock */
    bool in_window;
    size_t region;
    ep_allocator allocator;
    void *memory;    /* of the allocator */
    int32_t small[]; /* source_offset, expert_offset, tokens_per_expert */
} owner;

static void free_owner(owner *own)
{
    if (own->in_window)
        epi_buffer_give(own->buffer, own->region);
    else if (own->memory)
        own->allocator.free(own->allocator.context, own->memory);
    atomic_fetch_sub(&own->buffer->num_objects, 1);
    free(own);
}

/* Whether the call still writes there, whose end then frees it. */
static bool still_runs(owner *own)
{
    pthread_mutex_lock(&own->buffer->pool_lock);
    bool running = own->running;
    own->released = true;
    pthread_mutex_unlock(&own->buffer->pool_lock);
    return running;
}

void ep_recv_release(ep_recv *recv)
{
    if (!recv)
        return;
    owner *own = recv->owner;
    if (own && recv->x.device != EP_DEVICE_CPU) {
        const epi_backend_ops *backend;
        if (epi_backend_find(recv->x.device, &backend) == EP_OK)
            backend->recv_release(own);
    } else if (own && !still_runs(own)) {
        free_owner(own);
    }
    ep_recv empty = EP_RECV_INIT;
    empty.handle = recv->handle;
    empty.size = recv->size;
    memcpy(recv, &empty, recv->size < sizeof empty ? recv->size : sizeof empty);
}

static uint8_t *region_base(const epi_dispatch *d)
{
    return d->op.buffer->window->base + d->region;
}

/* Rows that no sender writes: padding of groups, and those past N in the worst case. */
static void fill_row(const epi_dispatch *d, int64_t row, bool zero)
{
    const epi_region *region = &d->regions[d->op.buffer->rank];
    uint8_t *base = region_base(d);
    size_t at = (size_t)row;
    if (zero) {
        memset(base + region->x + at * d->shape.row, 0, d->shape.row);
        memset(base + region->scales + at * d->shape.scales, 0, d->shape.scales);
    }
    memset(base + region->ids + at * d->shape.ids, 0xff, d->shape.ids);
    memset(base + region->weights + at * d->shape.weights, 0, d->shape.weights);
    ((int32_t *)(base + region->source))[row] = -1;
}

static void fill_unused(const epi_dispatch *d)
{
    const ep_handle *handle = d->handle;
    int64_t used = handle->num_rows;
    if (handle->layout == EP_ROWS_BY_EXPERT) {
        for (int l = 0; l < handle->num_local; l++)
            for (int64_t row = handle->expert_offset[l] + handle->expert_filled[l];
                 row < handle->expert_offset[l] + handle->expert_rows[l]; row++)
                fill_row(d, row, true);
        used = 0;
        for (int l = 0; l < handle->num_local; l++)
            used += handle->expert_rows[l];
    }
    for (int64_t row = used; row < handle->rows; row++)
        fill_row(d, row, false);
}

/* ------------------------------------------------------------- verify */

static int source_of(const ep_handle *handle, int64_t row)
{
    int source = 0;
    while (row >= handle->source_offset[source + 1])
        source++;
    return source;
}

static ep_status verify_row(const epi_dispatch *d, int64_t row)
{
    const epi_region *region = &d->regions[d->op.buffer->rank];
    const uint8_t *base = region_base(d);
    int32_t token = ((const int32_t *)(base + region->source))[row];
    uint64_t want = ((const uint64_t *)(base + region->sums))[row];
    uint64_t have =
        epi_row_sum(base + region->x + (size_t)row * d->shape.row, d->shape.row,
                    base + region->scales + (size_t)row * d->shape.scales, d->shape.scales, token);
    if (have != want)
        return epi_fail(EP_ERR_CORRUPT,
                        "%s (call %llu): row %lld, token %d of its source, does not match its "
                        "checksum",
                        d->op.name, (unsigned long long)d->op.epoch, (long long)row, (int)token);
    return EP_OK;
}

/* By token: within a source, tokens ascend strictly, so none is missing or there twice. */
static ep_status verify_order(const epi_dispatch *d, int64_t row)
{
    const epi_region *region = &d->regions[d->op.buffer->rank];
    const int32_t *token = (const int32_t *)(region_base(d) + region->source);
    int source = source_of(d->handle, row);
    bool first = row == d->handle->source_offset[source];
    int64_t tokens = epi_call_mail(&d->op, source)->mail.num_tokens;
    if (token[row] < 0 || token[row] >= tokens || (!first && token[row] <= token[row - 1]))
        return epi_fail(EP_ERR_CORRUPT,
                        "%s (call %llu): row %lld from rank %d holds token %d after token %d; "
                        "tokens of a source must ascend below %lld",
                        d->op.name, (unsigned long long)d->op.epoch, (long long)row, source,
                        (int)token[row], first ? -1 : (int)token[row - 1], (long long)tokens);
    return EP_OK;
}

static ep_status verify_rows(const epi_dispatch *d)
{
    const ep_handle *handle = d->handle;
    if (handle->layout == EP_ROWS_BY_TOKEN) {
        for (int64_t row = 0; row < handle->num_rows; row++) {
            EPI_TRY(verify_row(d, row));
            EPI_TRY(verify_order(d, row));
        }
        return EP_OK;
    }
    for (int l = 0; l < handle->num_local; l++)
        for (int32_t i = 0; i < handle->expert_filled[l]; i++)
            EPI_TRY(verify_row(d, handle->expert_offset[l] + i));
    return EP_OK;
}

/* ------------------------------------------------------------- result */

static ep_tensor rows_tensor(uint8_t *base, size_t offset, ep_dtype dtype, int64_t rows,
                             int64_t columns)
{
    return ep_tensor_2d(base + offset, dtype, rows, columns);
}

ep_status epi_dispatch_reserve(epi_dispatch *d)
{
    ep_handle *handle = d->handle;
    size_t small = (size_t)(handle->num_ranks + 2 * handle->num_local + 3);
    size_t bytes = d->regions[d->op.buffer->rank].bytes;
    owner *own = d->owner = calloc(1, sizeof *own + small * sizeof(int32_t));
    if (!d->cached)
        handle->source_token = malloc(((size_t)handle->rows + 1) * sizeof(int32_t));
    if (!own || !handle->source_token)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", d->op.name);
    own->buffer = d->op.buffer;
    if (!d->has_allocator)
        return EP_OK;
    own->allocator = d->allocator;
    own->memory = d->allocator.alloc(d->allocator.context, bytes ? bytes : 1);
    if (!own->memory)
        return epi_fail(EP_ERR_MEMORY, "%s: allocator->alloc returned NULL for %zu bytes",
                        d->op.name, bytes);
    return EP_OK;
}

void epi_dispatch_unreserve(epi_dispatch *d)
{
    owner *own = d->owner;
    if (own && own->memory)
        own->allocator.free(own->allocator.context, own->memory);
    free(own);
    d->owner = NULL;
}

static ep_tensor small_tensor(int32_t **next, const int32_t *from, int64_t count)
{
    memcpy(*next, from, (size_t)count * sizeof(int32_t));
    ep_tensor tensor = ep_tensor_1d(*next, EP_I32, count);
    *next += count;
    return tensor;
}

static void describe(const epi_dispatch *d, owner *own, uint8_t *base, ep_recv *recv)
{
    const ep_handle *handle = d->handle;
    const epi_region *region = &d->regions[d->op.buffer->rank];
    int64_t hidden = d->x.shape[1], rows = handle->rows;
    bool by_expert = handle->layout == EP_ROWS_BY_EXPERT;
    int topk = by_expert ? 1 : handle->topk;
    int32_t *small = own->small;
    recv->x = rows_tensor(base, region->x, d->wire_dtype, rows, hidden);
    if (d->shape.scales)
        recv->scales =
            rows_tensor(base, region->scales, d->scale == EP_SCALE_UE8M0 ? EP_UE8M0X4 : EP_F32,
                        rows, (int64_t)d->shape.scales / 4);
    recv->num_rows = handle->num_rows;
    recv->owner = own;
    if (d->weighted)
        return;
    recv->source_token = ep_tensor_1d(base + region->source, EP_I32, rows);
    if (by_expert)
        recv->expert_offset = small_tensor(&small, handle->expert_offset, handle->num_local + 1);
    else
        recv->source_offset = small_tensor(&small, handle->source_offset, handle->num_ranks + 1);
    if (d->cached)
        return;
    recv->topk_idx = rows_tensor(base, region->ids, d->topk_idx.dtype, rows, topk);
    if (d->shape.weights)
        recv->topk_weights = rows_tensor(base, region->weights, EP_F32, rows, topk);
    recv->host_tokens_per_expert = small;
    recv->tokens_per_expert = small_tensor(&small, handle->expert_rows, handle->num_local);
}

void epi_dispatch_settle(epi_dispatch *d)
{
    owner *own = d->owner;
    ep_recv recv = EP_RECV_INIT;
    own->running = true;
    describe(d, own, own->memory ? own->memory : region_base(d), &recv);
    if (!d->cached)
        recv.handle = epi_handle_hold(d->handle);
    atomic_fetch_add(&d->op.buffer->num_objects, 1);
    d->result = recv;
    d->settled = true;
    if (d->op.event)
        epi_event_tell(d->op.event, &recv, d->recv);
}

ep_status epi_dispatch_receive(epi_dispatch *d)
{
    ep_handle *handle = d->handle;
    owner *own = d->owner;
    const epi_region *region = &d->regions[d->op.buffer->rank];
    uint8_t *base = region_base(d);
    fill_unused(d);
    if (d->op.buffer->config.verify)
        EPI_TRY(verify_rows(d));
    if (!d->cached && handle->rows)
        memcpy(handle->source_token, base + region->source, (size_t)handle->rows * sizeof(int32_t));
    if (own->memory) {
        if (d->has_region)
            memcpy(own->memory, base, region->bytes);
    } else {
        own->in_window = d->has_region;
        own->region = d->region;
        d->has_region = false; /* it is the result's now */
    }
    return EP_OK;
}

static void give_result(const epi_dispatch *d)
{
    ep_recv recv = d->result;
    size_t size = recv.size = d->recv->size;
    memcpy(d->recv, &recv, size < sizeof recv ? size : sizeof recv);
}

void epi_dispatch_let_go(epi_dispatch *d, ep_status status)
{
    owner *own = d->owner;
    if (!d->settled)
        return;
    d->owner = NULL;
    bool mine = !d->op.event || epi_event_take(d->op.event); /* the caller has not got it yet */
    if (mine && status == EP_OK)
        give_result(d);
    pthread_mutex_lock(&own->buffer->pool_lock);
    own->running = false;
    bool unwanted = own->released || (mine && status != EP_OK);
    pthread_mutex_unlock(&own->buffer->pool_lock);
    if (mine && status != EP_OK)
        ep_handle_release(d->result.handle);
    if (unwanted)
        free_owner(own);
}
