/* SPDX-License-Identifier: MIT */
/* The result of a dispatch as the caller gets it. */
#include "ep/cuda/internal.h"

#include <stdlib.h>
#include <string.h>

/* A result's memory. */
typedef struct owner {
    epc_buffer *b;
    epc_block *block; /* of the window; NULL: the allocator's */
    epc_handle *handle;
    ep_allocator allocator;
    void *memory;
} owner;

static ep_tensor rows_on_device(const epc_buffer *b, void *data, ep_dtype dtype, int64_t rows,
                                int64_t columns)
{
    return epc_tensor(b, data, dtype, columns < 0 ? 1 : 2, rows, columns, 0);
}

static void describe_result(const epc_dispatch *d, uint8_t *base, ep_recv *recv)
{
    const epc_buffer *b = d->flight->owner;
    const ep_handle *handle = d->handle;
    const epc_handle *device = handle->device;
    const epc_dispatch_params *p = &d->params;
    int64_t rows = handle->rows;
    epc_region at = epc_region_of(&p->shape, rows);
    recv->x = rows_on_device(b, base + at.x, d->wire_dtype, rows, p->hidden);
    if (p->scale_count)
        recv->scales =
            rows_on_device(b, base + at.scales, d->scale == EP_SCALE_UE8M0 ? EP_UE8M0X4 : EP_F32,
                           rows, p->scale_count);
    recv->num_rows = handle->num_rows;
    if (d->weighted)
        return;
    recv->source_token = rows_on_device(b, base, EP_I32, rows, -1);
    if (p->by_expert)
        recv->expert_offset =
            rows_on_device(b, device->expert_offset, EP_I32, handle->num_local + 1, -1);
    else
        recv->source_offset =
            rows_on_device(b, device->source_offset, EP_I32, handle->num_ranks + 1, -1);
    if (d->cached)
        return;
    recv->topk_idx =
        rows_on_device(b, base + at.ids, d->topk_dtype, rows, p->by_expert ? 1 : p->topk);
    if (p->weights)
        recv->topk_weights =
            rows_on_device(b, base + at.weights, EP_F32, rows, p->by_expert ? 1 : p->topk);
    recv->tokens_per_expert =
        rows_on_device(b, device->expert_tokens, EP_I32, handle->num_local, -1);
    recv->host_tokens_per_expert = device->host_tokens;
}

/* Copies the result out of the window, behind the kernel. */
static ep_status copy_out(epc_dispatch *d, owner *own)
{
    size_t bytes = (size_t)epc_region_of(&d->params.shape, d->handle->rows).end;
    own->allocator = d->allocator;
    own->memory = d->allocator.alloc(d->allocator.context, bytes ? bytes : 1);
    if (!own->memory)
        return epi_fail(EP_ERR_MEMORY, "%s: allocator->alloc returned NULL for %zu bytes",
                        d->flight->call, bytes);
    ep_status status =
        epi_gpu_copy(own->memory, d->region ? d->region->memory : NULL, bytes, d->flight->stream);
    if (status == EP_OK && d->flight->slot < EPC_MAX_FLIGHTS) {
        /* whoever waits for the call waits for the copy too */
        status = epi_gpu_event_record(d->flight->done, d->flight->stream);
        if (status == EP_OK)
            status = epi_gpu_event_record(d->flight->owner->last_done, d->flight->stream);
    }
    return status;
}

/* The region as two blocks: source tokens, which stay with the handle, and the rest. */
static void divide_region(epc_dispatch *d, epc_handle *device, owner *own)
{
    epc_buffer *b = d->flight->owner;
    epc_region at = epc_region_of(&d->params.shape, d->handle->rows);
    if (!d->region)
        return;
    if (d->cached) {
        own->block = d->region;
    } else {
        epc_trim(b, d->region, (size_t)at.end);
        d->flight->written_bytes = d->region->bytes; /* where all rows are, and no more */
        own->block = epc_split(b, d->region, (size_t)at.x);
        device->sources = d->region;
    }
    d->region = NULL;
}

ep_status epc_publish(epc_dispatch *d)
{
    epc_handle *device = d->handle->device;
    owner *own = calloc(1, sizeof *own);
    if (!own)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", d->flight->call);
    uint8_t *base = d->region ? d->region->memory : NULL;
    own->b = d->flight->owner;
    ep_status status = d->has_allocator ? copy_out(d, own) : EP_OK;
    if (status != EP_OK) {
        if (own->memory)
            own->allocator.free(own->allocator.context, own->memory);
        free(own);
        return status;
    }
    if (own->memory)
        base = own->memory;
    divide_region(d, device, own);
    if (own->memory &&
        own->block) { /* the copy is in stream order; the window's part is free behind it */
        d->flight->blocks[1] = own->block;
        own->block = NULL;
    }
    own->handle = device;
    atomic_fetch_add(&device->holders, 1);
    atomic_fetch_add(&d->flight->owner->buffer->num_objects, 1);
    ep_recv recv = EP_RECV_INIT;
    describe_result(d, base, &recv);
    recv.owner = own;
    if (!d->cached) {
        recv.handle = d->handle;
        atomic_fetch_add(&d->handle->holders, 1);
    }
    recv.size = d->recv->size;
    memcpy(d->recv, &recv, recv.size < sizeof recv ? recv.size : sizeof recv);
    return EP_OK;
}

void epc_recv_release(void *memory)
{
    owner *own = memory;
    if (own->memory)
        own->allocator.free(own->allocator.context, own->memory);
    epc_give(own->b, own->block);
    epc_handle_drop(own->handle);
    atomic_fetch_sub(&own->b->buffer->num_objects, 1);
    free(own);
}
