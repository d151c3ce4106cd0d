/* SPDX-License-Identifier: MIT */
/* Low latency: rows from the senders' areas to the result. */
#ifndef EPI_EP_CUDA_LL_MOVE_CUH
#define EPI_EP_CUDA_LL_MOVE_CUH

#include "ep/cuda/ll_tables.cuh"

#define EPC_COPIES 7 /* half of what a lane has of 7168 bytes */

/* By a warp; a lane has some pieces of 16 bytes on their way at once. */
static __device__ __forceinline__ void epc_copy_bytes(uint8_t *to, const uint8_t *from, int bytes)
{
    const int step = 16 * EPC_WARP;
    int left = bytes - epc_lane() * 16;
    if (bytes % 16 == 0) {
        from += epc_lane() * 16;
        to += epc_lane() * 16;
        for (; left > 0; left -= EPC_COPIES * step) {
            int4 v[EPC_COPIES];
#pragma unroll
            for (int u = 0; u < EPC_COPIES; u++)
                if (u * step < left)
                    v[u] = epc_load16(from + u * step);
#pragma unroll
            for (int u = 0; u < EPC_COPIES; u++)
                if (u * step < left)
                    *(int4 *)(to + u * step) = v[u];
            from += EPC_COPIES * step;
            to += EPC_COPIES * step;
        }
        return;
    }
    for (int i = epc_lane(); i < bytes / 8; i += EPC_WARP) /* hidden is a multiple of 8 */
        ((int2 *)to)[i] = epc_load8(from + (int64_t)i * 8);
}

/* Waits until every source's rows are there, and books how long. */
static __device__ bool epc_await_rows(const epc_ll_params *p, const epc_call *call)
{
    int r = (int)threadIdx.x;
    bool ok = true;
    if (r < p->comm.num_ranks && !epc_is_masked(&p->comm, r)) {
        const uint32_t *flag =
            epc_flag_at(&p->comm, p->comm.rank, r, epc_ll_flag_of(p, EPC_LL_ROWS));
        if (p->wait_cost && blockIdx.x == 0)
            p->wait_cost[r * p->wait_cost_stride] += epc_time_wait(call, r, flag);
        ok = epc_wait_flag(call, r, flag, call->epoch);
        ok &= !epc_heed_abort(call, r);
    }
    ok = __syncthreads_and(ok);
    if (ok)
        epc_let_kernel_behind_come();
    return ok;
}

static __device__ __forceinline__ void epc_put_scale(const epc_ll_params *p, epc_ll_row at, int c,
                                                     uint32_t scale)
{
    int64_t to = p->scales_by_column ? ((int64_t)at.expert * p->scale_count + c) * p->expert_rows +
                                           (at.row - (int64_t)at.expert * p->expert_rows)
                                     : at.row * p->scale_count + c;
    p->recv_scales[to] = scale;
}

static __device__ void epc_pull_row(const epc_ll_params *p, epc_ll_row at)
{
    const uint8_t *area = epc_area_at(p, at.source);
    const uint32_t *scales =
        (const uint32_t *)(area + p->area.scales) + (int64_t)at.token * p->scale_count;
    uint32_t scale[2]; /* on their way while the row is */
    for (int u = 0; u < 2; u++)
        if (epc_lane() + u * EPC_WARP < p->scale_count)
            scale[u] = __ldcg(&scales[epc_lane() + u * EPC_WARP]);
    epc_copy_bytes(p->recv_x + at.row * p->row_bytes, area + p->area.rows + at.token * p->row_bytes,
                   (int)p->row_bytes);
    for (int u = 0; u < 2; u++)
        if (epc_lane() + u * EPC_WARP < p->scale_count)
            epc_put_scale(p, at, epc_lane() + u * EPC_WARP, scale[u]);
    for (int c = epc_lane() + 2 * EPC_WARP; c < p->scale_count; c += EPC_WARP)
        epc_put_scale(p, at, c, __ldcg(&scales[c]));
    if (epc_lane() == 0)
        p->source_token[at.row] = at.token;
}

/* Rows of this rank's experts, from the senders' areas: a warp takes one at a time, and knows its
   next ones, a lane each, before they are there. False: they did not come. */
template <bool STAY>
static __device__ bool epc_pull_rows(const epc_ll_params *p, const epc_call *call,
                                     const epc_ll_tables *tables)
{
    int rows = tables->start[p->num_local * p->comm.num_ranks];
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x);
    int first = epc_warp() * (int)gridDim.x + (int)blockIdx.x;
    bool there = false;
    for (int base = first; base < rows || !there; base += EPC_WARP * warps) {
        int item = base + epc_lane() * warps;
        epc_ll_row mine = {0, 0, 0, 0};
        if (item < rows)
            mine = epc_find_row<STAY>(p, tables, item);
        if (!there && !epc_await_rows(p, call))
            return false;
        there = true;
        for (int j = 0; j < EPC_WARP && base + j * warps < rows; j++) {
            epc_ll_row at;
            at.source = __shfl_sync(EPC_ALL, mine.source, j);
            at.token = __shfl_sync(EPC_ALL, mine.token, j);
            at.expert = __shfl_sync(EPC_ALL, mine.expert, j);
            at.row = __shfl_sync(EPC_ALL, mine.row, j);
            epc_pull_row(p, at);
        }
    }
    return true;
}

#if EPC_BULK
/* The same through the bulk copy engine: a block lists its rows, some at a time. Each moving warp
   brings pieces of them through two stages of its own in shared memory, as they are free; the warps
   behind those see to scales. */
typedef struct epc_ll_list {
    const epc_ll_row *row;
    int count;
    int *next; /* piece that no warp has taken */
} epc_ll_list;

/* A piece on its way, and where it is to go. */
typedef struct epc_ll_piece {
    uint8_t *to;
    uint32_t bytes; /* 0: there is none */
} epc_ll_piece;

static __device__ epc_ll_piece epc_bring_piece(const epc_ll_params *p, const epc_ll_list *list,
                                               uint8_t *stage, uint64_t *full)
{
    int item = atomicAdd(list->next, 1);
    epc_ll_piece piece = {NULL, 0};
    if (item >= list->count * p->pieces)
        return piece;
    epc_ll_row at = list->row[item / p->pieces];
    int64_t first = item % p->pieces * (int64_t)p->piece_bytes, left = p->row_bytes - first;
    piece.to = p->recv_x + at.row * p->row_bytes + first;
    piece.bytes = (uint32_t)(left < p->piece_bytes ? left : p->piece_bytes);
    epc_mbar_expect(full, piece.bytes);
    epc_bulk_load(stage, epc_area_at(p, at.source) + p->area.rows + at.token * p->row_bytes + first,
                  piece.bytes, full);
    return piece;
}

/* By one lane. `parity`: of its two stages' next turns. */
static __device__ void epc_move_pieces(const epc_ll_params *p, const epc_ll_list *list,
                                       uint8_t *stages, uint64_t *full, uint32_t *parity)
{
    epc_ll_piece piece[2];
    epc_bulk_fence(); /* rows that others stored, and what stages were used for before */
#pragma unroll
    for (int s = 0; s < 2; s++)
        piece[s] = epc_bring_piece(p, list, stages + s * p->piece_bytes, &full[s]);
    while (piece[0].bytes || piece[1].bytes)
#pragma unroll
        for (int s = 0; s < 2; s++) {
            if (!piece[s].bytes)
                continue;
            uint8_t *stage = stages + s * p->piece_bytes;
            epc_mbar_wait(&full[s], *parity >> s & 1);
            *parity ^= 1u << s;
            epc_bulk_store_kept(piece[s].to, stage, piece[s].bytes);
            epc_bulk_commit();
            epc_bulk_wait_read();
            piece[s] = epc_bring_piece(p, list, stage, &full[s]);
        }
    epc_bulk_wait();
}

#define EPC_SCALES 4 /* of a thread on their way at once */

/* By the warps behind those that move. */
static __device__ void epc_move_scales(const epc_ll_params *p, const epc_ll_list *list)
{
    int threads = (int)blockDim.x - p->slots * EPC_WARP, words = list->count * p->scale_count;
    int me = (int)threadIdx.x - p->slots * EPC_WARP;
    for (int i = me; i < list->count; i += threads)
        p->source_token[list->row[i].row] = list->row[i].token;
    for (int base = me; base < words; base += EPC_SCALES * threads) {
        uint32_t scale[EPC_SCALES];
#pragma unroll
        for (int u = 0; u < EPC_SCALES; u++) {
            int i = base + u * threads;
            if (i >= words)
                break;
            epc_ll_row at = list->row[i / p->scale_count];
            scale[u] = __ldcg((const uint32_t *)(epc_area_at(p, at.source) + p->area.scales) +
                              (int64_t)at.token * p->scale_count + i % p->scale_count);
        }
#pragma unroll
        for (int u = 0; u < EPC_SCALES; u++) {
            int i = base + u * threads;
            if (i < words)
                epc_put_scale(p, list->row[i / p->scale_count], i % p->scale_count, scale[u]);
        }
    }
}

/* `memory`: behind the tables, for the list and the stages. False: the rows did not come. */
static __device__ bool epc_move_rows(const epc_ll_params *p, const epc_call *call,
                                     const epc_ll_tables *tables, uint8_t *memory)
{
    __shared__ uint64_t full[2 * EPC_THREADS / EPC_WARP];
    __shared__ int next;
    int rows = tables->start[p->num_local * p->comm.num_ranks], blocks = (int)gridDim.x;
    int own = (rows - (int)blockIdx.x + blocks - 1) / blocks, me = (int)threadIdx.x;
    epc_ll_row *row = (epc_ll_row *)memory;
    uint8_t *stages = memory + EPC_LL_LIST * sizeof *row + epc_warp() * 2 * p->piece_bytes;
    uint32_t parity = 0;
    if (me < 2 * p->slots) {
        epc_mbar_init(&full[me], 1);
        epc_mbar_init_done();
    }
    for (int base = 0; base < own || base == 0; base += EPC_LL_LIST) {
        int count = own - base < EPC_LL_LIST ? own - base : EPC_LL_LIST;
        if (me < count)
            row[me] = epc_find_row<false>(p, tables, (base + me) * blocks + (int)blockIdx.x);
        if (me == 0)
            next = 0;
        if (base)
            __syncthreads();
        else if (!epc_await_rows(p, call))
            return false;
        epc_ll_list list = {row, count, &next};
        if (epc_warp() >= p->slots)
            epc_move_scales(p, &list);
        else if (epc_lane() == 0)
            epc_move_pieces(p, &list, stages, &full[2 * epc_warp()], &parity);
        __syncthreads();
    }
    return true;
}
#else
static __device__ bool epc_move_rows(const epc_ll_params *p, const epc_call *call,
                                     const epc_ll_tables *tables, uint8_t *memory)
{
    (void)memory;
    return epc_pull_rows<false>(p, call, tables);
}
#endif

#endif
