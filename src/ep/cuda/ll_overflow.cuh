/* SPDX-License-Identifier: MIT */
/* Where no expert may overflow, and one could: every rank counts rows for all experts, so all see
   the same error. A sender's counts go with its bitmaps. */
#ifndef EPI_EP_CUDA_LL_OVERFLOW_CUH
#define EPI_EP_CUDA_LL_OVERFLOW_CUH

#include "ep/cuda/ll_call.cuh"

/* Counts of this block's experts, those with e % blocks == block, to every rank. */
static __device__ __noinline__ void epc_push_expert_counts(const epc_ll_params *p,
                                                           const epc_call *call,
                                                           const uint32_t *bits)
{
    int blocks = (int)gridDim.x, block = (int)blockIdx.x, ranks = p->comm.num_ranks;
    int mine = (p->num_experts - block + blocks - 1) / blocks;
    for (int i = (int)threadIdx.x; i < mine * ranks; i += (int)blockDim.x) {
        int e = i / ranks, r = i % ranks, count = 0;
        for (int w = 0; w < p->words; w++)
            count += __popc(bits[e * p->words + w]);
        if (!epc_is_masked(&p->comm, r))
            epc_store_word(epc_expert_counts_at(p, r, p->comm.rank) + e * blocks + block,
                           (uint32_t)count, call->epoch);
    }
}

/* Rows that expert e receives of all ranks. */
static __device__ bool epc_sum_expert_counts(const epc_ll_params *p, const epc_call *call, int e,
                                             int64_t *total)
{
    bool ok = true;
    *total = 0;
    EPC_EACH_RANK(s, p->comm.num_ranks)
    {
        uint32_t count = 0;
        if (!epc_is_masked(&p->comm, s))
            ok = ok && epc_wait_word(call, s, epc_expert_counts_at(p, p->comm.rank, s) + e, &count);
        *total += count;
    }
    return ok;
}

/* Whether every expert has room, by each block; if not, the first that has none fails the call. */
static __device__ __noinline__ bool epc_experts_fit(const epc_ll_params *p, const epc_call *call)
{
    __shared__ int first;
    int64_t total;
    bool ok = true;
    if (threadIdx.x == 0)
        first = p->num_experts;
    __syncthreads();
    for (int e = (int)threadIdx.x; e < p->num_experts && ok; e += (int)blockDim.x) {
        ok = epc_sum_expert_counts(p, call, e, &total);
        if (ok && total > p->expert_rows)
            atomicMin(&first, e);
    }
    if (!__syncthreads_and(ok))
        return false;
    int e = first;
    if (e < p->num_experts && threadIdx.x == 0 && epc_sum_expert_counts(p, call, e, &total))
        epc_fail_call(call->state, EPC_FAIL_OVERFLOW, (uint32_t)e, (uint32_t)p->expert_rank[e],
                      (uint32_t)total, (uint32_t)p->expert_rows, 0);
    return e == p->num_experts;
}

#endif
