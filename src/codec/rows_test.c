/* SPDX-License-Identifier: MIT */
/*
 * Row kernels. Every path against the scalar one, bit for bit, for all lengths,
 * alignments and adversarial rows; the scalar one against references in double.
 * ctest-timeout: 300
 */
#include "codec/rows.h"

#include "codec/scalar.h"
#include "support/random.h"
#include "support/test.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define MAX_HIDDEN 7171
#define GUARD 64 /* bytes around an output that must stay as they were */
#define MAX_ROWS 256

static const ep_dtype dtypes[] = {EP_BF16, EP_F16, EP_F32};
static const size_t big[] = {384, 511, 512, 1000, 1024, 2880, 4095, 7168, MAX_HIDDEN};

static struct rng rng;

/* Lengths 1..300 and some larger ones. */
static size_t length(size_t i)
{
    return i < 300 ? i + 1 : big[i - 300];
}
#define LENGTHS (300 + sizeof big / sizeof *big)

/* ------------------------------------------------------------------ rows */

enum kind { NORMAL, BITS, FINITE_BITS, TIES, ZEROS, TINY, MIXED, KINDS };

static void put(ep_dtype dtype, char *row, size_t i, float value)
{
    uint16_t code = dtype == EP_BF16 ? epi_to_bf16(value) : epi_to_f16(value);
    if (dtype == EP_F32)
        memcpy(row + 4 * i, &value, 4);
    else
        memcpy(row + 2 * i, &code, 2);
}

static float get(ep_dtype dtype, const void *row, size_t i)
{
    uint16_t code;
    float value;
    if (dtype == EP_F32) {
        memcpy(&value, (const char *)row + 4 * i, 4);
        return value;
    }
    memcpy(&code, (const char *)row + 2 * i, 2);
    return dtype == EP_BF16 ? epi_from_bf16(code) : epi_from_f16(code);
}

/* A value on, or one step beside, a midpoint between two E4M3 codes. */
static float tie(void)
{
    uint8_t code = (uint8_t)rng_below(&rng, 0x7e);
    float value = (epi_from_e4m3(code) + epi_from_e4m3(code + 1)) / 2;
    switch (rng_below(&rng, 4)) {
    case 0:
        value = nextafterf(value, 0);
        break;
    case 1:
        value = nextafterf(value, 1e9f);
        break;
    default:
        break;
    }
    return rng_below(&rng, 2) ? -value : value;
}

static float value_of(enum kind kind, size_t i)
{
    static const float odd[] = {0,      -0.0f,   INFINITY, -INFINITY,    NAN,      FLT_MAX,
                                -1e38f, FLT_MIN, 1e-45f,   -65504,       6e-8f,    1e-4f,
                                448,    -448,    1,        0.999999940f, 1.0f / 3, -1e-30f};
    switch (kind) {
    case NORMAL:
        return (float)((rng_unit(&rng) - 0.5) * 8);
    case TIES: /* amax 448, so that the scale is 1 and midpoints reach the rounding as they are */
        return i % 128 == 0 ? 448.0f : tie();
    case TINY:
        return (float)((rng_unit(&rng) - 0.5) * 1e-4);
    case MIXED:
        return odd[rng_below(&rng, sizeof odd / sizeof *odd)];
    default:
        return 0;
    }
}

static void fill(ep_dtype dtype, enum kind kind, size_t n, char *row)
{
    size_t size = ep_dtype_size(dtype);
    for (size_t i = 0; i < n; i++) {
        if (kind == BITS || kind == FINITE_BITS) {
            uint32_t bits = (uint32_t)rng_next(&rng);
            memcpy(row + i * size, &bits, size);
            if (kind == FINITE_BITS && !isfinite(get(dtype, row, i)))
                put(dtype, row, i, 1);
        } else {
            put(dtype, row, i, value_of(kind, i));
        }
    }
}

/* A row of n elements at an address `off` bytes past alignment. */
static char *make_row(ep_dtype dtype, enum kind kind, size_t n, size_t off)
{
    char *memory = malloc(n * 4 + 64);
    assert_non_null(memory);
    fill(dtype, kind, n, memory + off);
    return memory;
}

/* ---------------------------------------------------------- output checks */

struct output {
    unsigned char *memory, *at;
    size_t bytes;
};

static struct output output_new(size_t bytes, size_t off)
{
    struct output o = {aligned_alloc(64, (bytes + off + 2 * GUARD + 63) / 64 * 64), NULL, bytes};
    assert_non_null(o.memory);
    memset(o.memory, 0xa5, bytes + off + 2 * GUARD);
    o.at = o.memory + GUARD + off;
    return o;
}

/* Same bytes, nothing written outside; frees both. */
static void output_compare(struct output want, struct output got, const char *what, ep_dtype dtype,
                           size_t hidden, enum kind kind)
{
    for (size_t i = 0; i < got.bytes; i++)
        if (want.at[i] != got.at[i])
            fail_msg("%s of %s, hidden %zu, kind %d: byte %zu is %02x, not %02x", what,
                     ep_dtype_string(dtype), hidden, (int)kind, i, got.at[i], want.at[i]);
    for (unsigned char *p = got.memory; p < got.at; p++)
        assert_int_equal(*p, 0xa5);
    for (size_t i = 0; i < GUARD; i++)
        assert_int_equal(got.at[got.bytes + i], 0xa5);
    free(want.memory);
    free(got.memory);
}

/* ------------------------------------------- each path against the scalar */

typedef void check_fn(const struct epi_codec *c, ep_dtype dtype, size_t hidden, enum kind kind,
                      size_t off);

static void check_quantise(const struct epi_codec *c, ep_dtype dtype, size_t hidden, enum kind kind,
                           size_t off)
{
    const struct epi_codec *s = epi_codec_of(EPI_ISA_SCALAR);
    char *row = make_row(dtype, kind, hidden, off);
    for (int form = EP_SCALE_F32; form <= EP_SCALE_UE8M0; form++) {
        size_t bytes = epi_scale_bytes((ep_scale)form, hidden);
        struct output q0 = output_new(hidden, off), q1 = output_new(hidden, off);
        struct output s0 = output_new(bytes, off), s1 = output_new(bytes, off);
        s->quantise(row + off, dtype, hidden, (ep_scale)form, q0.at, s0.at, false);
        c->quantise(row + off, dtype, hidden, (ep_scale)form, q1.at, s1.at, off % 3 == 0);
        c->fence();
        struct output d0 = output_new(hidden * ep_dtype_size(dtype), off);
        struct output d1 = output_new(hidden * ep_dtype_size(dtype), off);
        s->dequantise(q0.at, s0.at, (ep_scale)form, hidden, dtype, d0.at);
        c->dequantise(q1.at, s1.at, (ep_scale)form, hidden, dtype, d1.at);
        output_compare(s0, s1, "scales", dtype, hidden, kind);
        output_compare(q0, q1, "codes", dtype, hidden, kind);
        output_compare(d0, d1, "dequantised", dtype, hidden, kind);
    }
    free(row);
}

static void check_reduce(const struct epi_codec *c, ep_dtype dtype, size_t hidden, enum kind kind,
                         size_t off)
{
    const struct epi_codec *s = epi_codec_of(EPI_ISA_SCALAR);
    char *memory[8];
    const void *rows[8];
    float weights[8];
    for (int r = 0; r < 8; r++) {
        memory[r] = make_row(dtype, kind, hidden, (off + (size_t)r) % 32);
        rows[r] = memory[r] + (off + (size_t)r) % 32;
        weights[r] = kind == BITS ? epi_float((uint32_t)rng_next(&rng)) : (float)rng_unit(&rng);
    }
    for (int form = 0; form < 8; form++) {
        size_t n = form < 3 ? (size_t)form : rng_below(&rng, 7), bytes = ep_dtype_size(dtype);
        const float *w = rng_below(&rng, 2) ? weights : NULL;
        const void *bias0 = form & 1 ? rows[6] : NULL, *bias1 = form & 2 ? rows[7] : NULL;
        struct output o0 = output_new(hidden * bytes, off), o1 = output_new(hidden * bytes, off);
        s->reduce(dtype, rows, w, n, bias0, bias1, hidden, o0.at);
        c->reduce(dtype, rows, w, n, bias0, bias1, hidden, o1.at);
        output_compare(o0, o1, w ? "weighted sum" : "sum", dtype, hidden, kind);
    }
    for (int r = 0; r < 8; r++)
        free(memory[r]);
}

static void check_elementwise(const struct epi_codec *c, ep_dtype dtype, size_t hidden,
                              enum kind kind, size_t off)
{
    const struct epi_codec *s = epi_codec_of(EPI_ISA_SCALAR);
    char *row = make_row(dtype, kind, hidden, off), *other = make_row(dtype, kind, hidden, off);
    size_t size = ep_dtype_size(dtype);
    float w = kind == BITS ? epi_float((uint32_t)rng_next(&rng)) : (float)rng_unit(&rng);
    struct output o0 = output_new(hidden * size, off), o1 = output_new(hidden * size, off);
    s->scale(dtype, row + off, w, hidden, o0.at);
    c->scale(dtype, row + off, w, hidden, o1.at);
    output_compare(o0, o1, "scaled", dtype, hidden, kind);
    for (size_t t = 0; t < 3; t++) {
        o0 = output_new(hidden * ep_dtype_size(dtypes[t]), off);
        o1 = output_new(hidden * ep_dtype_size(dtypes[t]), off);
        s->convert(dtype, row + off, dtypes[t], hidden, o0.at);
        c->convert(dtype, row + off, dtypes[t], hidden, o1.at);
        output_compare(o0, o1, "converted", dtype, hidden, kind);
    }
    uint32_t want = epi_bits(s->dot(dtype, row + off, other + off, hidden));
    assert_int_equal(epi_bits(c->dot(dtype, row + off, other + off, hidden)), want);
    free(row);
    free(other);
}

static void check_copy(const struct epi_codec *c, ep_dtype dtype, size_t hidden, enum kind kind,
                       size_t off)
{
    char *row = make_row(dtype, kind, hidden, off);
    size_t bytes = hidden * ep_dtype_size(dtype) - (hidden & 1);
    for (size_t to = 0; to < 64; to += 1 + off % 7) {
        struct output o0 = output_new(bytes, to), o1 = output_new(bytes, to);
        memcpy(o0.at, row + off, bytes);
        c->copy(o1.at, row + off, bytes, to % 2 == 0);
        c->fence();
        output_compare(o0, o1, "copied", dtype, hidden, kind);
    }
    free(row);
}

/*
 * All lengths at random alignments and at none. Every kind of row up to 140, past
 * a whole block; then one in turn, which keeps sanitizer builds quick.
 */
static void for_each_path(check_fn *check)
{
    rng_seed(&rng, rng_env_seed(11));
    for (int isa = EPI_ISA_SCALAR + 1; isa < EPI_ISA_COUNT; isa++) {
        const struct epi_codec *c = epi_codec_of((enum epi_isa)isa);
        if (!c) {
            print_message("this processor lacks path %d\n", isa);
            continue;
        }
        for (size_t i = 0; i < LENGTHS; i++)
            for (size_t d = 0; d < 3; d++)
                for (int kind = 0; kind < KINDS; kind++)
                    if (i < 140 || kind == (int)((i + d) % KINDS))
                        check(c, dtypes[d], length(i), (enum kind)kind,
                              kind % 2 ? 0 : rng_below(&rng, 64));
    }
}

static void quantise_paths(void **state)
{
    (void)state;
    for_each_path(check_quantise);
}

static void reduce_paths(void **state)
{
    (void)state;
    for_each_path(check_reduce);
}

static void elementwise_paths(void **state)
{
    (void)state;
    for_each_path(check_elementwise);
}

static void copy_paths(void **state)
{
    (void)state;
    for_each_path(check_copy);
}

/* Every code of a 16-bit type through every conversion, and every E4M3 code times scales. */
static void every_code_on_every_path(void **state)
{
    (void)state;
    uint16_t *codes = malloc(65536 * 2);
    assert_non_null(codes);
    for (uint32_t i = 0; i < 65536; i++)
        codes[i] = (uint16_t)i;
    for (int isa = 1; isa < EPI_ISA_COUNT; isa++) {
        const struct epi_codec *c = epi_codec_of((enum epi_isa)isa), *s = epi_codec_of(0);
        for (size_t i = 0; c && i < 9; i++) {
            size_t bytes = 65536 * ep_dtype_size(dtypes[i % 3]);
            struct output o0 = output_new(bytes, 0), o1 = output_new(bytes, 0);
            s->convert(dtypes[i / 3 % 2], codes, dtypes[i % 3], 65536, o0.at);
            c->convert(dtypes[i / 3 % 2], codes, dtypes[i % 3], 65536, o1.at);
            output_compare(o0, o1, "every code", dtypes[i % 3], 65536, BITS);
        }
        for (int e = 0; c && e < 256; e++) {
            uint8_t q[256];
            float scales[2] = {epi_from_ue8m0((uint8_t)e), epi_float((uint32_t)e << 23 | 0x654321)};
            for (int i = 0; i < 256; i++)
                q[i] = (uint8_t)(i / 2 + i % 2 * 128);
            for (size_t d = 0; d < 3; d++) {
                struct output o0 = output_new(1024, 0), o1 = output_new(1024, 0);
                s->dequantise(q, scales, EP_SCALE_F32, 256, dtypes[d], o0.at);
                c->dequantise(q, scales, EP_SCALE_F32, 256, dtypes[d], o1.at);
                output_compare(o0, o1, "every E4M3 code", dtypes[d], 256, BITS);
            }
        }
    }
    free(codes);
}

/* -------------------------------------------- the scalar path in double */

/* Nearest E4M3 code by search; ties to even. */
static uint8_t nearest_e4m3(float y)
{
    int best = 0;
    for (int code = 1; code < 0x7f; code++) {
        double d = fabs(fabs((double)y) - (double)epi_from_e4m3((uint8_t)code));
        double least = fabs(fabs((double)y) - (double)epi_from_e4m3((uint8_t)best));
        if (d < least || (d == least && code % 2 == 0))
            best = code;
    }
    return (uint8_t)(isnan(y) ? 0x7f : best | (signbit(y) ? 0x80 : 0));
}

static void quantise_reference(void **state)
{
    (void)state;
    static char row[1000 * 4];
    uint8_t q[1000];
    float scales[8] = {0};
    uint32_t words[2] = {0};
    rng_seed(&rng, rng_env_seed(12));
    for (int round = 0; round < 30; round++) {
        ep_dtype dtype = dtypes[round % 3];
        size_t n = round < 3 ? 1000 : 1 + rng_below(&rng, 1000);
        fill(dtype, round % 2 ? NORMAL : FINITE_BITS, n, row);
        for (int form = 0; form < 3; form++) {
            const struct epi_codec *s = epi_codec_of(EPI_ISA_SCALAR);
            s->quantise(row, dtype, n, (ep_scale)form, q, form == 2 ? (void *)words : scales, 0);
            for (size_t b = 0; b < n; b += 128) {
                double amax = 1e-4f;
                for (size_t i = b; i < n && i < b + 128; i++)
                    amax = fmax(amax, fabs((double)get(dtype, row, i)));
                float scale = (float)(amax / 448), inverse = (float)(448 / amax);
                if (form != EP_SCALE_F32) {
                    scale = (float)exp2(ceil(log2((double)scale)));
                    inverse = 1 / scale;
                }
                float stored = scales[b / 128];
                if (form == EP_SCALE_UE8M0)
                    stored = ldexpf(1, (int)(words[b / 512] >> b / 128 % 4 * 8 & 255) - 127);
                assert_true(stored == scale);
                for (size_t i = b; i < n && i < b + 128; i++)
                    assert_int_equal(q[i], nearest_e4m3(get(dtype, row, i) * inverse));
            }
            if (form == EP_SCALE_UE8M0 && (n + 127) / 128 % 4)
                assert_int_equal(words[(n - 1) / 512] >> (n + 127) / 128 % 4 * 8, 0);
        }
    }
}

/* What an infinity or NaN of one element does to its block, and to no other. */
static void quantise_special(void **state)
{
    (void)state;
    float row[256], back[256], scales[2];
    uint8_t q[256];
    for (int isa = 0; isa < EPI_ISA_COUNT; isa++) {
        const struct epi_codec *c = epi_codec_of((enum epi_isa)isa);
        for (int form = 0; c && form < 3; form++) {
            for (int i = 0; i < 256; i++)
                row[i] = (float)(i % 100) - 50;
            row[3] = NAN;
            c->quantise(row, EP_F32, 256, (ep_scale)form, q, scales, false);
            c->dequantise(q, scales, (ep_scale)form, 256, EP_F32, back);
            for (int i = 0; i < 256; i++)
                assert_true(i == 3 ? isnan(back[i]) : fabsf(back[i] - row[i]) <= 2);
            row[3] = -INFINITY;
            c->quantise(row, EP_F32, 256, (ep_scale)form, q, scales, false);
            c->dequantise(q, scales, (ep_scale)form, 256, EP_F32, back);
            for (int i = 0; i < 256; i++)
                assert_true(i < 128 ? isnan(back[i]) : fabsf(back[i] - row[i]) <= 2);
        }
    }
}

/* float32 sums in the order given, each step rounded from double. */
static void reduce_reference(void **state)
{
    (void)state;
    static char rows[MAX_ROWS][40 * 4];
    const void *pointers[MAX_ROWS];
    float weights[MAX_ROWS], out[40];
    const struct epi_codec *s = epi_codec_of(EPI_ISA_SCALAR);
    rng_seed(&rng, rng_env_seed(13));
    for (size_t n = 0; n <= MAX_ROWS; n += n < 10 ? 1 : 41) {
        for (size_t r = 0; r < MAX_ROWS; r++) {
            fill(EP_F32, NORMAL, 40, rows[r]);
            pointers[r] = rows[r];
            weights[r] = (float)((int)rng_below(&rng, 64) - 32) / 64; /* products exact in double */
        }
        for (int form = 0; form < 8; form++) {
            const float *w = form & 1 ? weights : NULL;
            const void *b0 = form & 2 ? rows[254] : NULL, *b1 = form & 4 ? rows[255] : NULL;
            s->reduce(EP_F32, pointers, w, n, b0, b1, 40, out);
            for (size_t i = 0; i < 40; i++) {
                float acc = 0;
                for (size_t r = 0; r < n; r++)
                    acc = (float)((double)acc +
                                  (w ? (double)w[r] : 1.0) * (double)get(EP_F32, rows[r], i));
                acc = b0 ? (float)((double)acc + (double)get(EP_F32, b0, i)) : acc;
                acc = b1 ? (float)((double)acc + (double)get(EP_F32, b1, i)) : acc;
                assert_true(out[i] == acc);
            }
        }
    }
}

/* One term keeps its value, the sign of zero included; no term gives +0. */
static void reduce_edges(void **state)
{
    (void)state;
    uint16_t zero[64], out[64];
    const void *rows[1] = {zero};
    for (int i = 0; i < 64; i++)
        zero[i] = 0x8000;
    for (int isa = 0; isa < EPI_ISA_COUNT; isa++) {
        const struct epi_codec *c = epi_codec_of((enum epi_isa)isa);
        if (!c)
            continue;
        c->reduce(EP_BF16, rows, NULL, 1, NULL, NULL, 64, out);
        assert_int_equal(out[0] & out[63], 0x8000);
        c->reduce(EP_BF16, NULL, NULL, 0, NULL, zero, 64, out);
        assert_int_equal(out[0] & out[63], 0x8000);
        c->reduce(EP_BF16, NULL, NULL, 0, NULL, NULL, 64, out);
        assert_int_equal(out[0] | out[63], 0);
        c->reduce(EP_BF16, rows, NULL, 1, NULL, NULL, 0, NULL);
    }
}

static void dot_reference(void **state)
{
    (void)state;
    static float a[MAX_HIDDEN], b[MAX_HIDDEN];
    const struct epi_codec *s = epi_codec_of(EPI_ISA_SCALAR);
    rng_seed(&rng, rng_env_seed(14));
    fill(EP_F32, NORMAL, MAX_HIDDEN, (char *)a);
    fill(EP_F32, NORMAL, MAX_HIDDEN, (char *)b);
    for (size_t i = 0; i < LENGTHS; i++) {
        double sum = 0, magnitude = 0;
        for (size_t k = 0; k < length(i); k++) {
            sum += (double)a[k] * (double)b[k];
            magnitude += fabs((double)a[k] * (double)b[k]);
        }
        double got = (double)s->dot(EP_F32, a, b, length(i));
        assert_true(fabs(got - sum) <= magnitude * 1e-5);
    }
    assert_int_equal(epi_bits(s->dot(EP_F32, a, b, 0)), 0);
}

/* ------------------------------------------------------------- the choice */

static void choice_of_path(void **state)
{
    (void)state;
    char note[EPI_ISA_NOTE_BYTES];
    const struct epi_codec *best = epi_codec_named(NULL, note, sizeof note);
    assert_string_equal(note, "");
    assert_ptr_equal(epi_codec_named("", note, sizeof note), best);
    assert_string_equal(note, "");
    assert_string_equal(epi_codec_named("scalar", note, sizeof note)->name, "scalar");
    assert_string_equal(note, "");
    assert_ptr_equal(epi_codec_named("sse9", note, sizeof note), best);
    assert_non_null(strstr(note, "EP_ISA=sse9 is not scalar, avx2 or avx512; using "));
    for (int isa = 0; isa < EPI_ISA_COUNT; isa++) {
        const struct epi_codec *c = epi_codec_of((enum epi_isa)isa);
        assert_int_equal(epi_codec_select((enum epi_isa)isa), c != NULL);
        if (c)
            assert_ptr_equal(epi_codec(), c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quantise_paths),
        cmocka_unit_test(reduce_paths),
        cmocka_unit_test(elementwise_paths),
        cmocka_unit_test(copy_paths),
        cmocka_unit_test(every_code_on_every_path),
        cmocka_unit_test(quantise_reference),
        cmocka_unit_test(quantise_special),
        cmocka_unit_test(reduce_reference),
        cmocka_unit_test(reduce_edges),
        cmocka_unit_test(dot_reference),
        cmocka_unit_test(choice_of_path),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
