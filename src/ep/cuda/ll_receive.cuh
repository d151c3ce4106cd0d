/* SPDX-License-Identifier: MIT */
/* Low latency: a rank reads the rows of its experts from the senders' areas. */
#ifndef EPI_EP_CUDA_LL_RECEIVE_CUH
#define EPI_EP_CUDA_LL_RECEIVE_CUH

#include "ep/cuda/ll_call.cuh"
#include "ep/cuda/ll_overflow.cuh"
#include "ep/cuda/ll_verify.cuh"

/* In shared memory: bitmaps of this rank's experts from every source, and rows before each pair. */
typedef struct epc_ll_tables {
    uint32_t *bits; /* [R, L, W] */
    int32_t *start; /* [L * R + 1] first of each (expert, source)'s among all rows kept */
    int32_t *first; /* [L * R] row within the expert */
    int32_t *total; /* [L] */
} epc_ll_tables;

static __device__ bool epc_gather_bitmaps(const epc_ll_params *p, const epc_call *call,
                                          epc_ll_tables *tables)
{
    int per_source = p->num_local * p->words, words = p->comm.num_ranks * per_source;
    bool ok = true, book = p->wait_cost && blockIdx.x == 0;
    for (int i = (int)threadIdx.x; i < words; i += (int)blockDim.x) {
        int s = i / per_source, local = i % per_source / p->words;
        uint32_t value = 0;
        const uint64_t *word = epc_bits_at(p, p->comm.rank, s, local) + i % p->words;
        if (book && i % per_source == 0 && !epc_is_masked(&p->comm, s)) /* one thread a source */
            p->wait_cost[s * p->wait_cost_stride] +=
                epc_time_wait(call, s, (const uint32_t *)word + 1);
        if (!epc_is_masked(&p->comm, s))
            ok &= epc_wait_word(call, s, word, &value);
        tables->bits[i] = value;
    }
    return __syncthreads_and(ok);
}

/* Rows before each pair within its expert, and the expert's total. */
static __device__ void epc_count_pairs(const epc_ll_params *p, epc_ll_tables *tables)
{
    int ranks = p->comm.num_ranks;
    for (int i = (int)threadIdx.x; i < p->num_local * ranks; i += (int)blockDim.x) {
        const uint32_t *word = tables->bits + ((i % ranks) * p->num_local + i / ranks) * p->words;
        int count = 0;
        for (int w = 0; w < p->words; w++)
            count += __popc(word[w]);
        tables->start[i] = count;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < p->num_local * ranks; i += (int)blockDim.x) {
        int before = 0, l = i / ranks;
#pragma unroll 8
        for (int j = l * ranks; j < i; j++)
            before += tables->start[j];
        tables->first[i] = before;
        if (i % ranks == ranks - 1)
            tables->total[l] = before + tables->start[i];
    }
    __syncthreads();
}

static __device__ __forceinline__ int epc_kept(const epc_ll_params *p, int rows)
{
    return rows < p->expert_rows ? rows : p->expert_rows;
}

/* Rows before each pair among all. An expert keeps the first S. */
static __device__ void epc_place_pairs(const epc_ll_params *p, epc_ll_tables *tables)
{
    int ranks = p->comm.num_ranks;
    if (epc_warp() == 0) {
        int done = 0;
        for (int base = 0; base < p->num_local; base += EPC_WARP) {
            int l = base + epc_lane(), kept = l < p->num_local ? epc_kept(p, tables->total[l]) : 0;
            int sum = kept;
            for (int step = 1; step < EPC_WARP; step *= 2) {
                int other = __shfl_up_sync(EPC_ALL, sum, step);
                sum += epc_lane() >= step ? other : 0;
            }
            if (l < p->num_local)
                tables->start[l * ranks] = done + sum - kept;
            done += __shfl_sync(EPC_ALL, sum, EPC_WARP - 1);
        }
        if (epc_lane() == 0)
            tables->start[p->num_local * ranks] = done;
    }
    __syncthreads();
    for (int i = (int)threadIdx.x; i < p->num_local * ranks; i += (int)blockDim.x)
        if (i % ranks)
            tables->start[i] = tables->start[i - i % ranks] + epc_kept(p, tables->first[i]);
    __syncthreads();
}

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

/* The n-th set bit of a bitmap. */
static __device__ int epc_nth_bit(const uint32_t *word, int n)
{
    int w = 0;
    for (;; w++) {
        int count = __popc(word[w]);
        if (n < count)
            break;
        n -= count;
    }
    return w * 32 + (int)__fns(word[w], 0, n + 1);
}

static __device__ __forceinline__ void epc_copy_bytes(uint8_t *to, const uint8_t *from,
                                                      int64_t bytes)
{
    if (bytes % 16 == 0) {
        for (int64_t base = 0; base < bytes / 16; base += 8 * EPC_WARP) {
            int4 v[8];
#pragma unroll
            for (int u = 0; u < 8; u++) {
                int64_t i = base + epc_lane() + u * EPC_WARP;
                if (i < bytes / 16)
                    v[u] = epc_load16(from + i * 16);
            }
#pragma unroll
            for (int u = 0; u < 8; u++) {
                int64_t i = base + epc_lane() + u * EPC_WARP;
                if (i < bytes / 16)
                    ((int4 *)to)[i] = v[u];
            }
        }
        return;
    }
    for (int64_t i = epc_lane(); i < bytes / 8; i += EPC_WARP) /* hidden is a multiple of 8 */
        ((int2 *)to)[i] = epc_load8(from + i * 8);
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
    return __syncthreads_and(ok);
}

/* A row to fetch. */
typedef struct epc_ll_row {
    int source, token, expert; /* expert: local */
    int64_t row;               /* of the result */
} epc_ll_row;

static __device__ epc_ll_row epc_find_row(const epc_ll_params *p, const epc_ll_tables *tables,
                                          int item)
{
    int ranks = p->comm.num_ranks, low = 0, high = p->num_local * ranks - 1;
    while (low < high) { /* the last pair that starts at or before the item */
        int middle = (low + high + 1) / 2;
        if (tables->start[middle] <= item)
            low = middle;
        else
            high = middle - 1;
    }
    int n = item - tables->start[low];
    epc_ll_row row;
    row.expert = low / ranks;
    row.source = low % ranks;
    row.token = epc_nth_bit(tables->bits + (row.source * p->num_local + row.expert) * p->words, n);
    row.row = (int64_t)row.expert * p->expert_rows + tables->first[low] + n;
    return row;
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
                   p->row_bytes);
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
            mine = epc_find_row(p, tables, item);
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

/* Verify mode: the rows that this warp has pulled. By value, so that tables stay in registers. */
static __device__ __noinline__ void epc_check_pulled(const epc_ll_params *p, epc_ll_tables tables)
{
    int rows = tables.start[p->num_local * p->comm.num_ranks];
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x);
    for (int item = epc_warp() * (int)gridDim.x + (int)blockIdx.x; item < rows; item += warps) {
        epc_ll_row at = epc_find_row(p, &tables, item);
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

static __device__ void epc_receive_rows(const epc_ll_params *p, const epc_call *call,
                                        uint8_t *memory)
{
    int pairs = p->num_local * p->comm.num_ranks;
    epc_ll_tables tables;
    tables.start = (int32_t *)memory;
    tables.first = tables.start + pairs + 1;
    tables.total = tables.first + pairs;
    tables.bits = (uint32_t *)(tables.total + p->num_local);
    if (!epc_gather_bitmaps(p, call, &tables))
        return epc_leave_empty(p);
    bool fit = !p->overflow_fails || epc_experts_fit(p, call);
    epc_count_pairs(p, &tables);
    epc_place_pairs(p, &tables);
    if (blockIdx.x == 0)
        epc_publish_counts(p, call, &tables);
    if (!fit || !epc_pull_rows(p, call, &tables))
        return epc_leave_empty(p);
    if (blockIdx.x == 0)
        epc_add_expert_tokens(p, &tables);
    if (p->verify)
        epc_check_pulled(p, tables);
}

#endif
