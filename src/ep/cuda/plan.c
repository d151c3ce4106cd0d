/* SPDX-License-Identifier: MIT */
/* What calls share before they launch: blocks, expert tables, scratch, and how shared memory is
 * cut. */
#include "ep/cuda/internal.h"

#include <stdlib.h>

static int smaller(int a, int b)
{
    return a < b ? a : b;
}

/* Memory that only kernels of this buffer use, one after the other. What a graph has captured
   keeps its address: smaller blocks are freed with the buffer. */
ep_status epc_use_scratch(epc_buffer *b, size_t bytes, uint8_t **memory)
{
    if (!b->scratch || b->scratch->bytes < bytes) {
        epc_block *more;
        if (b->scratch && b->num_old == (int)(sizeof b->old_scratch / sizeof *b->old_scratch))
            return epi_fail(EP_ERR_MEMORY, "scratch memory has grown %d times", b->num_old);
        EPI_TRY(epc_take(b, 2 * bytes, &more));
        if (b->scratch)
            b->old_scratch[b->num_old++] = b->scratch;
        b->scratch = more;
    }
    *memory = b->scratch->memory;
    return EP_OK;
}

ep_status epc_choose_blocks(const epc_buffer *b, const char *call, int32_t num_sms, int *blocks)
{
    int most = b->gpu.multiprocessors / b->sharing;
    if (num_sms < 0 || num_sms > most)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: num_sms is %d; it must be 0..%d: the device has %d multiprocessors "
                        "for %d rank%s, and "
                        "kernels that wait for each other must run at once",
                        call, (int)num_sms, most, b->gpu.multiprocessors, b->sharing,
                        b->sharing > 1 ? "s" : "");
    *blocks = num_sms ? num_sms : smaller(16, most);
    return EP_OK;
}

static ep_status put_table(epc_buffer *b, epc_table *table, const epi_experts *experts)
{
    size_t n = (size_t)experts->count, step = epc_padded(n * 4);
    int32_t *order = malloc((n + 1) * sizeof *order);
    if (!order)
        return epi_fail(EP_ERR_MEMORY, "out of memory for %zu experts", n);
    size_t at = 0;
    for (int r = 0; r < b->num_ranks; r++) {
        size_t first = at;
        if (r == b->rank)
            table->first = (int)at;
        for (size_t e = 0; e < n; e++)
            if (experts->rank[e] == r)
                order[at++] = (int32_t)e;
        if ((int)(at - first) > table->max_local)
            table->max_local = (int)(at - first);
    }
    ep_status status = epc_take(b, 3 * step, &table->block);
    if (status == EP_OK) {
        table->rank = (int32_t *)table->block->memory;
        table->local = (int32_t *)(table->block->memory + step);
        table->order = (int32_t *)(table->block->memory + 2 * step);
        status = epi_gpu_put(table->rank, experts->rank, n * 4);
    }
    if (status == EP_OK)
        status = epi_gpu_put(table->local, experts->local, n * 4);
    if (status == EP_OK)
        status = epi_gpu_put(table->order, order, n * 4);
    free(order);
    return status;
}

ep_status epc_find_table(epc_buffer *b, const char *call, int64_t num_experts,
                         const int32_t *expert_rank, epc_table **out)
{
    epi_experts experts;
    if (num_experts > EPC_MAX_EXPERTS)
        return epi_fail(EP_ERR_UNSUPPORTED, "%s: num_experts is %lld; on CUDA it must be 1..%d",
                        call, (long long)num_experts, EPC_MAX_EXPERTS);
    EPI_TRY(epc_core.experts_init(&experts, call, num_experts, expert_rank, b->num_ranks, b->rank));
    epc_table *table = b->tables;
    while (table && (table->count != num_experts || table->sum != experts.table_sum))
        table = table->next;
    ep_status status = EP_OK;
    if (!table) {
        table = calloc(1, sizeof *table);
        status = table ? EP_OK : epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
        if (status == EP_OK) {
            table->count = num_experts;
            table->sum = experts.table_sum;
            table->num_local = experts.num_local;
            status = put_table(b, table, &experts);
        }
        if (status == EP_OK) {
            table->next = b->tables;
            b->tables = table;
        } else if (table) {
            epc_give(b, table->block);
            free(table);
        }
    }
    epc_core.experts_free(&experts);
    *out = table;
    return status;
}

#define BATCH 4096 /* sizeof(epc_batch) */

static size_t tables_bytes(const epc_buffer *b, const epc_dispatch_params *p, int columns)
{
    return epc_dispatch_tables_bytes(b->num_ranks, columns,
                                     p->by_expert || p->cached ? 0 : columns * p->units);
}

/* Whether the tables of a call with that many experts fit a multiprocessor, beside two batches and
   a stage. */
static bool experts_fit(const epc_buffer *b, const epc_dispatch_params *p, int experts)
{
    size_t room = (size_t)b->gpu.max_shared - 2048, stage = p->bulk ? 20480 : 4096;
    int columns = p->by_expert ? experts : b->num_ranks;
    return epc_layout_bytes(b->num_ranks, experts, p->by_expert, 1) <= room &&
           tables_bytes(b, p, columns) + 2 * BATCH + stage <= room;
}

static ep_status check_experts(const epc_buffer *b, const epc_dispatch *d)
{
    const epc_dispatch_params *p = &d->params;
    int low = 0, high = p->num_experts;
    if (experts_fit(b, p, high))
        return EP_OK;
    while (low + 1 < high) {
        int middle = (low + high) / 2;
        if (experts_fit(b, p, middle))
            low = middle;
        else
            high = middle;
    }
    return epi_fail(EP_ERR_UNSUPPORTED,
                    "%s: num_experts is %d; in this layout it must be at most %d, as a "
                    "multiprocessor has %d bytes for tables",
                    d->flight->call, p->num_experts, low, b->gpu.max_shared);
}

/* A mover's stage for a row of x in equal pieces of at most `most` bytes. */
static void plan_stage(epc_dispatch_params *p, int64_t most)
{
    int64_t element = p->dtype == EPC_F32 ? 4 : 2, pieces = (p->load_bytes + most - 1) / most;
    int64_t piece = (p->load_bytes + pieces - 1) / pieces;
    int64_t unit = p->quantise ? 512 * element : 128; /* of whole scale words */
    if (pieces > 1)
        piece = (piece + unit - 1) / unit * unit;
    int64_t codes = p->quantise ? piece / element : 0;
    p->piece_bytes = (int32_t)piece;
    p->row_pieces = (int32_t)((p->load_bytes + piece - 1) / piece);
    p->slots = p->quantise ? 1 : 2; /* codes leave from a place of their own */
    p->slot_bytes = (int32_t)((piece + 127) / 128 * 128);
    p->stage_bytes = p->slots * p->slot_bytes;
    if (p->quantise)
        p->stage_bytes += (int32_t)((codes + codes / 32 + 16 + 127) / 128 * 128);
}

/* As many as keep memory busy, and no more: they only get in each other's way. Links take longer
   than memory. Where a row has few destinations quantising is the bound. */
static int wanted_movers(const epc_buffer *b, const epc_dispatch_params *p)
{
    int most = EPC_THREADS / 32, targets = smaller(p->topk, p->by_expert ? most : b->num_ranks);
    bool links = epc_over_links(b);
    int flight = p->quantise ? 71680 : links ? 114688 : 57344;
    int movers = smaller(flight / p->slot_bytes, most);
    if (p->quantise && links)
        return most;
    if (movers < 4)
        return 4;
    return p->quantise && targets < 8 ? movers * 8 / targets : movers;
}

/* How a block's shared memory and warps are used. */
ep_status epc_plan_block(const epc_buffer *b, epc_dispatch *d)
{
    epc_dispatch_params *p = &d->params;
    int threads = p->bulk && p->quantise ? EPC_CODING_THREADS : EPC_THREADS;
    int warps = threads / 32, columns = p->by_expert ? p->num_experts : b->num_ranks;
    size_t tables = tables_bytes(b, p, columns), room = (size_t)b->gpu.max_shared - 2048;
    EPI_TRY(check_experts(b, d));
    p->layout_warps = warps;
    while (p->layout_warps > 1 &&
           epc_layout_bytes(b->num_ranks, p->num_experts, p->by_expert, p->layout_warps) > room)
        p->layout_warps /= 2;
    size_t layout = epc_layout_bytes(b->num_ranks, p->num_experts, p->by_expert, p->layout_warps);
    if (!p->bulk) {
        p->sides = smaller(warps, (int)((room - tables) / BATCH));
        d->shared = tables + (size_t)p->sides * BATCH;
    } else {
        p->sides = p->scales ? 16 : 8; /* given scales are what most lies beside the rows */
        plan_stage(p, 16384);
        while (p->sides > 2 && (size_t)p->sides * BATCH + (size_t)p->stage_bytes > room - tables)
            p->sides /= 2;
        size_t left = room - tables - (size_t)p->sides * BATCH;
        if ((size_t)p->stage_bytes > left)
            plan_stage(p, 2048);
        p->movers = smaller(warps - p->sides,
                            smaller(wanted_movers(b, p), (int)(left / (size_t)p->stage_bytes)));
        d->shared = tables + (size_t)p->sides * BATCH + (size_t)p->movers * (size_t)p->stage_bytes;
    }
    if (p->bulk && !p->by_expert)
        p->layout_warps = smaller(p->layout_warps, warps - p->movers);
    p->early = p->bulk && layout <= tables + (size_t)p->sides * BATCH;
    if (d->shared < layout)
        d->shared = layout;
    return EP_OK;
}

/* Units of tokens: few enough for their counts to be summed quickly. */
void epc_plan_units(epc_dispatch_params *p, int num_ranks)
{
    int most = p->by_expert ? EPC_MAX_UNITS : smaller(EPC_MAX_UNITS, 4096 / num_ranks);
    p->unit_shift = 5;
    while ((p->num_tokens - 1) >> p->unit_shift >= most)
        p->unit_shift++;
    p->units = (p->num_tokens + (1 << p->unit_shift) - 1) >> p->unit_shift;
}

/* Verify mode: a row for each warp, where it does not go on the wire as it came. */
static size_t plan_seals(epc_dispatch *d)
{
    epc_dispatch_params *p = &d->params;
    if (!p->verify || !(p->quantise || d->weighted))
        return 0;
    p->seal_bytes = (int64_t)epc_padded((size_t)p->shape.row_bytes + 16) +
                    (int64_t)epc_padded((size_t)p->shape.scale_bytes);
    return (size_t)p->seal_bytes * (size_t)d->blocks * (EPC_THREADS / 32);
}

ep_status epc_plan_scratch(epc_buffer *b, epc_dispatch *d)
{
    epc_dispatch_params *p = &d->params;
    size_t columns = p->by_expert ? (size_t)p->num_experts : (size_t)b->num_ranks;
    size_t drafts = epc_padded((size_t)p->num_tokens * (size_t)p->topk * sizeof(epc_entry));
    size_t counts = epc_padded(columns * (size_t)p->units * 4);
    size_t experts = epc_padded((size_t)p->num_experts * (size_t)d->blocks * 4);
    size_t layout = d->cached ? 0 : drafts + counts + experts, seals = plan_seals(d);
    uint8_t *memory = NULL;
    if (layout + seals == 0)
        return EP_OK;
    EPI_TRY(epc_use_scratch(b, layout + seals, &memory));
    p->seal_scratch = memory + layout;
    if (d->cached)
        return EP_OK;
    p->drafts = (epc_entry *)memory;
    p->unit_counts = (int32_t *)(memory + drafts);
    p->block_experts = (int32_t *)(memory + drafts + counts);
    return EP_OK;
}
