/* SPDX-License-Identifier: MIT */
/*
 * LogFMT-10: BF16 magnitudes on a logarithmic grid of 511 points per block of
 * 128 channels, 9 bits of code and a sign.
 *
 * An encoded row is, without padding:
 *   head     one bit per chunk, bit c%8 of byte c/8: 1 if the chunk is coded;
 *            padded with zeros to a multiple of 4 bytes
 *   chunks   1024 channels each, or 512 when hidden is not divisible by 1024; the
 *            last may be short. One that is not coded is its BF16 values. One that
 *            is coded is its blocks, n <= 128 channels each:
 *              2 bytes  BF16 largest |x|
 *              2 bytes  BF16 least |x| other than 0
 *              n bytes  low 8 bits of the codes
 *              ceil(n/8) bytes  bit 8 of the codes, bit i%8 of byte i/8 for channel i
 *              ceil(n/8) bytes  signs likewise
 * so 16 values take 20 bytes. (la, li) are the base-2 logarithms of the two BF16
 * values, li at least la - 32; the receiver computes them as the sender did.
 *
 * A chunk is coded if every block of it has la < 0 and li < la (so no block of
 * zeros, infinities or NaN), and if that is shorter (always, unless the last
 * chunk has fewer than 7 channels).
 *
 * Method: DeepSeek-V3 hardware paper (arXiv:2505.09343), section 3.2. Its
 * rounding is to the nearer grid point in linear space.
 */
#ifndef EPI_CODEC_LOGFMT_H
#define EPI_CODEC_LOGFMT_H

#include "codec/scalar.h"

#include <math.h>
#include <stddef.h>

#define EPI_LOGFMT_BLOCK 128
#define EPI_LOGFMT_SPAN 32.0f /* li is at least la minus this */
#define EPI_BF16_ONE 0x3f80u
#define EPI_BF16_MIN_NORMAL 0x0080u

/* log2(1 + f) / f for f in [sqrt(1/2) - 1, sqrt(2) - 1], minimax. The whole of epi_log2 is off by
 * at most half an ulp of its result plus 1e-7. */
#define EPI_LOG2_C0 0x1.715472p+0f
#define EPI_LOG2_C1 -0x1.7155bap-1f
#define EPI_LOG2_C2 0x1.ec7b64p-2f
#define EPI_LOG2_C3 -0x1.70bab4p-2f
#define EPI_LOG2_C4 0x1.2596a4p-2f
#define EPI_LOG2_C5 -0x1.001218p-2f
#define EPI_LOG2_C6 0x1.e526d0p-3f
#define EPI_LOG2_C7 -0x1.2a7c2cp-3f
#define EPI_SQRT_HALF_BITS 0x3f3504f3u

/* (2^f - 1) / f for f in [-1/2, 1/2], from the minimax of 2^f. The whole of epi_exp2 has relative
 * error 1e-7 at most. */
#define EPI_EXP2_C1 0x1.62e430p-1f
#define EPI_EXP2_C2 0x1.ebfbdap-3f
#define EPI_EXP2_C3 0x1.c6aed4p-5f
#define EPI_EXP2_C4 0x1.3b2dbcp-7f
#define EPI_EXP2_C5 0x1.5f456ap-10f
#define EPI_EXP2_C6 0x1.41d334p-13f
#define EPI_ROUND_MAGIC                                                       \
    12582912.0f /* 1.5 * 2^23: adding it rounds to an integer in the low bits \
                 */

/* log2 of a positive finite value, subnormals included; powers of two are exact. */
EPI_HD float epi_log2(float x)
{
    float below = 0.0f;
    if (epi_bits(x) < 0x00800000u) {
        x *= 18446744073709551616.0f; /* 2^64 */
        below = -64.0f;
    }
    int32_t exponent = (int32_t)(epi_bits(x) - EPI_SQRT_HALF_BITS) >> 23;
    float f = epi_float(epi_bits(x) - ((uint32_t)exponent << 23)) - 1.0f;
    /* In pairs, which is a shorter chain than Horner's. */
    float f2 = f * f;
    float p01 = fmaf(EPI_LOG2_C1, f, EPI_LOG2_C0), p23 = fmaf(EPI_LOG2_C3, f, EPI_LOG2_C2);
    float p45 = fmaf(EPI_LOG2_C5, f, EPI_LOG2_C4), p67 = fmaf(EPI_LOG2_C7, f, EPI_LOG2_C6);
    float p = fmaf(fmaf(p67, f2, p45), f2 * f2, fmaf(p23, f2, p01));
    return fmaf(f, p, (float)exponent + below);
}

/* 2^v for v in [-190, 64), rounded once more where the result is subnormal. */
EPI_HD float epi_exp2(float v)
{
    float shifted = v + EPI_ROUND_MAGIC;
    float f = v - (shifted - EPI_ROUND_MAGIC);
    uint32_t n = epi_bits(shifted) - epi_bits(EPI_ROUND_MAGIC);
    float f2 = f * f;
    float p12 = fmaf(EPI_EXP2_C2, f, EPI_EXP2_C1), p34 = fmaf(EPI_EXP2_C4, f, EPI_EXP2_C3);
    float p56 = fmaf(EPI_EXP2_C6, f, EPI_EXP2_C5);
    float p = fmaf(fmaf(fmaf(p56, f2, p34), f2, p12), f, 1.0f);
    /* 2^64 too large, so that the exponent field can't underflow, then put right. */
    return epi_float(epi_bits(p) + ((n + 64) << 23)) * 0x1p-64f;
}

/* The grid of one block. */
struct epi_logfmt_grid {
    float li;       /* log2 of the point of code 1 */
    float step;     /* between points, in log2 */
    float inverse;  /* 1 / step */
    float rounding; /* makes floor pick the nearer point in linear space */
    int normal;     /* amin < amax < 1 and amin is no subnormal, so nor is any point */
};

/*
 * amax and amin are positive BF16 codes, amin < amax < 1; others, as a damaged row
 * has, give a grid of any values. With s = step the rounding
 * is 2 - log2((1 + 2^s) / 2) / s; its series to s^3 is exact in float32 as
 * s <= 32/510, and free of the cancellation that the closed form suffers.
 */
EPI_HD struct epi_logfmt_grid epi_logfmt_grid_of(uint16_t amax, uint16_t amin)
{
    struct epi_logfmt_grid g;
    float la = epi_log2(epi_from_bf16(amax));
    float li = epi_log2(epi_from_bf16(amin));
    g.li = li > la - EPI_LOGFMT_SPAN ? li : la - EPI_LOGFMT_SPAN;
    g.step = (la - g.li) / 510.0f;
    g.inverse = 510.0f / (la - g.li);
    float cubic = 0.00173454317f; /* ln(2)^3 / 192 */
    float linear = 0.0866433976f; /* ln(2) / 8 */
    g.rounding = fmaf(-g.step, fmaf(-cubic, g.step * g.step, linear), 1.5f);
    g.normal = amin >= EPI_BF16_MIN_NORMAL && amin < amax && amax < EPI_BF16_ONE;
    return g;
}

/* Code of a BF16 magnitude between 0 and amax. Below 512 as amax itself is within 0.01 of 511.5. */
EPI_HD uint32_t epi_logfmt_code(const struct epi_logfmt_grid *g, uint16_t magnitude)
{
    if (magnitude == 0)
        return 0;
    float t = fmaf(epi_log2(epi_from_bf16(magnitude)) - g->li, g->inverse, g->rounding);
    return t > 0.0f ? (uint32_t)t : 0;
}

/* BF16 magnitude of a code. */
EPI_HD uint16_t epi_logfmt_magnitude(const struct epi_logfmt_grid *g, uint32_t code)
{
    if (code == 0)
        return 0;
    return epi_to_bf16(epi_exp2(fmaf((float)code - 1.0f, g->step, g->li)));
}

EPI_HD size_t epi_logfmt_chunk(size_t hidden)
{
    return hidden % 1024 ? 512 : 1024;
}

/* Bytes of a coded block of n channels, and of a coded chunk. */
EPI_HD size_t epi_logfmt_block_bytes(size_t n)
{
    return 4 + n + 2 * ((n + 7) / 8);
}

EPI_HD size_t epi_logfmt_chunk_bytes(size_t n)
{
    size_t rest = n % EPI_LOGFMT_BLOCK;
    return n / EPI_LOGFMT_BLOCK * epi_logfmt_block_bytes(EPI_LOGFMT_BLOCK) +
           (rest ? epi_logfmt_block_bytes(rest) : 0);
}

#endif
