/* SPDX-License-Identifier: MIT */
/*
 * LogFMT blocks over the operations of a vec_*.h. A block whose grid is
 * not normal goes to the scalar path; then no logarithm or power meets a subnormal here.
 */
#include "codec/logfmt_walk.h"
#include "codec/paths.h"

#define BITS_BYTES (EPI_LOGFMT_BLOCK / 8)

EPI_INLINE struct epi_logfmt_range whole_range(const uint16_t *x)
{
    v_int most = v_set_16(0), least = v_set_16(0xffff);
    for (int i = 0; i < EPI_LOGFMT_BLOCK; i += 2 * V_LANES) {
        v_int m = v_and(v_load_i(x + i), v_set_16(0x7fff));
        most = v_max_16(most, m);
        least = v_min_16(least, v_sub_16(m, v_set_16(1))); /* 0 wraps to the largest */
    }
    uint32_t amin = v_least_16(least);
    struct epi_logfmt_range range = {(uint16_t)v_largest_16(most),
                                     (uint16_t)(amin == 0xffff ? amin : amin + 1)};
    return range;
}

EPI_INLINE struct epi_logfmt_range range_of(const uint16_t *x, size_t n)
{
    uint16_t padded[EPI_LOGFMT_BLOCK] = {0};
    if (n == EPI_LOGFMT_BLOCK)
        return whole_range(x);
    memcpy(padded, x, n * sizeof *x);
    return whole_range(padded);
}

/* As epi_log2, for normal values. */
EPI_INLINE v_float log2_of(v_int bits)
{
    v_int exponent = v_sra_32(v_sub_32(bits, v_set_32(EPI_SQRT_HALF_BITS)), 23);
    v_float f = v_sub_f(v_f(v_sub_32(bits, v_left_32(exponent, 23))), v_set_f(1.0f));
    v_float f2 = v_mul_f(f, f);
    v_float p01 = v_fma_f(v_set_f(EPI_LOG2_C1), f, v_set_f(EPI_LOG2_C0));
    v_float p23 = v_fma_f(v_set_f(EPI_LOG2_C3), f, v_set_f(EPI_LOG2_C2));
    v_float p45 = v_fma_f(v_set_f(EPI_LOG2_C5), f, v_set_f(EPI_LOG2_C4));
    v_float p67 = v_fma_f(v_set_f(EPI_LOG2_C7), f, v_set_f(EPI_LOG2_C6));
    v_float p = v_fma_f(v_fma_f(p67, f2, p45), v_mul_f(f2, f2), v_fma_f(p23, f2, p01));
    return v_fma_f(f, p, v_to_float(exponent));
}

/* As epi_exp2, where the result is normal. */
EPI_INLINE v_float exp2_of(v_float v)
{
    v_float shifted = v_add_f(v, v_set_f(EPI_ROUND_MAGIC));
    v_float f = v_sub_f(v, v_sub_f(shifted, v_set_f(EPI_ROUND_MAGIC)));
    v_float f2 = v_mul_f(f, f);
    v_float p12 = v_fma_f(v_set_f(EPI_EXP2_C2), f, v_set_f(EPI_EXP2_C1));
    v_float p34 = v_fma_f(v_set_f(EPI_EXP2_C4), f, v_set_f(EPI_EXP2_C3));
    v_float p56 = v_fma_f(v_set_f(EPI_EXP2_C6), f, v_set_f(EPI_EXP2_C5));
    v_float p = v_fma_f(v_fma_f(v_fma_f(p56, f2, p34), f2, p12), f, v_set_f(1.0f));
    return v_f(v_add_32(v_i(p), v_left_32(v_i(shifted), 23)));
}

/* Position on the grid, truncated; within int16 as x is normal and below 1. */
EPI_INLINE v_int position(v_int x, v_float li, v_float inverse, v_float rounding)
{
    return v_truncate(v_fma_f(v_sub_f(log2_of(x), li), inverse, rounding));
}

/* All ones in the 16-bit lanes that are 0, of lanes up to 0x8000. */
EPI_INLINE v_int is_zero(v_int a)
{
    return v_sra_16(v_sub_16(a, v_set_16(1)), 15);
}

/* 128 low bytes, 16 bytes of bit 8, 16 bytes of signs. */
EPI_INLINE void encode_whole(const uint16_t *x, const struct epi_logfmt_grid *grid, uint8_t *out)
{
    const v_float li = v_set_f(grid->li), inverse = v_set_f(grid->inverse);
    const v_float rounding = v_set_f(grid->rounding);
    for (int i = 0; i < EPI_LOGFMT_BLOCK; i += PAIR) {
        v_int value = v_load_i(x + i);
        v_int magnitude = v_and(value, v_set_16(0x7fff));
        struct pair m = split_bf16(magnitude);
        v_int even = position(v_i(m.a), li, inverse, rounding);
        v_int odd = position(v_i(m.b), li, inverse, rounding);
        v_int code = v_blend_16(even, v_left_32(odd, 16));
        code = v_and_not(is_zero(magnitude), v_max_i16(code, v_set_16(0)));
        v_store_16_as_8(out + i, code);
        v_store_signs_16(out + EPI_LOGFMT_BLOCK + i / 8, v_left_16(code, 7));
        v_store_signs_16(out + EPI_LOGFMT_BLOCK + BITS_BYTES + i / 8, value);
    }
}

/* BF16 in the upper half of each lane of the grid point that `above` comes after point 1. */
EPI_INLINE v_int point(v_int above, v_float step, v_float li)
{
    return round_bits(v_i(exp2_of(v_fma_f(v_to_float(above), step, li))));
}

EPI_INLINE void decode_whole(const uint8_t *in, const struct epi_logfmt_grid *grid, uint16_t *out)
{
    const v_float step = v_set_f(grid->step), li = v_set_f(grid->li);
    for (int i = 0; i < EPI_LOGFMT_BLOCK; i += PAIR) {
        v_int high = v_load_signs_16(in + EPI_LOGFMT_BLOCK + i / 8);
        v_int sign = v_load_signs_16(in + EPI_LOGFMT_BLOCK + BITS_BYTES + i / 8);
        v_int code = v_or(v_load_8_as_16(in + i), v_and(v_right_16(high, 7), v_set_16(256)));
        /* Code 0 wraps and gives any bits, then is put right. */
        v_int above = v_sub_16(code, v_set_16(1));
        v_int even = point(v_and(above, v_set_32(0xffff)), step, li);
        v_int odd = point(v_right_32(above, 16), step, li);
        v_int bits = v_blend_16(v_right_32(even, 16), odd);
        bits = v_and_not(is_zero(code), bits);
        v_store_i(out + i, v_or(bits, v_and(sign, v_set_16(0x8000))));
    }
}

EPI_INLINE void encode_logfmt(const uint16_t *x, size_t n, const struct epi_logfmt_grid *grid,
                              uint8_t *out)
{
    uint16_t padded[EPI_LOGFMT_BLOCK] = {0};
    uint8_t whole[EPI_LOGFMT_BLOCK + 2 * BITS_BYTES];
    size_t bits = (n + 7) / 8;
    if (!grid->normal) {
        epi_logfmt_encode_block_scalar(x, n, grid, out);
        return;
    }
    if (n == EPI_LOGFMT_BLOCK) {
        encode_whole(x, grid, out);
        return;
    }
    memcpy(padded, x, n * sizeof *x);
    encode_whole(padded, grid, whole);
    memcpy(out, whole, n);
    memcpy(out + n, whole + EPI_LOGFMT_BLOCK, bits);
    memcpy(out + n + bits, whole + EPI_LOGFMT_BLOCK + BITS_BYTES, bits);
}

EPI_INLINE void decode_logfmt(const uint8_t *in, size_t n, const struct epi_logfmt_grid *grid,
                              uint16_t *out)
{
    if (n < EPI_LOGFMT_BLOCK || !grid->normal)
        epi_logfmt_decode_block_scalar(in, n, grid, out);
    else
        decode_whole(in, grid, out);
}

static size_t encode_row(const uint16_t *x, size_t hidden, uint8_t *out)
{
    return epi_logfmt_encode_row(x, hidden, out, range_of, encode_logfmt);
}

static void decode_row(const uint8_t *in, size_t hidden, uint16_t *out)
{
    epi_logfmt_decode_row(in, hidden, out, decode_logfmt);
}
