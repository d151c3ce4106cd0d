/* SPDX-License-Identifier: MIT */
/* Low latency: a rank reads the rows of its experts from the senders' areas. */
#ifndef EPI_EP_CUDA_LL_RECEIVE_CUH
#define EPI_EP_CUDA_LL_RECEIVE_CUH

#include "ep/cuda/ll_move.cuh"
#include "ep/cuda/ll_overflow.cuh"
#include "ep/cuda/ll_verify.cuh"

/* Block 0: counts and ranges of the result; where each source's rows begin goes back to it, also
   where they do not fit, as a combine may be queued already. */
static __device__ void epc_publish_counts(const epc_ll_params *p, const epc_call *call,
                                          const epc_ll_tables *tables)
{
    int ranks = p->comm.num_ranks;
    for (int i = (int)threadIdx.x; i < p->num_local * ranks; i += (int)blockDim.x) {
        int l = i / ranks, s = i % ranks, begin = tables->first[i];
        int kept = tables->start[i + 1] - tables->start[i];
        p->range[i] = (int64_t)epc_kept(p, begin) << 32 | kept;
        if (!epc_is_masked(&p->comm, s))
            epc_store_word((uint64_t *)(epc_area_at(p, s) + p->area.begin) +
                               p->expert_order[p->first_expert + l],
                           (uint32_t)begin, call->epoch);
    }
    for (int l = (int)threadIdx.x; l < p->num_local; l += (int)blockDim.x) {
        int total = tables->total[l], kept = epc_kept(p, total);
        p->count[l] = kept;
        p->dropped[l] = total - kept;
    }
}

/* Block 0, once nothing of the call has failed here: what is added stays. */
static __device__ void epc_add_expert_tokens(const epc_ll_params *p, const epc_ll_tables *tables)
{
    for (int l = (int)threadIdx.x; p->expert_tokens && l < p->num_local; l += (int)blockDim.x)
        p->expert_tokens[l * p->expert_tokens_stride] += epc_kept(p, tables->total[l]);
}

/* Verify mode: the rows that this warp has pulled. By value, so that tables stay in registers. */
template <bool STAY>
static __device__ __noinline__ void epc_check_pulled(const epc_ll_params *p, epc_ll_tables tables)
{
    int rows = tables.start[p->num_local * p->comm.num_ranks];
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x);
    for (int item = epc_warp() * (int)gridDim.x + (int)blockIdx.x; item < rows; item += warps) {
        epc_ll_row at = epc_find_row<STAY>(p, &tables, item);
        epc_ll_check_row(p, at.source, at.token, at.expert, at.row);
    }
}

/* A dispatch that failed has no rows, for whoever goes by its counts before he learns of it. */
static __device__ void epc_leave_empty(const epc_ll_params *p)
{
    int first = blockIdx.x || p->refused ? p->num_local : (int)threadIdx.x;
    for (int l = first; l < p->num_local; l += (int)blockDim.x)
        p->count[l] = p->dropped[l] = 0;
}

template <bool STAY>
static __device__ void epc_receive_rows(const epc_ll_params *p, const epc_call *call,
                                        uint8_t *memory)
{
    int pairs = p->num_local * p->comm.num_ranks;
    epc_ll_tables tables;
    tables.start = (int32_t *)memory;
    if (STAY && p->far_tables)
        tables.start = p->far_tables + blockIdx.x * p->far_table_bytes / (int64_t)sizeof(int32_t);
    tables.first = tables.start + pairs + 1;
    tables.total = tables.first + pairs;
    tables.bits = (uint32_t *)(tables.total + p->num_local);
    if (!(STAY ? epc_mark_bitmaps(p, call, &tables) : epc_gather_bitmaps(p, call, &tables)))
        return epc_leave_empty(p);
    bool fit = !p->overflow_fails || epc_experts_fit(p, call);
    epc_count_pairs<STAY>(p, &tables);
    epc_place_pairs(p, &tables);
    if (blockIdx.x == 0)
        epc_publish_counts(p, call, &tables);
    bool bulk = !STAY && p->bulk;
    uint8_t *behind = (uint8_t *)(tables.bits + pairs * p->words);
    behind += (128 - (uint64_t)behind % 128) % 128;
    if (!fit ||
        !(bulk ? epc_move_rows(p, call, &tables, behind) : epc_pull_rows<STAY>(p, call, &tables)))
        return epc_leave_empty(p);
    if (blockIdx.x == 0)
        epc_add_expert_tokens(p, &tables);
    if (p->verify)
        epc_check_pulled<STAY>(p, tables);
}

#endif
