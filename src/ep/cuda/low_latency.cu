/* SPDX-License-Identifier: MIT */
/*
 * Low latency: four kernels. A sender puts its tokens once into its own window,
 * narrow as the wire wants them, and pushes one bitmap of tokens per expert to
 * the expert's rank; the receiver reads the rows it wants straight into the
 * packed result. Combine is the mirror: outputs stay at the expert's rank, and
 * the token's owner reads and sums them.
 */
#include "ep/cuda/combine.cuh"
#include "ep/cuda/kernels.h"
#include "ep/cuda/ll_logfmt.cuh"

static __device__ __forceinline__ uint8_t *epc_area_at(const epc_ll_params *p, int rank)
{
    return epc_memory_at(&p->comm, rank, p->place[rank], p->offset[rank]);
}

static __device__ __forceinline__ uint64_t *epc_bits_at(const epc_ll_params *p, int owner,
                                                        int source, int local)
{
    return (uint64_t *)(epc_area_at(p, owner) + p->area.bits) +
           ((int64_t)source * p->max_local + local) * p->words;
}

static __device__ epc_call epc_begin_ll(const epc_ll_params *p, uint32_t epoch, int abort_flag)
{
    epc_call call;
    call.comm = &p->comm;
    call.state = p->comm.state;
    call.epoch = epoch;
    call.abort_flag = EPC_FLAG_LL + p->slot * EPC_LL_FLAGS + abort_flag;
    call.deadline = epc_now_ns() + (uint64_t)p->timeout_ns;
    return call;
}

static __device__ __forceinline__ int epc_ll_flag_of(const epc_ll_params *p, int flag)
{
    return EPC_FLAG_LL + p->slot * EPC_LL_FLAGS + flag;
}

/* By the first threads of a block: every rank's `flag` at the call's epoch. */
static __device__ bool epc_await_all(const epc_call *call, int flag)
{
    int r = (int)threadIdx.x;
    bool ok = true;
    if (r < call->comm->num_ranks && !epc_is_masked(call->comm, r))
        ok = epc_wait_flag(call, r, epc_flag_at(call->comm, call->comm->rank, r, flag));
    return __syncthreads_and(ok);
}

/* Ends a kernel: the last block raises `flag` at every rank and reports; true in it. */
static __device__ bool epc_finish_ll(const epc_ll_params *p, const epc_call *call, int flag,
                                     bool wait)
{
    if (!epc_is_last_to_add(&call->state->exited))
        return false;
    uint32_t fail = epc_load_gpu(&call->state->fail);
    int r = (int)threadIdx.x;
    if (r < p->comm.num_ranks && !epc_is_masked(&p->comm, r)) {
        epc_raise(call, r, flag, fail != EPC_OK);
        if (wait && fail == EPC_OK)
            epc_await_peer(call, r, flag);
    }
    __syncthreads();
    if (threadIdx.x == 0)
        epc_report_end(call->state, p->report, p->serial);
    return true;
}

/* ---------------------------------------------------------------- send */

/* The expert that a pair names. */
static __device__ __forceinline__ int64_t epc_id_at(const epc_ll_params *p, int t, int k)
{
    int64_t at = t * p->id_stride + k;
    return p->id_bytes == 8 ? ((const int64_t *)p->ids)[at] : ((const int32_t *)p->ids)[at];
}

/* The experts of block b are those with e % blocks == b: each block makes their bitmaps from all
   ids, so that no block has to wait for another. The slot's last tokens must have been read before
   any of it is seen; false: they never will be. */
static __device__ bool epc_make_bitmaps(const epc_ll_params *p, const epc_call *call,
                                        uint32_t *bits)
{
    int blocks = (int)gridDim.x, block = (int)blockIdx.x, pairs = p->num_tokens * p->topk;
    int mine = (p->num_experts - block + blocks - 1) / blocks;
    for (int i = (int)threadIdx.x; i < mine * p->words; i += (int)blockDim.x)
        bits[i] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < pairs; i += (int)blockDim.x) {
        int t = i / p->topk, k = i % p->topk;
        int64_t id = epc_id_at(p, t, k);
        if (id < -1 || id >= p->num_experts) {
            epc_fail_call(call->state, EPC_FAIL_ID, (uint32_t)t, (uint32_t)k, (uint32_t)id,
                          (uint32_t)(id >> 32), 0);
            id = -1;
        }
        if (id >= 0 && p->comm.masked && epc_is_masked(&p->comm, p->expert_rank[id]))
            id = -1;
        if (block == 0)
            p->saved_ids[i] = (int32_t)id;
        if (id < 0 || id % blocks != block)
            continue;
        uint32_t before = atomicOr(&bits[id / blocks * p->words + t / 32], 1u << t % 32);
        if (p->verify && (before >> t % 32 & 1))
            epc_fail_call(call->state, EPC_FAIL_DUPLICATE, (uint32_t)t, (uint32_t)k, (uint32_t)id,
                          0, 0);
    }
    epc_call before = *call;
    before.epoch--;
    return epc_await_all(&before, epc_ll_flag_of(p, EPC_LL_PULLED));
}

/* Where each pair's row is among this rank's for the expert. */
static __device__ void epc_find_positions(const epc_ll_params *p, const uint32_t *bits)
{
    int blocks = (int)gridDim.x, pairs = p->num_tokens * p->topk;
    for (int i = (int)threadIdx.x; i < pairs; i += (int)blockDim.x) {
        int t = i / p->topk;
        int64_t id = epc_id_at(p, t, i % p->topk);
        if (id < 0 || id >= p->num_experts || id % blocks != (int)blockIdx.x)
            continue;
        const uint32_t *word = bits + id / blocks * p->words;
        int before = __popc(word[t / 32] & ((1u << t % 32) - 1));
        for (int w = 0; w < t / 32; w++)
            before += __popc(word[w]);
        p->position[i] = before;
    }
}

static __device__ void epc_push_bitmaps(const epc_ll_params *p, const epc_call *call,
                                        const uint32_t *bits)
{
    int blocks = (int)gridDim.x, block = (int)blockIdx.x;
    int mine = (p->num_experts - block + blocks - 1) / blocks;
    for (int i = (int)threadIdx.x; i < mine * p->words; i += (int)blockDim.x) {
        int e = i / p->words * blocks + block, w = i % p->words, rank = p->expert_rank[e];
        if (!epc_is_masked(&p->comm, rank))
            epc_store_word(epc_bits_at(p, rank, p->comm.rank, p->expert_local[e]) + w, bits[i],
                           call->epoch);
    }
}

/* Sixteen channels of a lane, of a row that may start at any element. */
static __device__ __forceinline__ epc_raw epc_load_token(const uint8_t *x, int at, int hidden)
{
    if ((uint64_t)x % 16 == 0)
        return epc_load_raw(x, at, hidden);
    epc_raw raw;
    uint32_t word[8];
    for (int i = 0; i < 8; i++) {
        int h = at + 2 * i;
        word[i] = h < hidden
                      ? ((const uint16_t *)x)[h] | (uint32_t)((const uint16_t *)x)[h + 1] << 16
                      : 0;
    }
    raw.half[0] = make_uint4(word[0], word[1], word[2], word[3]);
    raw.half[1] = make_uint4(word[4], word[5], word[6], word[7]);
    return raw;
}

static __device__ __forceinline__ void epc_put_part(const epc_ll_params *p, uint8_t *area, int t,
                                                    int first, epc_raw raw)
{
    uint8_t *row = area + p->area.rows + t * p->row_bytes;
    if (p->quantise) {
        epc_codes codes = epc_quantise_raw(raw, p->scale_kind);
        epc_put_codes(&codes, row, first, p->hidden);
        epc_put_scales(&codes, (uint32_t *)(area + p->area.scales) + (int64_t)t * p->scale_count,
                       first, p->hidden, p->scale_kind);
        return;
    }
    int at = first + epc_lane() * 16;
    uint4 *to = (uint4 *)(row + (int64_t)at * 2);
    if (at < p->hidden)
        to[0] = raw.half[0];
    if (at + 8 < p->hidden)
        to[1] = raw.half[1];
}

#define EPC_PARTS 2 /* of a warp on their way at once */

/* Tokens into this rank's own area: a warp takes 512 channels of each of some. */
static __device__ void epc_put_tokens(const epc_ll_params *p)
{
    uint8_t *area = epc_area_at(p, p->comm.rank);
    int parts = (p->hidden + EPC_QUANT_CHANNELS - 1) / EPC_QUANT_CHANNELS;
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x), items = p->num_tokens * parts;
    int item = epc_warp() * (int)gridDim.x + (int)blockIdx.x;
    for (; item < items; item += EPC_PARTS * warps) {
        epc_raw raw[EPC_PARTS];
#pragma unroll
        for (int u = 0; u < EPC_PARTS; u++) {
            int i = item + u * warps;
            if (i < items)
                raw[u] =
                    epc_load_token(p->x + i / parts * p->x_stride,
                                   i % parts * EPC_QUANT_CHANNELS + epc_lane() * 16, p->hidden);
        }
#pragma unroll
        for (int u = 0; u < EPC_PARTS; u++) {
            int i = item + u * warps;
            if (i < items)
                epc_put_part(p, area, i / parts, i % parts * EPC_QUANT_CHANNELS, raw[u]);
        }
    }
}

/* This rank's half of a dispatch. */
static __device__ void epc_send_tokens(const epc_ll_params *p, const epc_call *call, uint32_t *bits)
{
    if (p->refused) {
        epc_fail_call(call->state, EPC_FAIL_REFUSED, 0, 0, 0, 0, 0);
        return;
    }
    bool ok = epc_make_bitmaps(p, call, bits);
    if (!ok)
        return;
    epc_push_bitmaps(p, call, bits);
    epc_find_positions(p, bits);
    epc_put_tokens(p);
}

/* One thread a rank: the rows are there, or never will be. */
static __device__ uint32_t epc_announce(const epc_ll_params *p, const epc_call *call, int flag)
{
    uint32_t fail = epc_load_gpu(&call->state->fail);
    int r = (int)threadIdx.x;
    if (r < p->comm.num_ranks && !epc_is_masked(&p->comm, r))
        epc_raise(call, r, epc_ll_flag_of(p, flag), fail != EPC_OK);
    __syncthreads();
    return fail;
}

__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_send_kernel(const __grid_constant__ epc_ll_params p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_epoch[p.slot] + 1, EPC_LL_ABORT);
    epc_send_tokens(&p, &call, (uint32_t *)memory);
    if (!epc_is_last_to_add(&call.state->exited))
        return;
    uint32_t fail = epc_announce(&p, &call, EPC_LL_ROWS);
    if (threadIdx.x == 0) {
        epc_report_end(call.state, p.report, 0);
        call.state->ll_epoch[p.slot] = call.epoch;
        if (fail)
            call.state->ll_failed[p.slot] = call.epoch;
    }
}

/* ---------------------------------------------------------------- receive */

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
    bool ok = true;
    for (int i = (int)threadIdx.x; i < words; i += (int)blockDim.x) {
        int s = i / per_source, local = i % per_source / p->words;
        uint32_t value = 0;
        if (!epc_is_masked(&p->comm, s))
            ok &= epc_wait_word(call, s, epc_bits_at(p, p->comm.rank, s, local) + i % p->words,
                                &value);
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

/* Block 0: counts and ranges of the result; where each source's rows begin goes back to it. */
static __device__ void epc_publish_counts(const epc_ll_params *p, const epc_call *call,
                                          const epc_ll_tables *tables)
{
    int ranks = p->comm.num_ranks, me = p->comm.rank;
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
        if (p->expert_tokens)
            p->expert_tokens[l * p->expert_tokens_stride] += kept;
        if (total > kept && !p->overflow_drops)
            epc_fail_call(call->state, EPC_FAIL_CAPACITY, (uint32_t)me, (uint32_t)total, 0,
                          (uint32_t)p->expert_rows, (uint32_t)l);
    }
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
        uint64_t since = epc_now_ns();
        const uint32_t *flag =
            epc_flag_at(&p->comm, p->comm.rank, r, epc_ll_flag_of(p, EPC_LL_ROWS));
        ok = epc_wait_flag(call, r, flag);
        if (epc_load_flag(epc_flag_at(&p->comm, p->comm.rank, r, call->abort_flag)) ==
            call->epoch) {
            ok = false;
            epc_fail_call(call->state, EPC_FAIL_ABORTED, (uint32_t)r, 0, 0, 0, 0);
        }
        if (p->wait_cost && blockIdx.x == 0)
            p->wait_cost[r * p->wait_cost_stride] += (int64_t)(epc_now_ns() - since);
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
   next ones, a lane each, before they are there. */
static __device__ void epc_pull_rows(const epc_ll_params *p, const epc_call *call,
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
            return;
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
    epc_count_pairs(p, &tables);
    epc_place_pairs(p, &tables);
    if (blockIdx.x == 0)
        epc_publish_counts(p, call, &tables);
    epc_pull_rows(p, call, &tables);
}

__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_recv_kernel(const __grid_constant__ epc_ll_params p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_epoch[p.slot], EPC_LL_ABORT);
    bool sent = p.comm.state->ll_failed[p.slot] != call.epoch;
    if (sent)
        epc_receive_rows(&p, &call, memory);
    else
        epc_leave_empty(&p);
    if (!sent && threadIdx.x == 0 && blockIdx.x == 0) /* the send's report says why: it stands */
        epc_fail_call(call.state, p.report->fail ? p.report->fail : EPC_FAIL_ABORTED,
                      p.report->detail[0], p.report->detail[1], p.report->detail[2],
                      p.report->detail[3], p.report->detail[4]);
    epc_finish_ll(&p, &call, epc_ll_flag_of(&p, EPC_LL_PULLED), false);
}

/* Both halves in one launch, for calls that no hook divides. */
__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_dispatch_kernel(const __grid_constant__ epc_ll_params p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_epoch[p.slot] + 1, EPC_LL_ABORT);
    epc_send_tokens(&p, &call, (uint32_t *)memory);
    if (epc_is_last_to_add(&call.state->arrived))
        epc_announce(&p, &call, EPC_LL_ROWS);
    __syncthreads(); /* the bitmaps made way for those received */
    epc_receive_rows(&p, &call, memory);
    if (epc_finish_ll(&p, &call, epc_ll_flag_of(&p, EPC_LL_PULLED), false) && threadIdx.x == 0)
        call.state->ll_epoch[p.slot] = call.epoch;
}

/* ---------------------------------------------------------------- combine */

/* Expert outputs that peers can't read where they are, or that go encoded, to the area. */
static __device__ void epc_pack_outputs(const epc_ll_params *p)
{
    uint8_t *area = epc_area_at(p, p->comm.rank) + p->area.y;
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x),
        item = epc_warp() * (int)gridDim.x + (int)blockIdx.x;
    int64_t stride = p->encode ? p->encoded_stride : (int64_t)p->hidden * 2;
    int64_t before = 0;
    for (int l = 0; l < p->num_local; l++) {
        int count = p->count[l];
        for (; item < before + count; item += warps) {
            int i = (int)(item - before);
            const uint8_t *from = p->y + l * p->y_expert_stride + i * p->y_row_stride;
            uint8_t *to = area + ((int64_t)l * p->expert_rows + i) * stride;
            if (p->encode)
                epc_logfmt_encode_row(from, p->hidden, to);
            else if ((uint64_t)from % 16 == 0)
                epc_copy_bytes(to, from, stride);
            else
                for (int h = epc_lane(); h < p->hidden; h += EPC_WARP)
                    ((uint16_t *)to)[h] = ((const uint16_t *)from)[h];
        }
        before += count;
    }
}

static __device__ void epc_prepare_outputs(const epc_ll_params *p, const epc_call *call)
{
    epc_call before = *call;
    before.epoch--;
    if (p->refused)
        epc_fail_call(call->state, EPC_FAIL_REFUSED, 0, 0, 0, 0, 0);
    else if (p->y && epc_await_all(&before, epc_ll_flag_of(p, EPC_LL_READ)))
        epc_pack_outputs(p);
}

/* Where the outputs are, and that they may be read; by one block. What kernels before or other
   blocks wrote is ahead of the flags, which release it. */
static __device__ void epc_announce_outputs(const epc_ll_params *p, const epc_call *call)
{
    int ranks = p->comm.num_ranks, r = (int)threadIdx.x;
    int i = r - (ranks + EPC_WARP - 1) / EPC_WARP * EPC_WARP; /* warps behind those of the flags */
    bool failed = (p->y || p->refused) && epc_load_gpu(&call->state->fail) != EPC_OK;
    if (r < ranks && !epc_is_masked(&p->comm, r))
        epc_raise(call, r, epc_ll_flag_of(p, EPC_LL_Y), failed);
    for (; i < ranks * EPC_Y_FIELDS; i += (int)blockDim.x)
        if (i >= 0 && !epc_is_masked(&p->comm, i / EPC_Y_FIELDS))
            epc_store_word((uint64_t *)(epc_area_at(p, i / EPC_Y_FIELDS) + p->area.fields) +
                               p->comm.rank * EPC_Y_FIELDS + i % EPC_Y_FIELDS,
                           failed ? EPC_Y_FAILED : p->field[i % EPC_Y_FIELDS], call->epoch);
}

__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_outputs_kernel(const __grid_constant__ epc_ll_params p)
{
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_combine[p.slot] + 1, EPC_LL_ABORT_Y);
    epc_prepare_outputs(&p, &call);
    if (!epc_is_last_to_add(&call.state->exited))
        return;
    epc_announce_outputs(&p, &call);
    __syncthreads();
    if (threadIdx.x == 0) {
        epc_report_end(call.state, p.report, 0);
        call.state->ll_combine[p.slot] = call.epoch;
    }
}

/* Where every rank has its outputs: a thread waits for each word, and for each flag. */
static __device__ bool epc_gather_outputs(const epc_ll_params *p, const epc_call *call,
                                          epc_combine_sources *from, bool ok)
{
    __shared__ uint32_t field[EPC_MAX_RANKS][EPC_Y_FIELDS];
    const uint64_t *words = (const uint64_t *)(epc_area_at(p, p->comm.rank) + p->area.fields);
    int each = EPC_Y_FIELDS + 1;
    for (int i = (int)threadIdx.x; i < p->comm.num_ranks * each; i += (int)blockDim.x) {
        int r = i / each, f = i % each;
        if (epc_is_masked(&p->comm, r))
            continue;
        if (f < EPC_Y_FIELDS) {
            ok &= epc_wait_word(call, r, words + r * EPC_Y_FIELDS + f, &field[r][f]);
            continue;
        }
        bool cost = p->wait_cost && blockIdx.x == 0;
        uint64_t since = cost ? epc_now_ns() : 0;
        ok &= epc_wait_flag(call, r,
                            epc_flag_at(&p->comm, p->comm.rank, r, epc_ll_flag_of(p, EPC_LL_Y)));
        if (cost)
            p->wait_cost[r * p->wait_cost_stride] += (int64_t)(epc_now_ns() - since);
    }
    if (!__syncthreads_and(ok))
        return false;
    int r = (int)threadIdx.x;
    if (r < p->comm.num_ranks && !epc_is_masked(&p->comm, r)) {
        const uint32_t *f = field[r];
        ok = f[EPC_Y_ENCODED] == (uint32_t)p->encode;
        if (f[EPC_Y_ENCODED] == EPC_Y_FAILED) {
            epc_fail_call(call->state, EPC_FAIL_ABORTED, (uint32_t)r, 0, 0, 0, 0);
        } else if (!ok) {
            epc_fail_call(call->state, EPC_FAIL_MISMATCH, EPC_AGREED, (uint32_t)p->comm.rank,
                          (uint32_t)r, (uint32_t)p->encode, f[EPC_Y_ENCODED]);
        }
        int64_t offset = (int64_t)((uint64_t)f[EPC_Y_OFFSET_HI] << 32 | f[EPC_Y_OFFSET_LO]);
        from->y[r] = ok ? epc_memory_at(&p->comm, r, f[EPC_Y_PLACE], offset) : NULL;
        from->stride[r] = f[EPC_Y_STRIDE];
    }
    return __syncthreads_and(ok);
}

/* Verify mode: the ids must be those of the dispatch. */
static __device__ __noinline__ void epc_check_id(const epc_ll_params *p, const epc_call *call,
                                                 int t, int k, int id)
{
    int64_t now = epc_id_at(p, t, k);
    if (now != id && !(id < 0 && now >= 0 && now < p->num_experts &&
                       epc_is_masked(&p->comm, p->expert_rank[now])))
        epc_fail_call(call->state, EPC_FAIL_ID, (uint32_t)t, (uint32_t)k, (uint32_t)now,
                      (uint32_t)(now >> 32), 1);
}

/* Where each (token, place) of this block's has its row; false in the threads that could not
   learn it. */
static __device__ bool epc_list_rows(const epc_ll_params *p, const epc_call *call,
                                     epc_entry *entries)
{
    const uint64_t *begin = (const uint64_t *)(epc_area_at(p, p->comm.rank) + p->area.begin);
    epc_call dispatch = *call;
    dispatch.epoch = p->comm.state->ll_epoch[p->slot];
    bool ok = true;
    for (int i = (int)threadIdx.x;; i += (int)blockDim.x) {
        int t = i / p->topk * (int)gridDim.x + (int)blockIdx.x, k = i % p->topk;
        if (t >= p->num_tokens)
            break;
        int id = p->saved_ids[t * p->topk + k], position = p->position[t * p->topk + k];
        epc_entry entry = -1;
        if (p->verify)
            epc_check_id(p, call, t, k, id);
        if (id >= 0) {
            int rank = p->expert_rank[id], local = p->expert_local[id];
            uint32_t first = 0;
            if (!epc_is_masked(&p->comm, rank)) {
                ok &= epc_wait_word(&dispatch, rank, begin + id, &first);
                int64_t row = (int64_t)first + position;
                if (row < p->expert_rows)
                    entry = (epc_entry)((uint64_t)(uint32_t)rank << 32 |
                                        (uint32_t)((int64_t)local * p->expert_rows + row));
            }
        }
        entries[i] = entry;
    }
    return ok;
}

static __device__ epc_combine_rows epc_ll_rows_of(const epc_ll_params *p,
                                                  const epc_combine_sources *from,
                                                  const epc_entry *entries)
{
    epc_combine_rows rows;
    rows.from = from;
    rows.entries = entries;
    rows.own = 1;
    rows.width = p->topk;
    rows.num_tokens = p->num_tokens;
    rows.hidden = p->hidden;
    rows.weights = p->weights;
    rows.weight_stride = p->weight_stride;
    rows.bias[0] = rows.bias[1] = NULL;
    rows.bias_stride[0] = rows.bias_stride[1] = 0;
    rows.out = p->out;
    rows.out_stride = p->out_stride;
    rows.row_bytes = (int64_t)p->hidden * 2;
    rows.pieces = p->pieces;
    rows.piece_bytes = p->piece_bytes;
    rows.slots = p->slots;
    return rows;
}

static __device__ void epc_sum_outputs(const epc_ll_params *p, const epc_call *call,
                                       epc_combine_sources *from, uint8_t *memory)
{
    int most = (p->num_tokens + (int)gridDim.x - 1) / (int)gridDim.x * p->topk; /* of a block */
    epc_entry *entries = p->entries ? p->entries + (int64_t)blockIdx.x * most : (epc_entry *)memory;
    if (!p->entries)
        memory += (most * (int)sizeof *entries + 127) / 128 * 128;
    bool ok = epc_list_rows(p, call, entries);
    if (!epc_gather_outputs(p, call, from, ok))
        return;
    epc_combine_rows rows = epc_ll_rows_of(p, from, entries);
    uint64_t bits = 0;
    EPC_EACH_RANK(r, p->comm.num_ranks)
    if (!epc_is_masked(&p->comm, r))
        bits |= (uint64_t)from->y[r] | from->stride[r];
    if (p->encode)
        epc_combine_encoded(&rows);
    else if (p->bulk && bits % 16 == 0)
        epc_combine_bulk<EPC_BF16>(&rows, call->state, memory);
    else
        epc_combine_registers<EPC_BF16>(&rows);
}

/* `both`: this launch is the whole call, and announces the outputs too. */
__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_combine_kernel(const __grid_constant__ epc_ll_params p, int both)
{
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ epc_combine_sources from;
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_combine[p.slot] + both, EPC_LL_ABORT_Y);
    if (both) {
        epc_prepare_outputs(&p, &call);
        bool first = p.y ? epc_is_last_to_add(&call.state->arrived) : blockIdx.x == 0;
        if (first)
            epc_announce_outputs(&p, &call);
    }
    if (p.refused)
        epc_fail_call(call.state, EPC_FAIL_REFUSED, 0, 0, 0, 0, 0);
    else
        epc_sum_outputs(&p, &call, &from, memory);
    if (epc_finish_ll(&p, &call, epc_ll_flag_of(&p, EPC_LL_READ), p.outside) && both &&
        threadIdx.x == 0)
        call.state->ll_combine[p.slot] = call.epoch;
}

/* ---------------------------------------------------------------- launches */

static const void *const kernels[] = {
    (const void *)epc_ll_send_kernel, (const void *)epc_ll_recv_kernel,
    (const void *)epc_ll_outputs_kernel, (const void *)epc_ll_combine_kernel,
    (const void *)epc_ll_dispatch_kernel};

extern "C" size_t epc_ll_recv_shared(int ranks, int num_local, int words)
{
    size_t pairs = (size_t)ranks * (size_t)num_local;
    return 4 * (2 * pairs + 1 + (size_t)num_local + pairs * (size_t)words);
}

extern "C" int epc_ll_prepare(int max_shared)
{
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
        cudaError_t error = cudaFuncSetAttribute(
            kernels[i], cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared);
        if (error != cudaSuccess)
            return (int)error;
    }
    return 0;
}

extern "C" int epc_ll_launch(int which, const epc_ll_params *params, int blocks, size_t shared,
                             void *stream)
{
    int both = which == EPC_LL_COMBINE_BOTH;
    void *arguments[] = {(void *)params, &both};
    const void *kernel = kernels[both ? EPC_LL_COMBINE : which];
    return (int)cudaLaunchKernel(kernel, dim3((unsigned)blocks), dim3(EPC_THREADS), arguments,
                                 shared, (cudaStream_t)stream);
}
