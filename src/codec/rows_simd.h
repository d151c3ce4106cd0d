/* SPDX-License-Identifier: MIT */
/*
 * Row kernels over the operations of a vec_*.h, which the including file chose.
 * What is left of a row after whole vectors goes to the scalar path.
 */
#include "codec/paths.h"

#include <string.h>

#define V_BYTES (4 * V_LANES)

/*
 * Two vectors of floats. Of 16-bit rows BF16 is split into even and odd elements,
 * one operation each; F16 and F32 into the first and the last V_LANES. Kernels
 * that treat all elements alike need not care.
 */
#define PAIR (2 * V_LANES)
struct pair {
    v_float a, b;
};

EPI_INLINE struct pair split_bf16(v_int x)
{
    struct pair y = {v_f(v_left_32(x, 16)), v_f(v_and(x, v_set_32(0xffff0000u)))};
    return y;
}

EPI_INLINE struct pair load_pair(ep_dtype dtype, const char *p)
{
    struct pair y;
    if (dtype == EP_BF16)
        return split_bf16(v_load_i(p));
    y.a = dtype == EP_F16 ? v_load_half(p) : v_load_f((const float *)p);
    y.b = dtype == EP_F16 ? v_load_half(p + V_BYTES / 2) : v_load_f((const float *)(p + V_BYTES));
    return y;
}

/* Rounded to BF16 in the upper half of each lane; the lower half is undefined. Not for NaN. */
EPI_INLINE v_int round_bits(v_int bits)
{
    v_int even = v_and(v_right_32(bits, 16), v_set_32(1));
    return v_add_32(v_add_32(bits, v_set_32(0x7fff)), even);
}

EPI_INLINE v_int round_bf16(v_float f)
{
    return round_bits(v_fix_nan(f, v_set_32(EPI_BF16_NAN << 16)));
}

/* V_LANES consecutive elements. */
EPI_INLINE v_float load_one(ep_dtype dtype, const char *p)
{
    if (dtype == EP_BF16)
        return v_f(v_left_32(v_load_16_as_32(p), 16));
    return dtype == EP_F16 ? v_load_half(p) : v_load_f((const float *)p);
}

EPI_INLINE void store_one(ep_dtype dtype, char *p, v_float f)
{
    if (dtype == EP_BF16)
        v_store_32_as_16(p, v_right_32(round_bf16(f), 16));
    else if (dtype == EP_F16)
        v_store_half(p, v_f(v_fix_nan(f, v_set_32(EPI_F32_NAN))));
    else
        v_store_i(p, v_fix_nan(f, v_set_32(EPI_F32_NAN)));
}

EPI_INLINE void store_pair(ep_dtype dtype, char *p, struct pair y)
{
    if (dtype == EP_BF16) {
        v_store_i(p, v_blend_16(v_right_32(round_bf16(y.a), 16), round_bf16(y.b)));
    } else {
        store_one(dtype, p, y.a);
        store_one(dtype, p + (dtype == EP_F16 ? V_BYTES / 2 : V_BYTES), y.b);
    }
}

EPI_INLINE size_t size_of(ep_dtype dtype)
{
    return dtype == EP_F32 ? 4 : 2;
}

/* Calls `function` once per dtype, so that the compiler specialises it. */
#define BY_DTYPE(dtype, function, ...)                    \
    ((dtype) == EP_BF16  ? function(EP_BF16, __VA_ARGS__) \
     : (dtype) == EP_F16 ? function(EP_F16, __VA_ARGS__)  \
                         : function(EP_F32, __VA_ARGS__))

/* ------------------------------------------------------------------ copy */

static void copy(void *dst, const void *src, size_t bytes, bool streaming)
{
    char *to = dst;
    const char *from = src;
    size_t head = -(uintptr_t)dst & 63;
    if (!streaming || bytes < 256) {
        if (bytes)
            memcpy(dst, src, bytes);
        return;
    }
    memcpy(to, from, head);
    size_t i = head;
    for (; i + 256 <= bytes; i += 256) {
        v_int part[256 / V_BYTES];
        for (int k = 0; k < 256 / V_BYTES; k++)
            part[k] = v_load_i(from + i + k * V_BYTES);
        for (int k = 0; k < 256 / V_BYTES; k++)
            v_stream_i(to + i + k * V_BYTES, part[k]);
    }
    memcpy(to + i, from + i, bytes - i);
}

static void fence(void)
{
    _mm_sfence();
}

/* -------------------------------------------------------------- quantise */

/* Largest magnitude of a block; a block with an infinity or NaN returns infinity. */
EPI_INLINE float block_amax(ep_dtype dtype, const char *x)
{
    const size_t bytes = EPI_SCALE_BLOCK * size_of(dtype);
    const v_int magnitude = dtype == EP_F32 ? v_set_32(0x7fffffff) : v_set_16(0x7fff);
    v_int most = v_and(v_load_i(x), magnitude);
    for (size_t at = V_BYTES; at < bytes; at += V_BYTES) {
        v_int m = v_and(v_load_i(x + at), magnitude);
        most = dtype == EP_F32 ? v_max_32(most, m) : v_max_16(most, m);
    }
    float amax = dtype == EP_F32    ? epi_float(v_largest_32(most))
                 : dtype == EP_BF16 ? epi_from_bf16((uint16_t)v_largest_16(most))
                                    : epi_from_f16((uint16_t)v_largest_16(most));
    return epi_bits(amax) < EPI_F32_INF ? amax : epi_float(EPI_F32_INF);
}

/*
 * Code of y >= 0, at most a little above 448: with 2^e the power of two at or
 * below y, at least 2^-6, y + 2^(e+20) keeps y in steps of 2^(e-3) in its low bits.
 * Returns the step count there and 2^e in `power`.
 */
EPI_INLINE v_int steps(v_float y, v_int *power)
{
    *power = v_max_32(v_and(v_i(y), v_set_32(EPI_F32_INF)), v_set_32(0x3c800000));
    return v_i(v_fma_f(v_f(*power), v_set_f(0x1p20f), y));
}

/* Codes of PAIR elements in 16-bit lanes. */
EPI_INLINE v_int encode_pair(ep_dtype dtype, const char *x, v_float inverse)
{
    struct pair y;
    v_int sign, power_a, power_b;
    if (dtype == EP_BF16) {
        sign = v_load_i(x);
        y = split_bf16(v_and(sign, v_set_16(0x7fff)));
    } else {
        y = load_pair(dtype, x);
        sign = v_blend_16(v_right_32(v_i(y.a), 16), v_i(y.b));
        y.a = v_f(v_and(v_i(y.a), v_set_32(0x7fffffff)));
        y.b = v_f(v_and(v_i(y.b), v_set_32(0x7fffffff)));
    }
    v_int steps_a = steps(v_mul_f(y.a, inverse), &power_a);
    v_int steps_b = steps(v_mul_f(y.b, inverse), &power_b);
    v_int count = v_blend_16(steps_a, v_left_32(steps_b, 16));
    v_int power = v_or(v_right_32(power_a, 16), power_b);
    v_int code = v_add_16(v_sub_16(count, v_set_16(121 << 3)), v_right_16(power, 4));
    code = v_or(code, v_and(v_right_16(sign, 8), v_set_16(0x80)));
    return dtype == EP_BF16 ? code : v_unzip_16(code);
}

EPI_INLINE void encode_block(ep_dtype dtype, const char *x, float inverse, uint8_t *q, bool stream)
{
    const size_t bytes = PAIR * size_of(dtype);
    v_float factor = v_set_f(inverse);
    for (int i = 0; i < EPI_SCALE_BLOCK; i += V_BYTES) {
        const char *at = x + i * size_of(dtype);
        v_int codes =
            v_pack_8(encode_pair(dtype, at, factor), encode_pair(dtype, at + bytes, factor));
        if (stream)
            v_stream_i(q + i, codes);
        else
            v_store_i(q + i, codes);
    }
}

EPI_INLINE int quantise_row(ep_dtype dtype, const char *x, size_t hidden, ep_scale kind, uint8_t *q,
                            void *scales, bool stream)
{
    for (size_t k = 0; k < hidden / EPI_SCALE_BLOCK; k++) {
        const char *block = x + k * EPI_SCALE_BLOCK * size_of(dtype);
        uint8_t *out = q + k * EPI_SCALE_BLOCK;
        float amax = block_amax(dtype, block);
        if (amax == epi_float(EPI_F32_INF)) {
            epi_quantise_block_scalar(block, dtype, EPI_SCALE_BLOCK, kind, out, scales, k);
            continue;
        }
        struct epi_scale s = epi_scale_of(kind, amax);
        epi_scale_store(kind, scales, k, s.scale);
        encode_block(dtype, block, s.inverse, out, stream);
    }
    return 0;
}

/* The last, short block, padded with zeros to a whole one. */
static void quantise_rest(const char *x, ep_dtype dtype, size_t n, ep_scale kind, uint8_t *q,
                          void *scales, size_t k)
{
    char padded[EPI_SCALE_BLOCK * sizeof(float)] = {0};
    uint8_t codes[EPI_SCALE_BLOCK];
    float scale;
    memcpy(padded, x, n * size_of(dtype));
    ep_scale wide = kind == EP_SCALE_F32 ? EP_SCALE_F32 : EP_SCALE_POW2;
    BY_DTYPE(dtype, quantise_row, padded, EPI_SCALE_BLOCK, wide, codes, &scale, false);
    epi_scale_store(kind, scales, k, scale);
    memcpy(q, codes, n);
}

static void quantise(const void *x, ep_dtype dtype, size_t hidden, ep_scale kind, uint8_t *q,
                     void *scales, bool streaming)
{
    bool stream = streaming && ((uintptr_t)q & (V_BYTES - 1)) == 0;
    size_t whole = hidden / EPI_SCALE_BLOCK * EPI_SCALE_BLOCK;
    if (kind == EP_SCALE_UE8M0)
        memset(scales, 0, epi_scale_bytes(kind, hidden));
    if (stream)
        BY_DTYPE(dtype, quantise_row, x, hidden, kind, q, scales, true);
    else
        BY_DTYPE(dtype, quantise_row, x, hidden, kind, q, scales, false);
    if (whole < hidden)
        quantise_rest((const char *)x + whole * size_of(dtype), dtype, hidden - whole, kind,
                      q + whole, scales, whole / EPI_SCALE_BLOCK);
}

/* ------------------------------------------------------------ dequantise */

/*
 * E4M3 shifted left by 7 is a binary16 value of 1/256 of the size, subnormals
 * included, and a NaN if one more exponent bit is set.
 */
EPI_INLINE struct pair decode_pair(ep_dtype dtype, const uint8_t *q, v_float scale_256)
{
    v_int code = v_load_8_as_16(q);
    v_int rest = v_and(code, v_set_16(0x7f));
    v_int nan = v_and(v_add_16(rest, v_set_16(1)), v_set_16(0x80));
    v_int half = v_or(v_left_16(v_or(rest, nan), 7), v_left_16(v_and(code, v_set_16(0x80)), 8));
    if (dtype == EP_BF16)
        half = v_unzip_16(half);
    struct pair y = {v_half_low(half), v_half_high(half)};
    y.a = v_mul_f(y.a, scale_256);
    y.b = v_mul_f(y.b, scale_256);
    return y;
}

EPI_INLINE int dequantise_row(ep_dtype dtype, const uint8_t *q, const void *scales, ep_scale kind,
                              size_t hidden, char *out)
{
    for (size_t i = 0; i < hidden; i += EPI_SCALE_BLOCK) {
        float scale = epi_scale_load(kind, scales, i / EPI_SCALE_BLOCK);
        if (scale >= 0x1p119f) { /* 256 times it would be no float */
            epi_dequantise_scalar(q, scales, kind, i, i + EPI_SCALE_BLOCK, dtype, out);
            continue;
        }
        v_float scale_256 = v_set_f(256.0f * scale);
        for (size_t j = i; j < i + EPI_SCALE_BLOCK; j += PAIR)
            store_pair(dtype, out + j * size_of(dtype), decode_pair(dtype, q + j, scale_256));
    }
    return 0;
}

static void dequantise(const uint8_t *q, const void *scales, ep_scale kind, size_t hidden,
                       ep_dtype dtype, void *out)
{
    size_t whole = hidden / EPI_SCALE_BLOCK * EPI_SCALE_BLOCK;
    BY_DTYPE(dtype, dequantise_row, q, scales, kind, whole, out);
    if (whole < hidden)
        epi_dequantise_scalar(q, scales, kind, whole, hidden, dtype, out);
}

/* --------------------------------------------------- sums and elementwise */

#define REDUCE_AHEAD 2048 /* bytes */
#define REDUCE_PAIRS 4    /* accumulators of one pass over the rows, in pairs */

/* Elements [i, i + pairs * PAIR) of all terms. */
EPI_INLINE void reduce_columns(ep_dtype dtype, const struct epi_terms *t, bool weighted,
                               const int pairs, size_t i, char *out)
{
    const size_t bytes = PAIR * size_of(dtype), at = i * size_of(dtype);
    struct pair acc[REDUCE_PAIRS];
    for (int k = 0; k < pairs; k++)
        acc[k].a = acc[k].b = v_set_f(0.0f);
    for (size_t r = 0; r < t->n; r++) {
        const char *row = (const char *)t->rows[r] + at;
        v_float w = v_set_f(weighted ? t->weights[r] : 1.0f);
        for (int k = 0; k < pairs; k++) {
            /* Many rows at a time outrun the hardware's prefetcher; past a row's end lies, as a
               rule, the row of the next token. */
            __builtin_prefetch(row + k * bytes + REDUCE_AHEAD);
            struct pair y = load_pair(dtype, row + k * bytes);
            if (weighted) {
                acc[k].a = v_fma_f(w, y.a, acc[k].a);
                acc[k].b = v_fma_f(w, y.b, acc[k].b);
            } else if (r == 0) {
                acc[k] = y;
            } else {
                acc[k].a = v_add_f(acc[k].a, y.a);
                acc[k].b = v_add_f(acc[k].b, y.b);
            }
        }
    }
    for (int b = 0; b < t->biases; b++) {
        for (int k = 0; k < pairs; k++) {
            struct pair y = load_pair(dtype, (const char *)t->bias[b] + at + k * bytes);
            if (b == 0 && t->n == 0) {
                acc[k] = y;
            } else {
                acc[k].a = v_add_f(acc[k].a, y.a);
                acc[k].b = v_add_f(acc[k].b, y.b);
            }
        }
    }
    for (int k = 0; k < pairs; k++)
        store_pair(dtype, out + at + k * bytes, acc[k]);
}

/* Whole vectors of a row; returns how many elements that were. */
EPI_INLINE size_t reduce_row(ep_dtype dtype, const struct epi_terms *t, bool weighted,
                             size_t hidden, char *out)
{
    size_t i = 0;
    for (; i + REDUCE_PAIRS * PAIR <= hidden; i += REDUCE_PAIRS * PAIR)
        reduce_columns(dtype, t, weighted, REDUCE_PAIRS, i, out);
    for (; i + PAIR <= hidden; i += PAIR)
        reduce_columns(dtype, t, weighted, 1, i, out);
    return i;
}

static void reduce(ep_dtype dtype, const void *const *rows, const float *weights, size_t n,
                   const void *bias0, const void *bias1, size_t hidden, void *out)
{
    struct epi_terms t = epi_terms_of(rows, weights, n, bias0, bias1);
    size_t done = t.weights ? BY_DTYPE(dtype, reduce_row, &t, true, hidden, out)
                            : BY_DTYPE(dtype, reduce_row, &t, false, hidden, out);
    if (done < hidden)
        epi_reduce_scalar(dtype, &t, done, hidden, out);
}

EPI_INLINE size_t scale_row(ep_dtype dtype, const char *x, float w, size_t hidden, char *out)
{
    size_t i = 0;
    v_float factor = v_set_f(w);
    for (; i + PAIR <= hidden; i += PAIR) {
        struct pair y = load_pair(dtype, x + i * size_of(dtype));
        y.a = v_mul_f(factor, y.a);
        y.b = v_mul_f(factor, y.b);
        store_pair(dtype, out + i * size_of(dtype), y);
    }
    return i;
}

static void scale(ep_dtype dtype, const void *x, float w, size_t hidden, void *out)
{
    size_t done = BY_DTYPE(dtype, scale_row, x, w, hidden, out), at = done * size_of(dtype);
    epi_codec_scalar.scale(dtype, (const char *)x + at, w, hidden - done, (char *)out + at);
}

EPI_INLINE float dot_row(ep_dtype dtype, const char *a, const char *b, size_t hidden)
{
    enum { PARTS = 16 / V_LANES };
    const size_t size = size_of(dtype);
    float lanes[16];
    size_t i = 0;
    v_float acc[PARTS];
    for (int k = 0; k < PARTS; k++)
        acc[k] = v_set_f(0.0f);
    for (; i + 16 <= hidden; i += 16)
        for (int k = 0; k < PARTS; k++) {
            size_t at = (i + k * V_LANES) * size;
            acc[k] = v_fma_f(load_one(dtype, a + at), load_one(dtype, b + at), acc[k]);
        }
    for (int k = 0; k < PARTS; k++)
        v_store_f(lanes + k * V_LANES, acc[k]);
    return epi_dot_rest(dtype, a + i * size, b + i * size, hidden - i, lanes);
}

static float dot(ep_dtype dtype, const void *a, const void *b, size_t hidden)
{
    return BY_DTYPE(dtype, dot_row, a, b, hidden);
}

EPI_INLINE size_t convert_to(ep_dtype to, ep_dtype from, const char *x, size_t n, char *out)
{
    size_t i = 0;
    for (; i + V_LANES <= n; i += V_LANES)
        store_one(to, out + i * size_of(to), load_one(from, x + i * size_of(from)));
    return i;
}

EPI_INLINE size_t convert_from(ep_dtype from, const char *x, ep_dtype to, size_t n, char *out)
{
    return BY_DTYPE(to, convert_to, from, x, n, out);
}

static void convert(ep_dtype from, const void *x, ep_dtype to, size_t n, void *out)
{
    size_t done = BY_DTYPE(from, convert_from, x, to, n, out);
    epi_codec_scalar.convert(from, (const char *)x + done * size_of(from), to, n - done,
                             (char *)out + done * size_of(to));
}
