/* SPDX-License-Identifier: MIT */
/*
 * LogFMT blocks over the operations of a vec_*.h. A block whose least magnitude
 * is subnormal goes to the scalar path; then no logarithm or power meets one here.
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
    v_float p = v_set_f(EPI_LOG2_C7);
    p = v_fma_f(p, f, v_set_f(EPI_LOG2_C6));
    p = v_fma_f(p, f, v_set_f(EPI_LOG2_C5));
    p = v_fma_f(p, f, v_set_f(EPI_LOG2_C4));
    p = v_fma_f(p, f, v_set_f(EPI_LOG2_C3));
    p = v_fma_f(p, f, v_set_f(EPI_LOG2_C2));
    p = v_fma_f(p, f, v_set_f(EPI_LOG2_C1));
    p = v_fma_f(p, f, v_set_f(EPI_LOG2_C0));
    return v_fma_f(f, p, v_to_float(exponent));
}

/* As epi_exp2, where the result is normal. */
EPI_INLINE v_float exp2_of(v_float v)
{
    v_float shifted = v_add_f(v, v_set_f(EPI_ROUND_MAGIC));
    v_float f = v_sub_f(v, v_sub_f(shifted, v_set_f(EPI_ROUND_MAGIC)));
    v_float p = v_set_f(EPI_EXP2_C6);
    p = v_fma_f(p, f, v_set_f(EPI_EXP2_C5));
    p = v_fma_f(p, f, v_set_f(EPI_EXP2_C4));
    p = v_fma_f(p, f, v_set_f(EPI_EXP2_C3));
    p = v_fma_f(p, f, v_set_f(EPI_EXP2_C2));
    p = v_fma_f(p, f, v_set_f(EPI_EXP2_C1));
    p = v_fma_f(p, f, v_set_f(EPI_EXP2_C0));
    return v_f(v_add_32(v_i(p), v_left_32(v_i(shifted), 23)));
}

/* 128 low bytes, 16 bytes of bit 8, 16 bytes of signs. */
EPI_INLINE void encode_whole(const uint16_t *x, const struct epi_logfmt_grid *grid, uint8_t *out)
{
    const v_float li = v_set_f(grid->li), inverse = v_set_f(grid->inverse);
    const v_float rounding = v_set_f(grid->rounding);
    for (int i = 0; i < EPI_LOGFMT_BLOCK; i += V_LANES) {
        v_int value = v_left_32(v_load_16_as_32(x + i), 16);
        v_int magnitude = v_and(value, v_set_32(0x7fffffff));
        v_float t = v_fma_f(v_sub_f(log2_of(magnitude), li), inverse, rounding);
        v_int code = v_truncate(v_max_f(t, v_set_f(0.0f)));
        code = v_min_32(code, v_set_32(EPI_LOGFMT_CODES));
        code = v_and_not(v_equal_32(magnitude, v_set_32(0)), code);
        v_store_32_as_8(out + i, code);
        v_store_signs(out + EPI_LOGFMT_BLOCK + i / 8, v_left_32(code, 23));
        v_store_signs(out + EPI_LOGFMT_BLOCK + BITS_BYTES + i / 8, value);
    }
}

EPI_INLINE void decode_whole(const uint8_t *in, const struct epi_logfmt_grid *grid, uint16_t *out)
{
    const v_float li = v_set_f(grid->li), step = v_set_f(grid->step);
    for (int i = 0; i < EPI_LOGFMT_BLOCK; i += V_LANES) {
        v_int high = v_load_bits(in + EPI_LOGFMT_BLOCK + i / 8);
        v_int sign = v_load_bits(in + EPI_LOGFMT_BLOCK + BITS_BYTES + i / 8);
        v_int code = v_or(v_load_8_as_32(in + i), v_and(high, v_set_32(256)));
        v_float v = v_fma_f(v_sub_f(v_to_float(code), v_set_f(1.0f)), step, li);
        v_int bits = v_right_32(round_bf16(exp2_of(v)), 16);
        bits = v_and_not(v_equal_32(code, v_set_32(0)), bits);
        v_store_32_as_16(out + i, v_or(bits, v_and(sign, v_set_32(0x8000))));
    }
}

EPI_INLINE void encode_logfmt(const uint16_t *x, size_t n, struct epi_logfmt_range range,
                              uint8_t *out)
{
    uint16_t padded[EPI_LOGFMT_BLOCK] = {0};
    uint8_t whole[EPI_LOGFMT_BLOCK + 2 * BITS_BYTES];
    size_t bits = (n + 7) / 8;
    if (range.amin < EPI_BF16_MIN_NORMAL) {
        epi_logfmt_encode_block_scalar(x, n, range, out);
        return;
    }
    struct epi_logfmt_grid grid = epi_logfmt_grid_of(range.amax, range.amin);
    if (n == EPI_LOGFMT_BLOCK) {
        encode_whole(x, &grid, out);
        return;
    }
    memcpy(padded, x, n * sizeof *x);
    encode_whole(padded, &grid, whole);
    memcpy(out, whole, n);
    memcpy(out + n, whole + EPI_LOGFMT_BLOCK, bits);
    memcpy(out + n + bits, whole + EPI_LOGFMT_BLOCK + BITS_BYTES, bits);
}

EPI_INLINE void decode_logfmt(const uint8_t *in, size_t n, struct epi_logfmt_range range,
                              uint16_t *out)
{
    /* Only what an encoder writes is known to stay normal. */
    if (n < EPI_LOGFMT_BLOCK || range.amin < EPI_BF16_MIN_NORMAL || range.amin >= range.amax ||
        range.amax >= EPI_BF16_ONE) {
        epi_logfmt_decode_block_scalar(in, n, range, out);
        return;
    }
    struct epi_logfmt_grid grid = epi_logfmt_grid_of(range.amax, range.amin);
    decode_whole(in, &grid, out);
}

static size_t encode_row(const uint16_t *x, size_t hidden, uint8_t *out)
{
    return epi_logfmt_encode_row(x, hidden, out, range_of, encode_logfmt);
}

static void decode_row(const uint8_t *in, size_t hidden, uint16_t *out)
{
    epi_logfmt_decode_row(in, hidden, out, decode_logfmt);
}
