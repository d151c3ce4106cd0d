/* SPDX-License-Identifier: MIT */
/*
 * First half of a dispatch: which token goes where.
 *
 * A column is a destination that rows are counted for: a rank, or an expert
 * with rows by expert. Tokens are counted in units, a multiple of 32 each. An
 * entry first holds its column and its place among the unit's rows for that
 * column; the sums of the units before it and of the ranks before this one are
 * added when rows are sent.
 */
#ifndef EPI_EP_CUDA_LAYOUT_CUH
#define EPI_EP_CUDA_LAYOUT_CUH

#include "ep/cuda/exchange.cuh"

#define EPC_NO_ENTRY ((epc_entry)-1)
#define EPC_IDS_AHEAD 8 /* loads of ids in flight a lane */

static __device__ __forceinline__ epc_entry epc_entry_of(int high, int low)
{
    return (epc_entry)((uint64_t)(uint32_t)high << 32 | (uint32_t)low);
}

static __device__ __forceinline__ int64_t epc_read_id(const uint8_t *ids, int bytes, int64_t index)
{
    return bytes == 8 ? ((const int64_t *)ids)[index] : ((const int32_t *)ids)[index];
}

/* The id of (t, k), -1 if it is none or out of range, which fails the call. */
static __device__ __forceinline__ int epc_checked_id(const epc_dispatch_params *p,
                                                     const epc_call *call, int t, int k)
{
    int64_t id = epc_read_id(p->ids, p->id_bytes, t * p->id_stride + k);
    if (id >= -1 && id < p->num_experts)
        return (int)id;
    *call->refused = 1;
    epc_fail_call(call->state, EPC_FAIL_ID, (uint32_t)t, (uint32_t)k, (uint32_t)id,
                  (uint32_t)(id >> 32), (uint32_t)p->num_experts);
    return -1;
}

/* Verify mode: a row that names an expert twice is an error. */
static __device__ void epc_check_duplicate(const epc_dispatch_params *p, const epc_call *call,
                                           int t, int k)
{
    int64_t id = epc_read_id(p->ids, p->id_bytes, t * p->id_stride + k);
    for (int before = 0; before < k && id >= 0; before++)
        if (epc_read_id(p->ids, p->id_bytes, t * p->id_stride + before) == id) {
            *call->refused = 1;
            epc_fail_call(call->state, EPC_FAIL_DUPLICATE, (uint32_t)t, (uint32_t)k, (uint32_t)id,
                          0, 0);
        }
}

/* 32 tokens by one warp, rows by token. `bits` and `running` have a word per rank. */
static __device__ void epc_count_by_token(const epc_dispatch_params *p, const epc_call *call, int t,
                                          uint32_t *bits, const uint32_t *running,
                                          uint32_t *experts)
{
    uint64_t ranks = 0;
    uint32_t mine = 1u << epc_lane();
    if (t < p->num_tokens) {
        for (int first = 0; first < p->topk; first += EPC_IDS_AHEAD) {
            int id[EPC_IDS_AHEAD], rank[EPC_IDS_AHEAD];
#pragma unroll
            for (int i = 0; i < EPC_IDS_AHEAD; i++)
                id[i] = first + i < p->topk ? epc_checked_id(p, call, t, first + i) : -1;
#pragma unroll
            for (int i = 0; i < EPC_IDS_AHEAD; i++)
                rank[i] = id[i] >= 0 ? p->expert_rank[id[i]] : -1;
#pragma unroll
            for (int i = 0; i < EPC_IDS_AHEAD; i++) {
                if (rank[i] < 0 || epc_is_masked(call->comm, rank[i]))
                    continue;
                atomicAdd(&experts[id[i]], 1);
                ranks |= 1ull << rank[i];
            }
        }
        if (p->verify)
            for (int k = 0; k < p->topk; k++)
                epc_check_duplicate(p, call, t, k);
        for (uint64_t left = ranks; left; left &= left - 1)
            atomicOr(&bits[__ffsll((long long)left) - 1], mine);
    }
    __syncwarp();
    if (t >= p->num_tokens)
        return;
    epc_entry *entry = p->drafts + (int64_t)t * p->width;
    int j = 0;
    for (uint64_t left = ranks; left; left &= left - 1, j++) {
        int r = __ffsll((long long)left) - 1;
        entry[j] = epc_entry_of(r, (int)running[r] + __popc(bits[r] & (mine - 1)));
    }
    for (; j < p->width; j++)
        entry[j] = EPC_NO_ENTRY;
}

/* Tokens one after the other: some row names an expert twice, and each naming is a row. */
static __device__ void epc_count_serially(const epc_dispatch_params *p, int t, uint32_t *running)
{
    for (int lane = 0; lane < EPC_WARP; lane++) {
        epc_entry *entry = p->drafts + (int64_t)t * p->width;
        for (int k = 0; lane == epc_lane() && t < p->num_tokens && k < p->topk; k++)
            if (entry[k] >= 0) {
                int id = (int)(entry[k] >> 32);
                entry[k] = epc_entry_of(id, (int)running[id]++);
            }
        __syncwarp();
    }
}

/* The same with rows by expert. */
static __device__ void epc_count_by_expert(const epc_dispatch_params *p, const epc_call *call,
                                           int t, uint32_t *bits, uint32_t *running)
{
    uint32_t mine = 1u << epc_lane();
    bool twice = false;
    epc_entry *entry = p->drafts + (int64_t)t * p->width;
    for (int k = 0; k < p->topk && t < p->num_tokens; k++) {
        int id = epc_checked_id(p, call, t, k);
        bool sent = id >= 0 && !epc_is_masked(call->comm, p->expert_rank[id]);
        if (sent && p->verify)
            epc_check_duplicate(p, call, t, k);
        if (sent)
            twice |= (atomicOr(&bits[id], mine) & mine) != 0;
        entry[k] = sent ? epc_entry_of(id, 0) : EPC_NO_ENTRY;
    }
    __syncwarp();
    if (__any_sync(EPC_ALL, twice)) {
        for (int e = epc_lane(); e < p->num_experts; e += EPC_WARP)
            bits[e] = 0;
        __syncwarp();
        epc_count_serially(p, t, running);
        return;
    }
    for (int k = 0; k < p->topk && t < p->num_tokens; k++) {
        if (entry[k] < 0)
            continue;
        int id = (int)(entry[k] >> 32);
        entry[k] = epc_entry_of(id, (int)running[id] + __popc(bits[id] & (mine - 1)));
    }
}

/* Before units are counted. `shared` holds what epc_layout_bytes() says. */
static __device__ void epc_clear_layout(const epc_dispatch_params *p, uint32_t *shared)
{
    int columns = p->by_expert ? p->num_experts : p->comm.num_ranks;
    int words = (p->by_expert ? 0 : p->num_experts) + p->layout_warps * 2 * columns;
    for (int i = (int)threadIdx.x; i < words; i += (int)blockDim.x)
        shared[i] = 0;
    int line = (int)threadIdx.x * 32; /* on its way while ids are read */
    if (line < p->num_experts)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(p->expert_rank + line));
}

/* Counts this block's units, by its last warps, and writes their tokens' entries. */
static __device__ void epc_count_units(const epc_dispatch_params *p, const epc_call *call,
                                       uint32_t *shared)
{
    int columns = p->by_expert ? p->num_experts : call->comm->num_ranks;
    int warp = epc_warp() + p->layout_warps - (int)(blockDim.x / EPC_WARP);
    uint32_t *experts = shared; /* [E], by token */
    uint32_t *bits = shared + (p->by_expert ? 0 : p->num_experts) + (int64_t)warp * 2 * columns;
    uint32_t *running = bits + columns;
    if (warp < 0)
        return;
    int step = (int)gridDim.x * p->layout_warps;
    for (int u = warp * (int)gridDim.x + (int)blockIdx.x; u < p->units; u += step) {
        for (int first = 0; first < 1 << p->unit_shift; first += EPC_WARP) {
            int t = (u << p->unit_shift) + first + epc_lane();
            if (p->by_expert)
                epc_count_by_expert(p, call, t, bits, running);
            else
                epc_count_by_token(p, call, t, bits, running, experts);
            __syncwarp();
            for (int c = epc_lane(); c < columns; c += EPC_WARP) {
                running[c] += (uint32_t)__popc(bits[c]);
                bits[c] = 0;
            }
            __syncwarp();
        }
        for (int c = epc_lane(); c < columns; c += EPC_WARP) {
            p->unit_counts[(int64_t)c * p->units + u] = (int32_t)running[c];
            running[c] = 0;
        }
        __syncwarp();
    }
}

/* The block's tokens of each expert, once all its units are counted. */
static __device__ void epc_put_experts(const epc_dispatch_params *p, const uint32_t *shared)
{
    if (!p->by_expert)
        for (int e = (int)threadIdx.x; e < p->num_experts; e += (int)blockDim.x)
            p->block_experts[(int64_t)e * gridDim.x + blockIdx.x] = (int32_t)shared[e];
}

/* Sums of one column's unit counts over the units before each, to `sums`; returns the total. */
static __device__ int epc_scan_column(const int32_t *counts, int units, int32_t *sums)
{
    int total = 0, count[EPC_MAX_UNITS / EPC_WARP];
#pragma unroll
    for (int i = 0; i < EPC_MAX_UNITS / EPC_WARP; i++) { /* all on their way at once */
        int u = i * EPC_WARP + epc_lane();
        count[i] = u < units ? __ldcg(&counts[u]) : 0;
    }
#pragma unroll
    for (int i = 0; i < EPC_MAX_UNITS / EPC_WARP; i++) {
        int u = i * EPC_WARP + epc_lane(), sum = count[i];
        if (i * EPC_WARP >= units)
            break;
        for (int step = 1; step < EPC_WARP; step *= 2) {
            int other = __shfl_up_sync(EPC_ALL, sum, step);
            sum += epc_lane() >= step ? other : 0;
        }
        if (u < units)
            sums[u] = total + sum - count[i];
        total += __shfl_sync(EPC_ALL, sum, EPC_WARP - 1);
    }
    return total;
}

static __device__ int epc_sum_expert(const int32_t *counts, int blocks)
{
    int sum = 0;
    for (int b = epc_lane(); b < blocks; b += EPC_WARP)
        sum += __ldcg(&counts[b]);
    return __reduce_add_sync(EPC_ALL, sum);
}

/* By one warp: a count to every rank. */
static __device__ void epc_push_count(const epc_call *call, int column, int count)
{
    const epc_comm *comm = call->comm;
    for (int r = epc_lane(); r < comm->num_ranks; r += EPC_WARP)
        if (!epc_is_masked(comm, r))
            epc_store_word(epc_counts_at(comm, r, comm->rank) + column, (uint32_t)count,
                           call->epoch);
}

/*
 * After the grid's barrier: sums each column over the units and sends the sum to
 * every rank. With rows by token every block makes all sums, for its own use, in
 * `sums`, and the blocks share the sending. With rows by expert the blocks share
 * the sums too, and keep them in unit_counts: whoever sees this rank's own word
 * also sees the column's sums.
 */
static __device__ void epc_push_counts(const epc_dispatch_params *p, const epc_call *call,
                                       int32_t *sums)
{
    int ranks = call->comm->num_ranks, warps = (int)(blockDim.x / EPC_WARP);
    for (int c = epc_warp(); c < ranks && !p->by_expert; c += warps) {
        int total = epc_scan_column(p->unit_counts + c * p->units, p->units, sums + c * p->units);
        if (c % (int)gridDim.x == (int)blockIdx.x)
            epc_push_count(call, c, total);
    }
    for (int e = epc_warp() * (int)gridDim.x + (int)blockIdx.x; e < p->num_experts;
         e += warps * (int)gridDim.x) {
        int total;
        if (p->by_expert) {
            int32_t *counts = p->unit_counts + (int64_t)e * p->units;
            total = epc_scan_column(counts, p->units, counts);
            __threadfence();
            __syncwarp();
        } else
            total = epc_sum_expert(p->block_experts + (int64_t)e * gridDim.x, (int)gridDim.x);
        epc_push_count(call, ranks + e, total);
    }
}

#endif
