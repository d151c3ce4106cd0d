/* SPDX-License-Identifier: MIT */
/* Low latency: memory, of which only as much is backed as rows need. */
#include "ep/ll.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"
#include "ep/wait.h"

#include <stdlib.h>

#define PAGE ((size_t)4096)

static size_t place(size_t *end, size_t bytes)
{
    size_t at = *end;
    *end = (at + bytes + 63) & ~(size_t)63;
    return at;
}

epi_ll_layout epi_ll_layout_of(const epi_ll_shape *shape, int num_ranks, int num_local,
                               size_t row_bytes, size_t scale_bytes, bool verify)
{
    epi_ll_layout layout;
    size_t tokens = (size_t)shape->max_tokens, local = (size_t)num_local, end = 0;
    place(&end, sizeof(epi_ll_head));
    layout.ids = place(&end, tokens * (size_t)shape->topk * sizeof(int32_t));
    layout.begin = place(&end, local * (size_t)num_ranks * sizeof(int32_t));
    layout.packed = place(&end, local * sizeof(int32_t));
    layout.sums = place(&end, verify ? tokens * sizeof(uint64_t) : 0);
    layout.rows = place(&end, tokens * row_bytes);
    layout.scales = place(&end, tokens * scale_bytes);
    layout.bytes = (end + PAGE - 1) / PAGE * PAGE;
    return layout;
}

epi_ll_layout epi_ll_layout_at(const epi_ll *ll, int rank)
{
    return epi_ll_layout_of(&ll->shape, ll->buffer->num_ranks, ll->local_of[rank], ll->row_bytes,
                            ll->scale_bytes, ll->buffer->config.verify);
}

uint8_t *epi_ll_area(const epi_ll *ll, int slot, int rank)
{
    return ll->buffer->window->peer[rank] + ll->slot[slot].peer_area[rank];
}

static size_t wire_bytes(const epi_ll_shape *shape)
{
    return ep_dtype_size((ep_dtype)shape->wire) * (size_t)shape->hidden;
}

static size_t wire_scale_bytes(const epi_ll_shape *shape)
{
    return shape->wire == EP_E4M3 ? epi_scale_bytes((ep_scale)shape->scale, (size_t)shape->hidden)
                                  : 0;
}

/* Every token of every rank can have at most min(K, L) rows here; no expert more than S. */
static size_t row_bound(const epi_ll_shape *shape, int num_ranks, int num_local)
{
    size_t per_token = (size_t)(shape->topk < num_local ? shape->topk : num_local);
    size_t by_tokens = (size_t)num_ranks * (size_t)shape->max_tokens * per_token;
    size_t by_room = (size_t)num_local * (size_t)shape->expert_rows;
    return by_tokens < by_room ? by_tokens : by_room;
}

/* Memory that `row_bound` rows can occupy: each expert's rows may begin and end within a page. */
static size_t backing_bound(size_t rows, size_t row_bytes, int num_local)
{
    return rows * row_bytes + 2 * PAGE * (size_t)num_local;
}

void epi_ll_sizes(const epi_ll_shape *shape, int num_ranks, int num_local, bool verify,
                  ep_ll_size *size)
{
    size_t row = wire_bytes(shape), scales = wire_scale_bytes(shape);
    size_t y_row = 2 * (size_t)shape->hidden, encoded = epi_logfmt_row_bytes((size_t)shape->hidden);
    size_t room = (size_t)num_local * (size_t)shape->expert_rows;
    size_t rows = row_bound(shape, num_ranks, num_local);
    size_t area = epi_ll_layout_of(shape, num_ranks, num_local, row, scales, verify).bytes;
    size_t copy = (rows * (encoded > y_row ? encoded : y_row) + PAGE - 1) / PAGE * PAGE;
    size_t sparse = room * (row + y_row) + 2 * PAGE;
    /* Expert outputs lie in the [L, S, H] buffer or in a packed copy; a caller may use both. */
    size->window_bytes = 2 * (area + backing_bound(rows, row, num_local) +
                              backing_bound(rows, y_row, num_local) + copy);
    size->private_bytes = 2 * room * (scales + sizeof(int32_t));
    size->address_bytes = 2 * (area + sparse + copy) + size->private_bytes;
}

/* ------------------------------------------------------------- backing */

/* Gives back what no row of this call needs; count NULL: all of it. */
static void drop_unused(epi_ll *ll, epi_ll_rows *rows, const int32_t *count)
{
    epi_window *window = ll->buffer->window;
    size_t room = (size_t)ll->shape.expert_rows * rows->row_bytes;
    for (int l = 0; l < ll->experts.num_local; l++) {
        size_t start = rows->base + (size_t)l * room;
        size_t need = count ? (size_t)count[l] * rows->row_bytes : 0;
        if (rows->backed[l] <= need)
            continue;
        size_t from = (start + need + PAGE - 1) / PAGE * PAGE;
        size_t to = (start + rows->backed[l]) / PAGE * PAGE;
        if (from < to)
            window->transport->ops->window_drop(window, from, to);
        rows->total -= rows->backed[l] - need;
        rows->backed[l] = need;
    }
}

static ep_status back_rows(epi_ll *ll, epi_ll_rows *rows, const int32_t *count)
{
    epi_window *window = ll->buffer->window;
    size_t room = (size_t)ll->shape.expert_rows * rows->row_bytes, more = 0;
    for (int l = 0; l < ll->experts.num_local; l++) {
        size_t need = (size_t)count[l] * rows->row_bytes;
        more += need > rows->backed[l] ? need - rows->backed[l] : 0;
    }
    if (!more)
        return EP_OK;
    if (rows->total + more > ll->row_bound * rows->row_bytes)
        drop_unused(ll, rows, count);
    for (int l = 0; l < ll->experts.num_local; l++) {
        size_t need = (size_t)count[l] * rows->row_bytes;
        if (need <= rows->backed[l])
            continue;
        size_t start = rows->base + (size_t)l * room;
        size_t from = (start + rows->backed[l]) / PAGE * PAGE;
        size_t to = (start + need + PAGE - 1) / PAGE * PAGE;
        EPI_TRY(window->transport->ops->window_back(window, from, to));
        rows->total += need - rows->backed[l];
        rows->backed[l] = need;
    }
    return EP_OK;
}

ep_status epi_ll_back_rows(epi_ll *ll, epi_ll_rows *rows, const int32_t *count)
{
    /* The window's memory changes in one thread at a time: the caller's and the worker both do it.
     */
    pthread_mutex_lock(&ll->buffer->pool_lock);
    ep_status status = back_rows(ll, rows, count);
    pthread_mutex_unlock(&ll->buffer->pool_lock);
    return status;
}

/* ------------------------------------------------------------- setting up */

static ep_status take(ep_buffer *buffer, epi_pool *pool, size_t bytes, size_t *offset)
{
    pthread_mutex_lock(&buffer->pool_lock);
    ep_status status = epi_pool_take(pool, bytes, offset);
    pthread_mutex_unlock(&buffer->pool_lock);
    return status;
}

static size_t end_of(const epi_ll *ll, const epi_ll_rows *rows)
{
    return rows->base +
           (size_t)ll->experts.num_local * (size_t)ll->shape.expert_rows * rows->row_bytes;
}

/* Backs the last page: a caller that looks at all S rows of an expert must find memory, or a hole
   that the system fills, but not the end of a file. */
static ep_status reach_end(epi_ll *ll, const epi_ll_rows *rows)
{
    epi_window *window = ll->buffer->window;
    size_t end = end_of(ll, rows);
    if (end == rows->base)
        return EP_OK;
    pthread_mutex_lock(&ll->buffer->pool_lock);
    ep_status status = window->transport->ops->window_back(window, (end - 1) / PAGE * PAGE,
                                                           (end + PAGE - 1) / PAGE * PAGE);
    pthread_mutex_unlock(&ll->buffer->pool_lock);
    return status;
}

static ep_status new_rows(epi_ll *ll, epi_ll_rows *rows, size_t row_bytes)
{
    size_t local = (size_t)ll->experts.num_local;
    rows->row_bytes = row_bytes;
    rows->backed = calloc(local + 1, sizeof *rows->backed);
    if (!rows->backed)
        return epi_fail(EP_ERR_MEMORY, "out of memory for low-latency rows");
    ep_status status = take(ll->buffer, &ll->buffer->sparse_pool,
                            local * (size_t)ll->shape.expert_rows * row_bytes, &rows->base);
    if (status != EP_OK) {
        free(rows->backed);
        rows->backed = NULL;
        return status;
    }
    return reach_end(ll, rows);
}

static ep_status new_slot(epi_ll *ll, epi_ll_slot *slot)
{
    ep_buffer *buffer = ll->buffer;
    size_t room = (size_t)ll->experts.num_local * (size_t)ll->shape.expert_rows;
    slot->peer_area = calloc((size_t)buffer->num_ranks, sizeof *slot->peer_area);
    slot->scales = calloc(room + 1, ll->scale_bytes ? ll->scale_bytes : 1);
    slot->source_token = calloc(room + 1, sizeof *slot->source_token);
    if (!slot->peer_area || !slot->scales || !slot->source_token)
        return epi_fail(EP_ERR_MEMORY, "out of memory for low-latency results");
    EPI_TRY(take(buffer, &buffer->pool, epi_ll_layout_at(ll, buffer->rank).bytes, &slot->area));
    EPI_TRY(new_rows(ll, &slot->x, ll->row_bytes));
    return new_rows(ll, &slot->y, 2 * (size_t)ll->shape.hidden);
}

static void free_rows(epi_ll *ll, epi_ll_rows *rows)
{
    if (!rows->backed)
        return;
    epi_window *window = ll->buffer->window;
    size_t from = (rows->base + PAGE - 1) / PAGE * PAGE, to = end_of(ll, rows) / PAGE * PAGE;
    if (from < to) /* also what the caller touched past the rows */
        window->transport->ops->window_drop(window, from, to);
    epi_pool_give(&ll->buffer->sparse_pool, rows->base);
    free(rows->backed);
}

static void free_ll(epi_ll *ll)
{
    for (int i = 0; i < 2; i++) {
        epi_ll_slot *slot = &ll->slot[i];
        if (slot->area) /* peers that gave a call up may still read it */
            epi_pool_hold(&ll->buffer->pool, slot->area, ll->last_epoch);
        if (slot->has_y_block)
            epi_pool_hold(&ll->buffer->pool, slot->y_block, ll->last_epoch);
        free_rows(ll, &slot->x);
        free_rows(ll, &slot->y);
        free(slot->scales);
        free(slot->source_token);
        free(slot->peer_area);
    }
    epi_experts_free(&ll->experts);
    free(ll->local_of);
    free(ll);
}

void epi_ll_hold(epi_ll *ll)
{
    pthread_mutex_lock(&ll->buffer->pool_lock);
    ll->holders++;
    pthread_mutex_unlock(&ll->buffer->pool_lock);
}

void epi_ll_release(epi_ll *ll)
{
    if (!ll)
        return;
    ep_buffer *buffer = ll->buffer;
    pthread_mutex_lock(&buffer->pool_lock);
    if (--ll->holders == 0)
        free_ll(ll);
    pthread_mutex_unlock(&buffer->pool_lock);
}

void epi_ll_drop(ep_buffer *buffer)
{
    epi_ll *ll = buffer->ll;
    buffer->ll = NULL;
    epi_ll_release(ll);
}

ep_status epi_ll_new(ep_buffer *buffer, const char *call, const epi_ll_shape *shape,
                     const int32_t *expert_rank, epi_ll **out)
{
    epi_ll *ll = calloc(1, sizeof *ll);
    if (!ll)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    ll->buffer = buffer;
    ll->holders = 1;
    ll->shape = *shape;
    ll->row_bytes = wire_bytes(shape);
    ll->scale_bytes = wire_scale_bytes(shape);
    ll->local_of = calloc((size_t)buffer->num_ranks, sizeof *ll->local_of);
    ep_status status = ll->local_of ? EP_OK : epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    if (status == EP_OK)
        status = epi_experts_init(&ll->experts, call, shape->num_experts, expert_rank,
                                  buffer->num_ranks, buffer->rank);
    for (int64_t e = 0; status == EP_OK && e < shape->num_experts; e++)
        ll->local_of[ll->experts.rank[e]]++;
    ll->row_bound = row_bound(shape, buffer->num_ranks, ll->experts.num_local);
    for (int i = 0; i < 2 && status == EP_OK; i++)
        status = new_slot(ll, &ll->slot[i]);
    if (status != EP_OK) {
        epi_ll_release(ll);
        return status;
    }
    *out = ll;
    return EP_OK;
}

/* ------------------------------------------------------------- readers */

static bool still_reads(void *context, int rank)
{
    const ep_buffer *buffer = context;
    const epi_window *window = buffer->window;
    uint64_t last = buffer->ll_sent > buffer->ll_y ? buffer->ll_sent : buffer->ll_y;
    return rank != buffer->rank && epi_buffer_progress(buffer, rank) <= last &&
           (epi_slot_load(window, rank, EPI_SLOT_LL_READ) < buffer->ll_sent ||
            epi_slot_load(window, rank, EPI_SLOT_LL_Y_READ) < buffer->ll_y);
}

static bool nobody_reads(void *context)
{
    const ep_buffer *buffer = context;
    for (int r = 0; r < buffer->num_ranks; r++)
        if (!buffer->group->masked[r] && still_reads(context, r))
            return false;
    return true;
}

void epi_ll_await_readers(ep_buffer *buffer)
{
    if (buffer->ll_sent && !nobody_reads(buffer)) /* whoever does not come cannot read either */
        (void)epi_wait(buffer->group, buffer->window, "ep_buffer_destroy", buffer->epoch,
                       nobody_reads, still_reads, buffer, 0);
}

void epi_ll_result_free(epi_ll_result *result)
{
    if (!result)
        return;
    epi_ll_release(result->ll);
    free(result->ids);
    free(result->count);
    free(result->dropped);
    free(result->packed);
    free(result->range);
    free(result);
}

ep_status ep_ll_size_query(const ep_ll_shape *given, ep_ll_size *size)
{
    const char *call = "ep_ll_size_query";
    ep_ll_shape shape = EP_LL_SHAPE_INIT;
    EPI_TRY(epi_args_copy(call, "shape", &shape, sizeof shape, given));
    if (shape.num_ranks < 1 || shape.num_ranks > 65536)
        return epi_bad(call, "num_ranks", shape.num_ranks, "1..65536");
    if (shape.max_tokens < 1 || shape.max_tokens > 1 << 20)
        return epi_bad(call, "max_tokens", shape.max_tokens, "1..1048576");
    if (shape.hidden < 8 || shape.hidden % 8 || shape.hidden > 1 << 24)
        return epi_bad(call, "hidden", shape.hidden, "a multiple of 8, 8..16777216");
    if (shape.num_experts < 1 || shape.num_experts > 65536)
        return epi_bad(call, "num_experts", shape.num_experts, "1..65536");
    if (shape.topk < 1 || shape.topk > shape.num_experts)
        return epi_fail(EP_ERR_ARGUMENT, "%s: topk is %d; it must be 1..%lld (num_experts)", call,
                        (int)shape.topk, (long long)shape.num_experts);
    if (shape.wire != EP_BF16 && shape.wire != EP_E4M3)
        return epi_bad(call, "wire", shape.wire, "BF16 or E4M3");
    if (shape.scale < EP_SCALE_F32 || shape.scale > EP_SCALE_UE8M0)
        return epi_bad(call, "scale", shape.scale, "0..2 (ep_scale)");
    int64_t most = shape.max_tokens * shape.num_ranks;
    if (shape.max_expert_rows < 0 || shape.max_expert_rows > most)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: max_expert_rows is %lld; it must be 0..%lld (num_ranks * max_tokens)",
                        call, (long long)shape.max_expert_rows, (long long)most);
    const epi_ll_shape inner = {
        .max_tokens = shape.max_tokens,
        .hidden = shape.hidden,
        .num_experts = shape.num_experts,
        .expert_rows = shape.max_expert_rows ? shape.max_expert_rows : most,
        .topk = shape.topk,
        .wire = shape.wire,
        .scale = shape.scale,
    };
    ep_ll_size full = {.size = sizeof full};
    int local = (int)((shape.num_experts + shape.num_ranks - 1) / shape.num_ranks);
    epi_ll_sizes(&inner, shape.num_ranks, local, false, &full);
    return epi_result_copy(call, "size", size, &full, sizeof full);
}
