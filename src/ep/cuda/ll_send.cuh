/* SPDX-License-Identifier: MIT */
/* Low latency: a rank puts its tokens into its own area, and tells who gets which. */
#ifndef EPI_EP_CUDA_LL_SEND_CUH
#define EPI_EP_CUDA_LL_SEND_CUH

#include "ep/cuda/ll_call.cuh"
#include "ep/cuda/ll_overflow.cuh"
#include "ep/cuda/ll_verify.cuh"
#include "ep/cuda/quantise.cuh"

/* The expert that a pair names. */
static __device__ __forceinline__ int64_t epc_id_at(const epc_ll_params *p, int t, int k)
{
    int64_t at = t * p->id_stride + k;
    return p->id_bytes == 8 ? ((const int64_t *)p->ids)[at] : ((const int32_t *)p->ids)[at];
}

/* The expert of this thread's first pair, and where the first word of a bitmap that it pushes
   goes (NULL: to nobody): asked for before there is anything to wait for. */
typedef struct epc_ll_first {
    int64_t id;
    uint64_t *word;
} epc_ll_first;

static __device__ __forceinline__ uint64_t *epc_bitmap_word(const epc_ll_params *p, int i)
{
    int blocks = (int)gridDim.x, block = (int)blockIdx.x, e = i / p->words * blocks + block;
    if (e >= p->num_experts)
        return NULL;
    int rank = p->expert_rank[e], local = p->expert_local[e];
    return epc_is_masked(&p->comm, rank) ? NULL
                                         : epc_bits_at(p, rank, p->comm.rank, local) + i % p->words;
}

static __device__ __forceinline__ epc_ll_first epc_look_ahead(const epc_ll_params *p)
{
    epc_ll_first first = {-1, NULL};
    int i = (int)threadIdx.x;
    if (i < p->num_tokens * p->topk)
        first.id = epc_id_at(p, i / p->topk, i % p->topk);
    first.word = epc_bitmap_word(p, i);
    return first;
}

/* The experts of block b are those with e % blocks == b: each block makes their bitmaps from all
   ids, so that no block has to wait for another. The slot's last tokens must have been read before
   any of it is seen; false: they never will be. */
static __device__ bool epc_make_bitmaps(const epc_ll_params *p, const epc_call *call, int64_t first,
                                        uint32_t *bits)
{
    int blocks = (int)gridDim.x, block = (int)blockIdx.x, pairs = p->num_tokens * p->topk;
    int mine = (p->num_experts - block + blocks - 1) / blocks;
    for (int i = (int)threadIdx.x; i < mine * p->words; i += (int)blockDim.x)
        bits[i] = 0;
    __syncthreads();
    for (int i = (int)threadIdx.x; i < pairs; i += (int)blockDim.x) {
        int t = i / p->topk, k = i % p->topk;
        int64_t id = i == (int)threadIdx.x ? first : epc_id_at(p, t, k);
        if (id < -1 || id >= p->num_experts) {
            epc_fail_call(call->state, EPC_FAIL_ID, (uint32_t)t, (uint32_t)k, (uint32_t)id,
                          (uint32_t)(id >> 32), (uint32_t)p->num_experts);
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
    return epc_await_before(call, epc_ll_flag_of(p, EPC_LL_PULLED));
}

/* Where each pair's row is among this rank's for the expert. */
static __device__ void epc_find_positions(const epc_ll_params *p, int64_t first,
                                          const uint32_t *bits)
{
    int blocks = (int)gridDim.x, pairs = p->num_tokens * p->topk;
    for (int i = (int)threadIdx.x; i < pairs; i += (int)blockDim.x) {
        int t = i / p->topk;
        int64_t id = i == (int)threadIdx.x ? first : epc_id_at(p, t, i % p->topk);
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
                                        uint64_t *first, const uint32_t *bits)
{
    int blocks = (int)gridDim.x, block = (int)blockIdx.x;
    int mine = (p->num_experts - block + blocks - 1) / blocks;
    for (int i = (int)threadIdx.x; i < mine * p->words; i += (int)blockDim.x) {
        uint64_t *word = i == (int)threadIdx.x ? first : epc_bitmap_word(p, i);
        if (word)
            epc_store_word(word, bits[i], call->epoch);
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

/* This rank's half of a dispatch. MANY: bitmaps may lie on the device. */
template <bool MANY>
static __device__ void epc_send_tokens(const epc_ll_params *p, const epc_call *call, uint32_t *bits)
{
    if (p->refused) {
        epc_fail_call(call->state, EPC_FAIL_REFUSED, p->refused, 0, 0, 0, 0);
        return;
    }
    int experts = (p->num_experts + (int)gridDim.x - 1) / (int)gridDim.x;
    if (MANY && p->far_bits)
        bits = p->far_bits + (int64_t)blockIdx.x * experts * p->words;
    epc_ll_first first = epc_look_ahead(p);
    if (!epc_make_bitmaps(p, call, first.id, bits))
        return;
    epc_push_bitmaps(p, call, first.word, bits);
    if (p->overflow_fails)
        epc_push_expert_counts(p, call, bits);
    epc_find_positions(p, first.id, bits);
    epc_put_tokens(p);
}

/* One thread a rank: the rows are there, or never will be. */
static __device__ uint32_t epc_announce(const epc_ll_params *p, const epc_call *call, int flag)
{
    if (p->verify)
        epc_ll_seal_tokens(p);
    uint32_t fail = epc_load_gpu(&call->state->fail);
    int r = (int)threadIdx.x;
    if (r < p->comm.num_ranks && !epc_is_masked(&p->comm, r))
        epc_raise(call, r, epc_ll_flag_of(p, flag), fail != EPC_OK ? epc_why(call) : 0);
    __syncthreads();
    return fail;
}

#endif
