/* SPDX-License-Identifier: MIT */
/* Launches of low latency: what kernels are told of a shape of calls, and one launch a call or two.
 */
#include "ep/cuda/ll.h"

#include <stdlib.h>
#include <string.h>

void epc_ll_describe(epc_buffer *b, const epc_ll *ll, int slot, epc_flight *flight,
                     epc_ll_params *p)
{
    memset(p, 0, sizeof *p);
    epc_fill_comm(b, &p->comm);
    p->report = flight->report;
    p->serial = flight->serial;
    p->timeout_ns = b->buffer->group->timeout_ms * 1000000;
    p->slot = slot;
    p->hidden = (int32_t)ll->shape.hidden;
    p->topk = ll->shape.topk;
    p->num_experts = (int32_t)ll->shape.num_experts;
    p->num_local = ll->num_local;
    p->max_local = ll->max_local;
    p->max_tokens = (int32_t)ll->shape.max_tokens;
    p->words = ll->words;
    p->expert_rows = (int32_t)ll->shape.expert_rows;
    p->overflow_fails = epc_ll_overflow_fails(b, &ll->shape);
    p->head_bytes = (int32_t)epc_ll_head_bytes(ll->shape.hidden);
    p->quantise = ll->shape.wire == EP_E4M3;
    p->scale_kind = ll->shape.scale;
    p->scale_count = ll->scale_count;
    p->row_bytes = ll->row_bytes;
    p->area = ll->area;
    for (int r = 0; r < b->num_ranks; r++)
        p->area_of[r] = b->places[ll->place[r] * EPC_MAX_RANKS + (uint32_t)r] + ll->offset[r] +
                        slot * ll->area.bytes;
    p->expert_rank = ll->table->rank;
    p->expert_local = ll->table->local;
    p->expert_order = ll->table->order;
    p->first_expert = ll->table->first;
    p->count = ll->slot[slot].count;
    p->verify = b->buffer->config.verify;
    p->overlap = b->bulk;
    p->flip = epc_flip_now(b);
}

ep_status epc_ll_start(int which, const epc_ll_params *p, int blocks, size_t shared, void *stream)
{
    return epi_gpu_check(epc_ll_launch(which, p, blocks, shared, stream), "cudaLaunchKernel");
}

/* The receiving half of a call, on the stream of whoever asks for it. */
ep_status epc_run_second(epc_flight *flight, void *stream)
{
    epc_second *second = flight->second;
    epc_buffer *b = flight->owner;
    bool captured = flight->serial == 0;
    if (stream != flight->stream && !captured)
        EPI_TRY(epi_gpu_stream_wait_event(stream, flight->done));
    if (b->has_last && b->last_stream != stream && !captured)
        EPI_TRY(epi_gpu_stream_wait_event(stream, b->last_done));
    EPI_TRY(epc_ll_start(second->kernel, &second->params, second->blocks, second->shared, stream));
    free(second);
    flight->second = NULL;
    flight->stream = stream;
    if (captured)
        return EP_OK;
    EPI_TRY(epi_gpu_event_record(flight->done, stream));
    b->last_stream = stream;
    b->has_last = true;
    return epi_gpu_event_record(b->last_done, stream);
}

ep_status epc_ll_place_tables(epc_buffer *b, epc_ll_params *p, int blocks, epc_ll_room *room)
{
    size_t most = (size_t)b->gpu.max_shared - 12 * 1024, grid = (size_t)blocks;
    size_t bits = ((size_t)p->num_experts + grid - 1) / grid * (size_t)p->words * 4;
    size_t tables = epc_ll_tables_bytes(b->num_ranks, p->num_local, p->words);
    uint8_t *memory = NULL;
    p->many = bits > most || tables > most;
    *room = (epc_ll_room){bits, tables};
    if (!p->many)
        return EP_OK;
    tables = epc_padded(epc_ll_tables_bytes(b->num_ranks, p->num_local, EPC_MARKS(p->words)));
    *room = (epc_ll_room){bits > most ? 0 : bits, tables > most ? 0 : tables};
    size_t far_bits = epc_padded(bits > most ? grid * bits : 0);
    size_t far_tables = tables > most ? grid * tables : 0;
    if (far_bits + far_tables)
        EPI_TRY(epc_use_scratch(b, far_bits + far_tables, &memory));
    p->far_bits = far_bits ? (uint32_t *)memory : NULL;
    p->far_tables = far_tables ? (int32_t *)(memory + far_bits) : NULL;
    p->far_table_bytes = (int64_t)tables;
    return EP_OK;
}

ep_status epc_ll_launch_call(epc_flight *flight, const epc_ll_params *p, epc_ll_kernel whole,
                             epc_ll_kernel first, epc_ll_kernel second, bool hook)
{
    if (!hook)
        return epc_ll_start(whole.kernel, p, whole.blocks, whole.shared, flight->stream);
    epc_second *later = malloc(sizeof *later);
    if (!later)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", flight->call);
    *later = (epc_second){
        .params = *p, .kernel = second.kernel, .blocks = second.blocks, .shared = second.shared};
    ep_status status = epc_ll_start(first.kernel, p, first.blocks, first.shared, flight->stream);
    if (status != EP_OK)
        free(later);
    else
        flight->second = later;
    return status;
}
