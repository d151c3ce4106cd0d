/* SPDX-License-Identifier: MIT */
/* Elements and E4M3 blocks on the device; the same bits as codec/scalar.h. */
#ifndef EPI_EP_CUDA_QUANTISE_CUH
#define EPI_EP_CUDA_QUANTISE_CUH

#include "codec/scalar.h"
#include "ep/cuda/device.cuh"

#define EPC_QUANT_CHANNELS 512 /* of a warp at once: 16 a lane, 8 lanes a block of 128 */

enum { EPC_SCALE_F32, EPC_SCALE_POW2, EPC_SCALE_UE8M0 }; /* values of ep_scale */

static __device__ __forceinline__ float epc_load_element(const uint8_t *row, int dtype, int64_t i)
{
    if (dtype == EPC_F32)
        return ((const float *)row)[i];
    uint16_t code = ((const uint16_t *)row)[i];
    return dtype == EPC_BF16 ? epi_from_bf16(code) : epi_from_f16(code);
}
static __device__ __forceinline__ void epc_store_element(uint8_t *row, int dtype, int64_t i,
                                                         float value)
{
    if (dtype == EPC_F32)
        ((float *)row)[i] = epi_to_f32(value);
    else
        ((uint16_t *)row)[i] = dtype == EPC_BF16 ? epi_to_bf16(value) : epi_to_f16(value);
}

/* Two elements of 16 bits in a word. */
static __device__ __forceinline__ void epc_unpack2(uint32_t word, bool f16, float *v)
{
    if (f16) {
        asm("{.reg .b16 a, b;\n mov.b32 {a, b}, %2;\n cvt.f32.f16 %0, a;\n cvt.f32.f16 %1, b;}"
            : "=f"(v[0]), "=f"(v[1])
            : "r"(word));
    } else {
        v[0] = epi_float(word << 16);
        v[1] = epi_float(word & 0xffff0000u);
    }
}

/* Eight elements from `i`, a multiple of 8. Rows may start at any element. */
static __device__ __forceinline__ void epc_load8_elements(const uint8_t *row, int dtype, int i,
                                                          float *v)
{
    const uint8_t *at = row + (int64_t)i * (dtype == EPC_F32 ? 4 : 2);
    if ((uint64_t)at % 16) {
        for (int e = 0; e < 8; e++)
            v[e] = epc_load_element(row, dtype, i + e);
    } else if (dtype == EPC_F32) {
        float4 a = ((const float4 *)at)[0], b = ((const float4 *)at)[1];
        v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
        v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
    } else {
        uint4 a = *(const uint4 *)at;
        epc_unpack2(a.x, dtype == EPC_F16, v);
        epc_unpack2(a.y, dtype == EPC_F16, v + 2);
        epc_unpack2(a.z, dtype == EPC_F16, v + 4);
        epc_unpack2(a.w, dtype == EPC_F16, v + 6);
    }
}

/* Two codes; the instruction and epi_to_e4m3() agree on every value. */
static __device__ __forceinline__ uint32_t epc_pack2_e4m3(float low, float high)
{
#if __CUDA_ARCH__ >= 890
    uint16_t codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
#else
    return (uint32_t)epi_to_e4m3(low) | (uint32_t)epi_to_e4m3(high) << 8;
#endif
}

/* A lane's 16 codes of 512 channels, and the scale of its block. */
typedef struct epc_codes {
    uint4 code;
    float scale;
} epc_codes;

/* Largest magnitude of eight BF16 values, NaN passed over. */
static __device__ __forceinline__ float epc_amax8_bf16(uint4 v)
{
    uint32_t a, b;
    asm("{.reg .b32 p, q, r, s;\n"
        "abs.bf16x2 p, %2;\n abs.bf16x2 q, %3;\n abs.bf16x2 r, %4;\n abs.bf16x2 s, %5;\n"
        "max.bf16x2 %0, p, q;\n max.bf16x2 %1, r, s;}"
        : "=r"(a), "=r"(b)
        : "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w));
    asm("max.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return fmaxf(epi_float(a << 16), epi_float(a & 0xffff0000u));
}

/* A lane's 16 elements as they lie in memory, when they are BF16 and aligned. */
typedef struct epc_raw {
    uint4 half[2];
} epc_raw;

static __device__ __forceinline__ epc_raw epc_load_raw(const uint8_t *row, int at, int hidden)
{
    epc_raw raw;
    raw.half[0] = raw.half[1] = make_uint4(0, 0, 0, 0);
    if (at < hidden)
        raw.half[0] = *(const uint4 *)(row + (int64_t)at * 2);
    if (at + 8 < hidden)
        raw.half[1] = *(const uint4 *)(row + (int64_t)at * 2 + 16);
    return raw;
}

static __device__ __forceinline__ struct epi_scale epc_scale_of(float amax, int scale_kind)
{
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
        amax = fmaxf(amax, __shfl_xor_sync(EPC_ALL, amax, step));
    return scale_kind == EPC_SCALE_F32 ? epi_scale_f32(amax) : epi_scale_pow2(amax);
}

static __device__ __forceinline__ uint2 epc_encode8(const float *v, float inverse)
{
    return make_uint2(epc_pack2_e4m3(v[0] * inverse, v[1] * inverse) |
                          epc_pack2_e4m3(v[2] * inverse, v[3] * inverse) << 16,
                      epc_pack2_e4m3(v[4] * inverse, v[5] * inverse) |
                          epc_pack2_e4m3(v[6] * inverse, v[7] * inverse) << 16);
}

static __device__ __forceinline__ epc_codes epc_encode_raw(epc_raw raw, struct epi_scale scale)
{
    epc_codes codes;
    uint2 word[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float v[8];
        epc_unpack2(raw.half[i].x, false, v);
        epc_unpack2(raw.half[i].y, false, v + 2);
        epc_unpack2(raw.half[i].z, false, v + 4);
        epc_unpack2(raw.half[i].w, false, v + 6);
        word[i] = epc_encode8(v, scale.inverse);
    }
    codes.code = make_uint4(word[0].x, word[0].y, word[1].x, word[1].y);
    codes.scale = scale.scale;
    return codes;
}

static __device__ __forceinline__ epc_codes epc_quantise_raw(epc_raw raw, int scale_kind)
{
    float amax = fmaxf(epc_amax8_bf16(raw.half[0]), epc_amax8_bf16(raw.half[1]));
    return epc_encode_raw(raw, epc_scale_of(fmaxf(0, amax), scale_kind));
}

/* The same for any dtype and alignment. */
static __device__ __forceinline__ epc_codes epc_quantise(const uint8_t *row, int dtype, int first,
                                                         int hidden, int scale_kind)
{
    float v[16] = {0}, amax = 0;
    int at = first + epc_lane() * 16;
    if (at < hidden)
        epc_load8_elements(row, dtype, at, v);
    if (at + 8 < hidden)
        epc_load8_elements(row, dtype, at + 8, v + 8);
#pragma unroll
    for (int i = 0; i < 16; i++)
        amax = fmaxf(amax, fabsf(v[i]));
    struct epi_scale scale = epc_scale_of(amax, scale_kind);
    uint2 low = epc_encode8(v, scale.inverse), high = epc_encode8(v + 8, scale.inverse);
    epc_codes codes;
    codes.code = make_uint4(low.x, low.y, high.x, high.y);
    codes.scale = scale.scale;
    return codes;
}

/* Stores the codes of channels below `end`; rows are 8-byte aligned. */
static __device__ __forceinline__ void epc_put_codes(const epc_codes *codes, uint8_t *row,
                                                     int first, int end)
{
    int at = first + epc_lane() * 16;
    if (at >= end)
        return;
    uint8_t *to = row + at;
    if (at + 8 < end && (uint64_t)to % 16 == 0) {
        *(uint4 *)to = codes->code;
        return;
    }
    ((uint2 *)to)[0] = make_uint2(codes->code.x, codes->code.y);
    if (at + 8 < end)
        ((uint2 *)to)[1] = make_uint2(codes->code.z, codes->code.w);
}

/* Stores the scales of 512 channels; bytes past the last block are zero. All lanes call. */
static __device__ __forceinline__ void epc_put_scales(const epc_codes *codes, uint32_t *scales,
                                                      int first, int hidden, int scale_kind)
{
    int at = first + epc_lane() * 16, block = at / EPI_SCALE_BLOCK;
    if (scale_kind != EPC_SCALE_UE8M0) {
        if (epc_lane() % 8 == 0 && at < hidden)
            scales[block] = epi_bits(codes->scale);
        return;
    }
    uint32_t byte = at < hidden && epc_lane() % 8 == 0 ? epi_to_ue8m0(codes->scale) : 0;
    uint32_t word = __reduce_or_sync(EPC_ALL, byte << epc_lane() / 8 * 8);
    if (epc_lane() == 0)
        scales[first / EPC_QUANT_CHANNELS] = word;
}

/* Quantises `channels` of any dtype to `to`. */
static __device__ __noinline__ void epc_code_any(const uint8_t *piece, int dtype, int channels,
                                                 uint8_t *to, uint32_t *scales, int scale_kind)
{
    for (int first = 0; first < channels; first += EPC_QUANT_CHANNELS) {
        epc_codes codes = epc_quantise(piece, dtype, first, channels, scale_kind);
        epc_put_codes(&codes, to, first, channels);
        epc_put_scales(&codes, scales, first, channels, scale_kind);
    }
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
/* Of each half the larger magnitude, NaN passed over; its sign means nothing. */
static __device__ __forceinline__ uint32_t epc_larger2_bf16(uint32_t a, uint32_t b)
{
    uint32_t larger;
    asm("max.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}

static __device__ __forceinline__ uint32_t epc_larger16_bf16(epc_raw raw)
{
    uint32_t a = epc_larger2_bf16(raw.half[0].x, raw.half[0].y),
             b = epc_larger2_bf16(raw.half[0].z, raw.half[0].w),
             c = epc_larger2_bf16(raw.half[1].x, raw.half[1].y),
             d = epc_larger2_bf16(raw.half[1].z, raw.half[1].w);
    return epc_larger2_bf16(epc_larger2_bf16(a, b), epc_larger2_bf16(c, d));
}

/* Largest magnitudes of this lane's blocks in two runs of 512 channels, but no less than
   EPI_AMAX_MIN: both travel between lanes in one word. */
static __device__ __forceinline__ void epc_amax_pair(const epc_raw *raw, float *amax)
{
    uint32_t a = epc_larger16_bf16(raw[0]), b = epc_larger16_bf16(raw[1]);
    uint32_t both = epc_larger2_bf16(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
#pragma unroll
    for (int step = 1; step < 8; step *= 2)
        both = epc_larger2_bf16(both, __shfl_xor_sync(EPC_ALL, both, step));
    amax[0] = fmaxf(epi_float(both << 16 & 0x7fff0000u), EPI_AMAX_MIN);
    amax[1] = fmaxf(epi_float(both & 0x7fff0000u), EPI_AMAX_MIN);
}

#define EPC_PLAIN_AMAX 1.2676506e30f /* 2^100 */

/* What epi_scale_f32() and epi_scale_pow2() give for an amax from EPI_AMAX_MIN to EPC_PLAIN_AMAX.
   A division branches for what may overflow, which nothing here does. */
static __device__ __forceinline__ struct epi_scale epc_plain_scale(float amax, bool pow2)
{
    struct epi_scale s;
    const float part = 1.0f / EPI_E4M3_MAX;
    float q = __fmul_rn(amax, part), r;
    s.scale = __fmaf_rn(__fmaf_rn(q, -EPI_E4M3_MAX, amax), part, q);
    if (pow2) {
        uint32_t up = (epi_bits(s.scale) + 0x7fffffu) & EPI_F32_INF;
        s.scale = epi_float(up);
        s.inverse = epi_float((254u << 23) - up);
        return s;
    }
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(amax));
    r = __fmaf_rn(r, __fmaf_rn(-amax, r, 1), r);
    q = __fmul_rn(r, EPI_E4M3_MAX);
    s.inverse = __fmaf_rn(r, __fmaf_rn(-amax, q, EPI_E4M3_MAX), q);
    return s;
}

/* Two whole runs of 512 channels of BF16 at once, for neither to wait for the other's steps.
   False: they need more care. */
static __device__ __forceinline__ bool epc_code_pair(const uint8_t *from, uint8_t *to,
                                                     uint32_t *scales, int scale_kind)
{
    epc_raw raw[2];
    epc_codes codes[2];
    float amax[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        raw[i] =
            epc_load_raw(from, i * EPC_QUANT_CHANNELS + epc_lane() * 16, 2 * EPC_QUANT_CHANNELS);
    epc_amax_pair(raw, amax);
    if (__any_sync(EPC_ALL, fmaxf(amax[0], amax[1]) > EPC_PLAIN_AMAX))
        return false;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        struct epi_scale scale = epc_plain_scale(amax[i], scale_kind != EPC_SCALE_F32);
        codes[i] = epc_encode_raw(raw[i], scale);
        *(uint4 *)(to + i * EPC_QUANT_CHANNELS + epc_lane() * 16) = codes[i].code;
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        epc_put_scales(&codes[i], scales, i * EPC_QUANT_CHANNELS, 2 * EPC_QUANT_CHANNELS,
                       scale_kind);
    return true;
}

/* Quantises a piece of a row, `channels` of any dtype, to `to`. All are aligned. */
static __device__ __forceinline__ void epc_code_piece(const uint8_t *piece, int dtype, int channels,
                                                      uint8_t *to, uint32_t *scales, int scale_kind)
{
    const int pair = 2 * EPC_QUANT_CHANNELS;
    int element = dtype == EPC_F32 ? 4 : 2, per_word = scale_kind == EPC_SCALE_UE8M0 ? 512 : 128;
    for (int first = 0; first < channels; first += pair) {
        const uint8_t *from = piece + first * element;
        int left = channels - first < pair ? channels - first : pair;
        if (dtype == EPC_BF16 && left == pair &&
            epc_code_pair(from, to + first, scales + first / per_word, scale_kind))
            continue;
        epc_code_any(from, dtype, left, to + first, scales + first / per_word, scale_kind);
    }
}
#endif

#endif
