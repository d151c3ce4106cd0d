/* SPDX-License-Identifier: MIT */
/* Row checksums of codec/checksum.h by warps: every fourth lane of a warp does the same. */
#ifndef EPI_EP_CUDA_CHECKSUM_CUH
#define EPI_EP_CUDA_CHECKSUM_CUH

#include "codec/checksum.h"
#include "ep/cuda/device.cuh"

#define EPC_SUM_AHEAD 8 /* words in flight a lane */

/* Of `bytes` bytes, whose 8-byte word i is word(i), padded with zeros. In all lanes. */
template <class Word> static __device__ uint64_t epc_checksum(int64_t bytes, Word word)
{
    int lane = epc_lane() % EPI_CHECKSUM_LANES;
    int64_t words = (bytes + 7) / 8, end = (words + EPI_CHECKSUM_LANES - 1) / EPI_CHECKSUM_LANES;
    uint64_t sum = epi_checksum_lane(lane), all = epi_checksum_begin((uint64_t)bytes);
    for (int64_t first = 0; first < end; first += EPC_SUM_AHEAD) {
        uint64_t v[EPC_SUM_AHEAD];
#pragma unroll
        for (int u = 0; u < EPC_SUM_AHEAD; u++) {
            int64_t i = (first + u) * EPI_CHECKSUM_LANES + lane;
            v[u] = i < words ? word(i) : 0;
        }
#pragma unroll
        for (int u = 0; u < EPC_SUM_AHEAD; u++)
            if (first + u < end)
                sum = epi_checksum_mix(sum, v[u]);
    }
    for (int i = 0; i < EPI_CHECKSUM_LANES; i++)
        all = epi_checksum_add(all, __shfl_sync(EPC_ALL, sum, i));
    return all;
}

static __device__ __forceinline__ uint64_t epc_word64(int2 v)
{
    return (uint64_t)(uint32_t)v.y << 32 | (uint32_t)v.x;
}

/* A row whose length is a multiple of 8 bytes, at any address. */
struct epc_row_words {
    const uint8_t *row;
    __device__ uint64_t operator()(int64_t i) const
    {
        const uint8_t *at = row + 8 * i;
        uint64_t word = 0;
        if ((uint64_t)at % 8 == 0)
            return epc_word64(epc_load8(at));
        for (int b = 0; b < 8; b++)
            word |= (uint64_t)at[b] << 8 * b;
        return word;
    }
};

/* Scales, `step` words of 4 bytes apart. */
struct epc_scale_words {
    const uint32_t *scales;
    int64_t step;
    int count;
    __device__ uint64_t operator()(int64_t i) const
    {
        uint64_t low = __ldcg(scales + 2 * i * step);
        return 2 * i + 1 < count ? low | (uint64_t)__ldcg(scales + (2 * i + 1) * step) << 32 : low;
    }
};

static __device__ uint64_t epc_sum_bytes(const uint8_t *row, int64_t bytes)
{
    epc_row_words words = {row};
    return epc_checksum(bytes, words);
}

/* What a row carries in verify mode; the bits of the CPU path. */
static __device__ uint64_t epc_sum_row(const uint8_t *row, int64_t bytes, const uint32_t *scales,
                                       int64_t step, int count, int32_t token)
{
    epc_scale_words words = {scales, step, count};
    uint64_t sum = epc_sum_bytes(row, bytes);
    return epi_checksum_of_row(sum, count ? epc_checksum(4 * (int64_t)count, words) : 0, token);
}

#endif
