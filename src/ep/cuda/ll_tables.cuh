/* SPDX-License-Identifier: MIT */
/* Low latency: which rows a rank receives, and where they go, from the bitmaps of all sources. */
#ifndef EPI_EP_CUDA_LL_TABLES_CUH
#define EPI_EP_CUDA_LL_TABLES_CUH

#include "ep/cuda/ll_call.cuh"

/* In shared memory: bitmaps of this rank's experts from every source, and rows before each pair.
   Where those bitmaps have no room there they stay in the area, and their marks take their place:
   STAY. */
typedef struct epc_ll_tables {
    uint32_t *bits; /* [R, L, W], or [R, L, marks] */
    int32_t *start; /* [L * R + 1] first of each (expert, source)'s among all rows kept */
    int32_t *first; /* [L * R] row within the expert */
    int32_t *total; /* [L] */
} epc_ll_tables;

template <bool STAY>
static __device__ __forceinline__ const uint32_t *epc_bits_of(const epc_ll_params *p,
                                                              const epc_ll_tables *tables,
                                                              int source, int local)
{
    int words = STAY ? EPC_MARKS(p->words) : p->words;
    return tables->bits + (source * p->num_local + local) * words;
}

/* Bitmaps that stay: a warp waits for one of them, and marks it. */
static __device__ bool epc_mark_bitmaps(const epc_ll_params *p, const epc_call *call,
                                        epc_ll_tables *tables)
{
    int pairs = p->comm.num_ranks * p->num_local, marks = EPC_MARKS(p->words);
    bool ok = true, book = p->wait_cost && blockIdx.x == 0 && epc_lane() == 0;
    for (int i = epc_warp(); i < pairs; i += (int)blockDim.x / EPC_WARP) {
        int s = i / p->num_local, local = i % p->num_local;
        bool masked = epc_is_masked(&p->comm, s);
        const uint64_t *word = epc_bits_at(p, p->comm.rank, s, local);
        if (book && local == 0 && !masked)
            p->wait_cost[s * p->wait_cost_stride] +=
                epc_time_wait(call, s, (const uint32_t *)word + 1);
        for (int m = 0; m < marks; m++) {
            uint32_t value = 0;
            int w = m * EPC_MARK + epc_lane();
            if (w < p->words && !masked)
                ok &= epc_wait_word(call, s, word + w, &value);
            uint32_t count = __reduce_add_sync(EPC_ALL, (uint32_t)__popc(value));
            if (epc_lane() == 0)
                tables->bits[i * marks + m] = count;
        }
    }
    return __syncthreads_and(ok);
}

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
template <bool STAY>
static __device__ void epc_count_pairs(const epc_ll_params *p, epc_ll_tables *tables)
{
    int ranks = p->comm.num_ranks;
    for (int i = (int)threadIdx.x; i < p->num_local * ranks; i += (int)blockDim.x) {
        const uint32_t *word = epc_bits_of<STAY>(p, tables, i % ranks, i / ranks);
        int count = 0;
        for (int w = 0; w < (STAY ? EPC_MARKS(p->words) : p->words); w++)
            count += STAY ? (int)word[w] : __popc(word[w]);
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

/* The n-th set bit of a word. */
static __device__ __forceinline__ int epc_nth_of_word(uint32_t left, int n)
{
    int at = 0;
#pragma unroll
    for (int half = 16; half; half /= 2) {
        int count = __popc(left & ((1u << half) - 1));
        if (n >= count) {
            n -= count;
            left >>= half;
            at += half;
        }
    }
    return at;
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
    return w * 32 + epc_nth_of_word(word[w], n);
}

/* The same of one that stays in the area. */
static __device__ int epc_nth_bit_there(const uint32_t *mark, const uint64_t *word, int n)
{
    int m = 0;
    for (; n >= (int)mark[m]; m++)
        n -= (int)mark[m];
    for (int w = m * EPC_MARK;; w++) {
        uint32_t value = (uint32_t)epc_load_word(word + w);
        int count = __popc(value);
        if (n < count)
            return w * 32 + epc_nth_of_word(value, n);
        n -= count;
    }
}

template <bool STAY>
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
    const uint32_t *bits = epc_bits_of<STAY>(p, tables, row.source, row.expert);
    if (STAY)
        row.token =
            epc_nth_bit_there(bits, epc_bits_at(p, p->comm.rank, row.source, row.expert), n);
    else
        row.token = epc_nth_bit(bits, n);
    row.row = (int64_t)row.expert * p->expert_rows + tables->first[low] + n;
    return row;
}

#endif
