/* SPDX-License-Identifier: MIT */
/*
 * Element formats, one value at a time: E4M3, BF16, F16 and block scales.
 *
 * These definitions are the reference. Every other path, device code included,
 * must give the same bits, so only +, *, /, fma and integer operations appear,
 * and a NaN result is always the one that a GPU's conversions give. Compile with
 * -ffp-contract=off, or -fmad=false for a device: fma stands only where written.
 */
#ifndef EPI_CODEC_SCALAR_H
#define EPI_CODEC_SCALAR_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define EPI_HD static __host__ __device__ inline
#else
#define EPI_HD static inline
#endif

#define EPI_SCALE_BLOCK 128 /* channels that share a scale */
#define EPI_E4M3_MAX 448.0f
#define EPI_AMAX_MIN 1e-4f /* keeps the scale of an all-zero block finite */
#define EPI_E4M3_NAN 0x7fu
#define EPI_BF16_NAN 0x7fffu
#define EPI_F16_NAN 0x7fffu
#define EPI_F32_NAN 0x7fffffffu
#define EPI_F32_INF 0x7f800000u

EPI_HD uint32_t epi_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

EPI_HD float epi_float(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

EPI_HD int epi_is_nan(float value)
{
    return (epi_bits(value) & 0x7fffffffu) > EPI_F32_INF;
}

EPI_HD float epi_from_bf16(uint16_t code)
{
    return epi_float((uint32_t)code << 16);
}

/* Round to nearest even; overflow to infinity; every NaN becomes EPI_BF16_NAN. */
EPI_HD uint16_t epi_to_bf16(float value)
{
    uint32_t bits = epi_bits(value);
    if (epi_is_nan(value))
        return EPI_BF16_NAN;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

EPI_HD float epi_from_f16(uint16_t code)
{
    uint32_t sign = (uint32_t)(code & 0x8000u) << 16, rest = code & 0x7fffu;
    if (rest > 0x7c00u)
        return epi_float(sign | 0x7fc00000u | rest << 13);
    if (rest == 0x7c00u)
        return epi_float(sign | EPI_F32_INF);
    if (rest < 0x0400u) /* subnormal: `rest` steps of 2^-24 */
        return epi_float(sign | epi_bits((float)rest * epi_float(0x33800000u)));
    return epi_float(sign | ((rest << 13) + ((127u - 15u) << 23)));
}

/* Round to nearest even; overflow to infinity; every NaN becomes EPI_F16_NAN. */
EPI_HD uint16_t epi_to_f16(float value)
{
    uint32_t bits = epi_bits(value), rest = bits & 0x7fffffffu;
    uint32_t sign = (bits >> 16) & 0x8000u, code;
    if (rest > EPI_F32_INF)
        return EPI_F16_NAN;
    if (rest >= 0x477ff000u) /* 65520 and above round to infinity */
        code = 0x7c00u;
    else if (rest < 0x38800000u) /* below 2^-14: adding 0.5 leaves steps of 2^-24 in the low bits */
        code = epi_bits(epi_float(rest) + 0.5f) - 0x3f000000u;
    else
        code = (rest + 0xfffu + ((rest >> 13) & 1) - ((127u - 15u) << 23)) >> 13;
    return (uint16_t)(sign | code);
}

/* What stores of F32 results give: any NaN becomes the same NaN. */
EPI_HD float epi_to_f32(float value)
{
    return epi_is_nan(value) ? epi_float(EPI_F32_NAN) : value;
}

EPI_HD float epi_from_e4m3(uint8_t code)
{
    uint32_t sign = (uint32_t)(code & 0x80u) << 24, rest = code & 0x7fu;
    if (rest == EPI_E4M3_NAN)
        return epi_float(EPI_F32_NAN);
    if (rest < 8) /* subnormal: `rest` steps of 2^-9 */
        return epi_float(sign | epi_bits((float)rest * epi_float(0x3b000000u)));
    return epi_float(sign | ((rest << 20) + ((127u - 7u) << 23)));
}

/* Round to nearest even; above 448, infinity included, saturates; NaN becomes EPI_E4M3_NAN. */
EPI_HD uint8_t epi_to_e4m3(float value)
{
    uint32_t bits = epi_bits(value), rest = bits & 0x7fffffffu;
    uint32_t sign = (bits >> 24) & 0x80u, code;
    if (rest > EPI_F32_INF)
        return EPI_E4M3_NAN;
    if (rest >= 0x43e00000u) /* 448 */
        code = 0x7eu;
    else if (rest < 0x3c800000u) /* below 2^-6: adding 2^14 leaves steps of 2^-9 in the low bits */
        code = epi_bits(epi_float(rest) + 16384.0f) - 0x46800000u;
    else
        code = (rest + 0x7ffffu + ((rest >> 20) & 1) - ((127u - 7u) << 23)) >> 20;
    return (uint8_t)(sign | code);
}

/* max(amax, |value|), where a NaN value is passed over. */
EPI_HD float epi_amax(float amax, float value)
{
    float magnitude = epi_float(epi_bits(value) & 0x7fffffffu);
    return magnitude > amax ? magnitude : amax;
}

/* The factors of one block: codes are x * inverse, and x is about code * scale. */
struct epi_scale {
    float scale;
    float inverse;
};

/*
 * An infinite amax gives an infinite scale and inverse 0, so the whole block
 * dequantises to NaN: an overflow upstream stays visible.
 */
EPI_HD struct epi_scale epi_scale_f32(float amax)
{
    struct epi_scale s;
    float bounded = amax > EPI_AMAX_MIN ? amax : EPI_AMAX_MIN;
    s.scale = bounded / EPI_E4M3_MAX;
    s.inverse = EPI_E4M3_MAX / bounded;
    return s;
}

/* The same with the scale rounded up to a power of two. */
EPI_HD struct epi_scale epi_scale_pow2(float amax)
{
    struct epi_scale s;
    uint32_t up = (epi_bits(epi_scale_f32(amax).scale) + 0x7fffffu) & EPI_F32_INF;
    s.scale = epi_float(up);
    s.inverse = up == EPI_F32_INF ? 0.0f : epi_float((254u << 23) - up);
    return s;
}

/* UE8M0: the exponent byte of a power of two from epi_scale_pow2; 255 stands for an infinite one.
 */
EPI_HD uint8_t epi_to_ue8m0(float scale)
{
    return (uint8_t)(epi_bits(scale) >> 23);
}

EPI_HD float epi_from_ue8m0(uint8_t exponent)
{
    if (exponent == 255)
        return epi_float(EPI_F32_NAN);
    return exponent ? epi_float((uint32_t)exponent << 23) : epi_float(0x00400000u);
}

#endif
