/* SPDX-License-Identifier: MIT */
/*
 * LogFMT-10: logarithm and power against double, encoded rows against a float64
 * reference that follows the published formulas, and every path against the
 * scalar one.
 */
#include "codec/logfmt.h"

#include "codec/rows.h"
#include "support/random.h"
#include "support/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct rng rng;

/* Error beyond the rounding of the result itself, half an ulp. */
static double log2_excess(float x)
{
    double want = log2((double)x), error = fabs((double)epi_log2(x) - want);
    return error - ldexp(1, want ? ilogb(want) - 24 : -100);
}

static void logarithm(void **state)
{
    (void)state;
    double worst = 0;
    for (uint32_t code = 1; code < 0x7f80; code++)
        worst = fmax(worst, log2_excess(epi_from_bf16((uint16_t)code)));
    for (int i = 0; i < 300000; i++)
        worst = fmax(worst, log2_excess(epi_float(1 + (uint32_t)rng_below(&rng, EPI_F32_INF - 1))));
    print_message("log2: worst error %.2e beyond half an ulp\n", worst);
    assert_true(worst < 1e-7);
    for (int e = -149; e < 128; e++)
        assert_true(epi_log2(ldexpf(1, e)) == (float)e);
}

static void power(void **state)
{
    (void)state;
    double worst = 0;
    for (int i = 0; i < 300000; i++) {
        float v = -126 + (float)rng_unit(&rng) * 189;
        double want = exp2((double)v);
        worst = fmax(worst, fabs((double)epi_exp2(v) - want) / want);
    }
    print_message("exp2: worst relative error %.2e\n", worst);
    assert_true(worst < 1e-7);
    for (int e = -149; e < 64; e++)
        assert_true(epi_exp2((float)e) == ldexpf(1, e));
    assert_true(epi_exp2(-151) == 0 && epi_exp2(-190) == 0);
}

/* -------------------------------------------------------------- reference */

struct grid {
    double la, li, step;
};

static double magnitude(uint16_t code)
{
    return fabs((double)epi_from_bf16(code));
}

/* Whether n channels qualify; their grid. */
static int grid_of(const uint16_t *x, size_t n, struct grid *g)
{
    double amax = 0, amin = INFINITY;
    for (size_t i = 0; i < n; i++) {
        double m = magnitude(x[i]);
        if (!isfinite(m))
            return 0;
        amax = fmax(amax, m);
        amin = m > 0 ? fmin(amin, m) : amin;
    }
    if (amax == 0)
        return 0;
    g->la = log2(amax);
    g->li = fmax(log2(amin), g->la - 32);
    g->step = (g->la - g->li) / 510;
    return g->la < 0 && g->li < g->la;
}

static double position(const struct grid *g, double m)
{
    return (log2(m) - g->li) / g->step + 2 - log2((1 + exp2(g->step)) / 2) / g->step;
}

/*
 * A value may come back as any code within float32 error of its position, here
 * 1e-5 of an octave; then it must be that code's power, within a BF16 rounding.
 */
static void check_value(const struct grid *g, uint16_t x, uint16_t back)
{
    double slack = 1e-5 / g->step, p = x & 0x7fff ? position(g, magnitude(x)) : 0;
    double low = floor(fmax(0, p - slack)), high = fmin(511, floor(fmax(0, p + slack)));
    int found = 0;
    assert_int_equal(x & 0x8000, back & 0x8000);
    if ((x & 0x7fff) == 0) {
        assert_int_equal(back, x);
        return;
    }
    for (double code = low; code <= high && !found; code++) {
        double want = code > 0 ? exp2((code - 1) * g->step + g->li) : 0;
        double ulp = fmax(ldexp(1, -133), want * ldexp(1, -7));
        found = fabs(magnitude(back) - want) <= ulp * 0.51;
    }
    if (!found)
        fail_msg("%04x came back as %04x, position %f in [%f, %f]", x, back, p, g->li, g->la);
}

static size_t chunk_of(size_t hidden)
{
    return hidden % 1024 ? 512 : 1024;
}

/* Expected bytes of a row; checks the decoded values chunk by chunk. */
static size_t check_row(const uint16_t *x, const uint16_t *back, size_t hidden)
{
    size_t chunk = chunk_of(hidden), chunks = (hidden + chunk - 1) / chunk;
    size_t bytes = (chunks + 31) / 32 * 4;
    for (size_t c = 0; c < hidden; c += chunk) {
        size_t n = hidden - c < chunk ? hidden - c : chunk, coded = 0;
        int qualifies = 1;
        struct grid g;
        for (size_t b = 0; b < n; b += 128) {
            size_t width = n - b < 128 ? n - b : 128;
            coded += 4 + width + 2 * ((width + 7) / 8);
            qualifies &= grid_of(x + c + b, width, &g);
        }
        if (!qualifies || coded >= 2 * n) {
            assert_memory_equal(x + c, back + c, 2 * n);
            bytes += 2 * n;
            continue;
        }
        for (size_t i = 0; i < n; i++) {
            if (i % 128 == 0)
                grid_of(x + c + i, n - i < 128 ? n - i : 128, &g);
            check_value(&g, x[c + i], back[c + i]);
        }
        bytes += coded;
    }
    return bytes;
}

/* ------------------------------------------------------------------- rows */

enum kind { SMALL, WIDE, NEAR_ONE, NARROW, SUBNORMAL, SPARSE, SOME_LARGE, BITS, KINDS };

static uint16_t value_of(enum kind kind)
{
    double sign = rng_below(&rng, 2) ? -1 : 1, u = rng_unit(&rng);
    switch (kind) {
    case SMALL:
        return epi_to_bf16((float)(sign * u * 0.1));
    case WIDE: /* far more than 32 octaves */
        return epi_to_bf16((float)(sign * exp2(-125 * u)));
    case NEAR_ONE:
        return (uint16_t)(0x3f7f - rng_below(&rng, 3));
    case NARROW: /* two neighbouring codes somewhere */
        return (uint16_t)(0x2000 + rng_below(&rng, 2));
    case SUBNORMAL:
        return (uint16_t)(rng_below(&rng, 0x100) | rng_below(&rng, 2) << 15);
    case SPARSE:
        return (uint16_t)(u < 0.7 ? (u < 0.35 ? 0 : 0x8000) : epi_to_bf16((float)(u - 0.7)));
    case SOME_LARGE: /* about one chunk in two does not qualify */
        return u < 0.001 ? epi_to_bf16((float)(1 + u)) : epi_to_bf16((float)(sign * u * 0.9));
    default:
        return (uint16_t)rng_next(&rng);
    }
}

static void check_encoding(const uint16_t *x, size_t hidden, size_t off)
{
    size_t most = epi_logfmt_row_bytes(hidden), used = 0;
    unsigned char *row = malloc(most), *other = malloc(most + off + 1);
    uint16_t *back = malloc(hidden * 2), *again = malloc(hidden * 2 + 2);
    assert_true(row && other && back && again);
    for (int isa = 0; isa < EPI_ISA_COUNT; isa++) {
        const struct epi_codec *c = epi_codec_of((enum epi_isa)isa);
        if (isa == 0) {
            used = c->logfmt_encode(x, hidden, row);
            c->logfmt_decode(row, hidden, back);
            assert_true(used <= most);
            assert_int_equal(epi_logfmt_used_bytes(row, hidden), used);
            assert_int_equal(check_row(x, back, hidden), used);
        } else if (c) {
            memset(other, 0xa5, most + off + 1);
            assert_int_equal(c->logfmt_encode(x, hidden, other + off), used);
            assert_memory_equal(row, other + off, used);
            assert_int_equal(other[off + used], 0xa5);
            /* again is one byte off alignment: rows arrive anywhere */
            uint16_t *unaligned = (uint16_t *)((char *)again + off % 2);
            c->logfmt_decode(other + off, hidden, unaligned);
            assert_memory_equal(back, unaligned, hidden * 2);
        }
    }
    free(row);
    free(other);
    free(back);
    free(again);
}

static void round_trip(void **state)
{
    (void)state;
    static const size_t lengths[] = {1,    2,    3,    5,    6,    7,    8,    9,    64,   127,
                                     128,  129,  136,  255,  500,  511,  512,  513,  640,  1000,
                                     1023, 1024, 1027, 1536, 2048, 2880, 4096, 5121, 7168, 7171};
    static uint16_t x[7171];
    rng_seed(&rng, rng_env_seed(21));
    for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
        for (int kind = 0; kind < KINDS; kind++)
            for (size_t repeat = 0; repeat < 4; repeat++) {
                for (size_t i = 0; i < lengths[l]; i++)
                    x[i] = value_of((enum kind)kind);
                check_encoding(x, lengths[l], repeat);
            }
}

/* Every BF16 magnitude below one, between each of some least and largest ones. */
static void every_magnitude(void **state)
{
    (void)state;
    static const uint16_t ends[][2] = {{0x0001, 0x3f7f}, {0x0080, 0x3f7f}, {0x2f80, 0x3f7f},
                                       {0x2f7f, 0x3f7f}, {0x3a00, 0x3f00}, {0x0001, 0x0085},
                                       {0x0080, 0x1100}, {0x3f00, 0x3f7f}};
    uint16_t x[128];
    for (size_t e = 0; e < sizeof ends / sizeof *ends; e++)
        for (uint32_t code = ends[e][0]; code <= ends[e][1]; code += 126) {
            for (uint32_t i = 0; i < 126; i++)
                x[i] = (uint16_t)(code + i <= ends[e][1] ? code + i : 0);
            x[126] = ends[e][0];
            x[127] = ends[e][1];
            check_encoding(x, 128, 0);
        }
}

/* What disqualifies a chunk, and only that chunk. */
static void qualification(void **state)
{
    (void)state;
    static const uint16_t bad[] = {0x3f80, 0xbf80, 0x7f80, 0xff80, 0x7fc0, 0xffff};
    static uint16_t x[2048];
    static uint8_t row[4 + 4096];
    const struct epi_codec *s = epi_codec_of(EPI_ISA_SCALAR);
    for (size_t i = 0; i < 2048; i++)
        x[i] = (uint16_t)(0x3c00 + i % 100);
    assert_int_equal(s->logfmt_encode(x, 2048, row), 4 + 16 * 164);
    assert_int_equal(row[0], 3);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        x[1500] = bad[i];
        assert_int_equal(s->logfmt_encode(x, 2048, row), 4 + 8 * 164 + 2048);
        assert_int_equal(row[0], 1);
    }
    x[1500] = 0x3c00;
    for (size_t i = 128; i < 256; i++)
        x[i] = 0; /* a block of zeros has no li */
    s->logfmt_encode(x, 2048, row);
    assert_int_equal(row[0], 2);
    for (size_t i = 128; i < 256; i++)
        x[i] = 0x3c00 | (i & 1) << 15; /* nor has one of a single magnitude li < la */
    s->logfmt_encode(x, 2048, row);
    assert_int_equal(row[0], 2);
}

/* The bytes of a row, written out from the layout in logfmt.h. */
static void layout(void **state)
{
    (void)state;
    uint16_t x[10] = {0x3f00, 0xbe80, 0, 0x3e80, 0x3f00, 0x3f00, 0x3f00, 0x3f00, 0xbf00, 0x8000};
    static const uint8_t want[] = {1,    0,    0,    0,    0x00, 0x3f, 0x80, 0x3e,
                                   0xff, 0x01, 0x00, 0x01, 0xff, 0xff, 0xff, 0xff,
                                   0xff, 0x00, 0xf1, 0x01, 0x02, 0x03};
    uint8_t row[64];
    for (int isa = 0; isa < EPI_ISA_COUNT; isa++) {
        const struct epi_codec *c = epi_codec_of((enum epi_isa)isa);
        memset(row, 0x55, sizeof row);
        if (c) {
            assert_int_equal(c->logfmt_encode(x, 10, row), sizeof want);
            assert_memory_equal(row, want, sizeof want);
        }
    }
}

/* Decoding garbage reads no further than a row's largest size, whatever its flags say. */
static void garbage(void **state)
{
    (void)state;
    rng_seed(&rng, rng_env_seed(22));
    for (int round = 0; round < 2000; round++) {
        size_t hidden = 1 + rng_below(&rng, 3000), bytes = epi_logfmt_row_bytes(hidden);
        uint8_t *row = malloc(bytes);
        uint16_t *back = malloc(hidden * 2), *again = malloc(hidden * 2);
        assert_true(row && back && again);
        for (size_t i = 0; i < bytes; i++)
            row[i] = (uint8_t)rng_next(&rng);
        assert_true(epi_logfmt_used_bytes(row, hidden) <= bytes);
        epi_codec_of(EPI_ISA_SCALAR)->logfmt_decode(row, hidden, back);
        for (int isa = 1; isa < EPI_ISA_COUNT; isa++)
            if (epi_codec_of((enum epi_isa)isa)) {
                epi_codec_of((enum epi_isa)isa)->logfmt_decode(row, hidden, again);
                assert_memory_equal(back, again, hidden * 2);
            }
        free(row);
        free(back);
        free(again);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(logarithm),     cmocka_unit_test(power),
        cmocka_unit_test(round_trip),    cmocka_unit_test(every_magnitude),
        cmocka_unit_test(qualification), cmocka_unit_test(layout),
        cmocka_unit_test(garbage),
    };
    rng_seed(&rng, 20);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
