/* SPDX-License-Identifier: MIT */
/*
 * LogFMT-10 rows by warps: a lane has 4 channels of a block of 128. The chunks are the bytes of
 * codec/logfmt.h, the heads lie apart, so that no encoded row is longer than the row itself, and
 * one can be encoded where it lies: what is written never gets ahead of what is read.
 */
#ifndef EPI_EP_CUDA_LL_LOGFMT_CUH
#define EPI_EP_CUDA_LL_LOGFMT_CUH

#include "codec/logfmt.h"
#include "ep/cuda/combine.cuh"

#define EPC_LOGFMT_BLOCKS (1024 / EPI_LOGFMT_BLOCK) /* of a chunk, at most */

static __device__ __forceinline__ int epc_logfmt_head(int hidden)
{
    int chunk = (int)epi_logfmt_chunk((size_t)hidden), chunks = (hidden + chunk - 1) / chunk;
    return (chunks + 31) / 32 * 4;
}

/* Four channels of a lane; those past n are zero. */
static __device__ __forceinline__ void epc_load4(const uint16_t *x, int n, uint16_t *v)
{
    for (int j = 0; j < 4; j++)
        v[j] = epc_lane() * 4 + j < n ? x[epc_lane() * 4 + j] : 0;
}

/* Largest and least magnitude of a block, the least as 0xffff when there is none. */
static __device__ __forceinline__ void epc_logfmt_range(const uint16_t *v, uint32_t *amax,
                                                        uint32_t *amin)
{
    uint32_t most = 0, least = 0xffff;
    for (int j = 0; j < 4; j++) {
        uint32_t magnitude = v[j] & 0x7fff;
        most = magnitude > most ? magnitude : most;
        least = magnitude && magnitude < least ? magnitude : least;
    }
    *amax = __reduce_max_sync(EPC_ALL, most);
    *amin = __reduce_min_sync(EPC_ALL, least);
}

static __device__ void epc_logfmt_encode_block(const uint16_t *x, int n, uint8_t *out)
{
    uint16_t v[4];
    uint32_t amax, amin, low = 0, high = 0, sign = 0;
    epc_load4(x, n, v);
    epc_logfmt_range(v, &amax, &amin);
    struct epi_logfmt_grid grid = epi_logfmt_grid_of((uint16_t)amax, (uint16_t)amin);
    for (int j = 0; j < 4; j++) {
        uint32_t code = epi_logfmt_code(&grid, v[j] & 0x7fff);
        low |= (code & 0xff) << 8 * j;
        high |= code >> 8 << j;
        sign |= (uint32_t)(v[j] >> 15) << j;
    }
    high |= __shfl_down_sync(EPC_ALL, high, 1) << 4;
    sign |= __shfl_down_sync(EPC_ALL, sign, 1) << 4;
    if (epc_lane() == 0) {
        ((uint16_t *)out)[0] = (uint16_t)amax;
        ((uint16_t *)out)[1] = (uint16_t)amin;
    }
    if (epc_lane() * 4 >= n)
        return;
    *(uint32_t *)(out + 4 + epc_lane() * 4) = low;
    if (epc_lane() % 2 == 0) {
        out[4 + n + epc_lane() / 2] = (uint8_t)high;
        out[4 + n + n / 8 + epc_lane() / 2] = (uint8_t)sign;
    }
}

/* Whether every block of a chunk lies on a grid, and coding saves bytes. */
static __device__ bool epc_logfmt_codable(const uint16_t *x, int n)
{
    if (epi_logfmt_chunk_bytes((size_t)n) >= (size_t)n * 2)
        return false;
    for (int i = 0; i < n; i += EPI_LOGFMT_BLOCK) {
        uint16_t v[4];
        uint32_t amax, amin;
        epc_load4(x + i, n - i < EPI_LOGFMT_BLOCK ? n - i : EPI_LOGFMT_BLOCK, v);
        epc_logfmt_range(v, &amax, &amin);
        if (amax >= EPI_BF16_ONE || amin >= amax)
            return false;
    }
    return true;
}

/* A chunk as it is, to where it lies or before. */
static __device__ void epc_logfmt_move(const uint16_t *from, int n, uint16_t *to)
{
    for (int first = 0; first < n && to != from; first += EPC_WARP) {
        int i = first + epc_lane();
        uint16_t value = i < n ? from[i] : 0;
        __syncwarp();
        if (i < n)
            to[i] = value;
        __syncwarp();
    }
}

static __device__ void epc_logfmt_encode_row(const uint8_t *row, int hidden, uint32_t *head,
                                             uint8_t *out)
{
    const uint16_t *x = (const uint16_t *)row;
    int chunk = (int)epi_logfmt_chunk((size_t)hidden);
    uint8_t *at = out;
    uint32_t flags = 0;
    for (int c = 0; c * chunk < hidden; c++) {
        const uint16_t *from = x + c * chunk;
        int n = hidden - c * chunk < chunk ? hidden - c * chunk : chunk;
        if (epc_logfmt_codable(from, n)) {
            flags |= 1u << c % 32;
            for (int i = 0; i < n; i += EPI_LOGFMT_BLOCK) {
                int width = n - i < EPI_LOGFMT_BLOCK ? n - i : EPI_LOGFMT_BLOCK;
                epc_logfmt_encode_block(from + i, width, at);
                at += epi_logfmt_block_bytes((size_t)width);
            }
        } else {
            epc_logfmt_move(from, n, (uint16_t *)at);
            at += n * 2;
        }
        if (c % 32 == 31 || (c + 1) * chunk >= hidden) {
            if (epc_lane() == 0)
                head[c / 32] = flags;
            flags = 0;
        }
    }
}

static __device__ __forceinline__ bool epc_logfmt_is_coded(const uint32_t *head, int c, int n)
{
    return (__ldcg(&head[c / 32]) >> c % 32 & 1) &&
           epi_logfmt_chunk_bytes((size_t)n) < (size_t)n * 2;
}

/* Adds weight times one row's chunk to a lane's sums. */
static __device__ void epc_add_chunk(const uint32_t *head, const uint8_t *row, int hidden, int c,
                                     float weight, float acc[EPC_LOGFMT_BLOCKS][4])
{
    int chunk = (int)epi_logfmt_chunk((size_t)hidden),
        n = hidden - c * chunk < chunk ? hidden - c * chunk : chunk;
    const uint8_t *at = row;
    for (int b = 0; b < c; b++)
        at += epc_logfmt_is_coded(head, b, chunk) ? (int)epi_logfmt_chunk_bytes((size_t)chunk)
                                                  : chunk * 2;
    bool coded = epc_logfmt_is_coded(head, c, n);
#pragma unroll
    for (int b = 0; b < EPC_LOGFMT_BLOCKS; b++) {
        int i = b * EPI_LOGFMT_BLOCK, width = n - i < EPI_LOGFMT_BLOCK ? n - i : EPI_LOGFMT_BLOCK;
        int lane = epc_lane() * 4;
        if (i >= n || lane >= width)
            continue;
        if (!coded) {
            for (int j = 0; j < 4; j++)
                acc[b][j] =
                    fmaf(weight, epi_from_bf16(__ldcg(&((const uint16_t *)at)[i + lane + j])),
                         acc[b][j]);
            continue;
        }
        const uint8_t *block = at + b * epi_logfmt_block_bytes(EPI_LOGFMT_BLOCK);
        struct epi_logfmt_grid grid = epi_logfmt_grid_of(__ldcg(&((const uint16_t *)block)[0]),
                                                         __ldcg(&((const uint16_t *)block)[1]));
        uint32_t low = __ldcg((const uint32_t *)(block + 4 + lane));
        uint32_t high = (uint32_t)__ldcg(block + 4 + width + lane / 8) >> lane % 8;
        uint32_t sign = (uint32_t)__ldcg(block + 4 + width + width / 8 + lane / 8) >> lane % 8;
        for (int j = 0; j < 4; j++) {
            uint16_t value =
                epi_logfmt_magnitude(&grid, (low >> 8 * j & 0xff) | (high >> j & 1) << 8);
            value = (uint16_t)(value | (sign >> j & 1) << 15);
            acc[b][j] = fmaf(weight, epi_from_bf16(value), acc[b][j]);
        }
    }
}

/* Head of an entry's row: a rank's heads are where its weights would be. */
static __device__ __forceinline__ const uint32_t *epc_head_of(const epc_combine_rows *rows,
                                                              epc_entry entry)
{
    int words = epc_logfmt_head(rows->hidden) / 4;
    return (const uint32_t *)rows->from->weights[entry >> 32] + (int64_t)(uint32_t)entry * words;
}

/* Sums of encoded rows: a block takes tokens in turn, a warp a chunk of one. */
static __device__ void epc_combine_encoded(const epc_combine_rows *rows)
{
    int chunk = (int)epi_logfmt_chunk((size_t)rows->hidden),
        chunks = (rows->hidden + chunk - 1) / chunk;
    int warps = (int)(blockDim.x / EPC_WARP);
    for (int item = epc_warp();; item += warps) {
        int t = item / chunks * (int)gridDim.x + (int)blockIdx.x, c = item % chunks;
        if (t >= rows->num_tokens)
            break;
        float acc[EPC_LOGFMT_BLOCKS][4] = {};
        for (int k = 0; k < rows->width; k++) {
            epc_entry entry = epc_entries_of(rows, t)[k];
            if (entry >= 0)
                epc_add_chunk(epc_head_of(rows, entry), epc_row_at(rows->from, entry), rows->hidden,
                              c, rows->weights[t * rows->weight_stride + k], acc);
        }
        uint16_t *out = (uint16_t *)(rows->out + t * rows->out_stride) + c * chunk;
#pragma unroll
        for (int b = 0; b < EPC_LOGFMT_BLOCKS; b++)
            for (int j = 0; j < 4; j++) {
                int i = b * EPI_LOGFMT_BLOCK + epc_lane() * 4 + j;
                if (i < chunk && c * chunk + i < rows->hidden)
                    out[i] = epi_to_bf16(acc[b][j]);
            }
    }
}

#endif
