/* SPDX-License-Identifier: MIT */
/* The public codec functions: what they write, and the message of each bad argument. */
#include "entrepot/codec.h"

#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 3, HIDDEN = 200 };

static float x[ROWS * HIDDEN], back[ROWS * HIDDEN];
static uint8_t q[ROWS * HIDDEN];
static float scales[ROWS * 2];

static void fill(void)
{
    for (int i = 0; i < ROWS * HIDDEN; i++)
        x[i] = (float)((i * 37) % 97 - 48) / 64;
}

static void expect_error(ep_status got, const char *message)
{
    assert_int_equal(got, EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), message);
}

static void quantise_and_back(void **state)
{
    (void)state;
    fill();
    assert_int_equal(ep_scale_row_bytes(EP_SCALE_F32, HIDDEN), 8);
    assert_int_equal(ep_scale_row_bytes(EP_SCALE_UE8M0, HIDDEN), 4);
    assert_int_equal(ep_scale_row_bytes(EP_SCALE_UE8M0, 513), 8);
    assert_int_equal(ep_scale_row_bytes(EP_SCALE_F32, 0), 0);
    assert_int_equal(ep_scale_row_bytes((ep_scale)3, 128), 0);
    for (int scale = 0; scale < 3; scale++) {
        memset(back, 0, sizeof back);
        assert_int_equal(ep_quantise(x, EP_F32, ROWS, HIDDEN, (ep_scale)scale, q, scales), EP_OK);
        assert_int_equal(ep_dequantise(q, scales, (ep_scale)scale, ROWS, HIDDEN, EP_F32, back),
                         EP_OK);
        for (int i = 0; i < ROWS * HIDDEN; i++) /* half a step of 1/16, or of the least step */
            assert_true(back[i] - x[i] <= 0.0626f * (x[i] < 0 ? -x[i] : x[i]) + 1e-5f &&
                        x[i] - back[i] <= 0.0626f * (x[i] < 0 ? -x[i] : x[i]) + 1e-5f);
    }
    assert_int_equal(ep_quantise(NULL, EP_F32, 0, HIDDEN, EP_SCALE_F32, NULL, NULL), EP_OK);
}

static void convert_and_back(void **state)
{
    (void)state;
    uint16_t narrow[ROWS * HIDDEN];
    fill();
    for (int to = EP_BF16; to <= EP_F16; to++) { /* few enough bits for both */
        assert_int_equal(ep_convert(x, EP_F32, ROWS * HIDDEN, (ep_dtype)to, narrow), EP_OK);
        assert_int_equal(ep_convert(narrow, (ep_dtype)to, ROWS * HIDDEN, EP_F32, back), EP_OK);
        assert_memory_equal(x, back, sizeof x);
    }
    assert_int_equal(ep_convert(NULL, EP_F32, 0, EP_BF16, NULL), EP_OK);
}

static void logfmt_and_back(void **state)
{
    (void)state;
    uint16_t in[ROWS * HIDDEN], out[ROWS * HIDDEN];
    size_t used[ROWS], distance = ep_logfmt_row_bytes(HIDDEN);
    uint8_t *rows = calloc(ROWS, distance);
    assert_non_null(rows);
    fill();
    ep_convert(x, EP_F32, ROWS * HIDDEN, EP_BF16, in);
    in[HIDDEN] = 0x3f80; /* 1.0: the second row stays BF16 */
    assert_int_equal(distance, 4 + 2 * HIDDEN);
    assert_int_equal(ep_logfmt_encode(in, ROWS, HIDDEN, rows, used), EP_OK);
    assert_int_equal(used[0], 4 + 164 + 4 + 72 + 18);
    assert_int_equal(used[1], distance);
    assert_int_equal(ep_logfmt_decode(rows, used, ROWS, HIDDEN, out), EP_OK);
    assert_memory_equal(in + HIDDEN, out + HIDDEN, 2 * HIDDEN);
    for (int i = 0; i < HIDDEN; i++) /* the grid is finer than BF16 nearly everywhere */
        assert_true(abs(in[i] - out[i]) <= 2);
    used[2]++;
    assert_int_equal(ep_logfmt_decode(rows, used, ROWS, HIDDEN, out), EP_ERR_FORMAT);
    assert_string_equal(ep_last_error(), "ep_logfmt_decode: used[2] is 263; the flags of that row "
                                         "make 262");
    assert_int_equal(ep_logfmt_row_bytes(0), 0);
    assert_int_equal(ep_logfmt_row_bytes(-5), 0);
    free(rows);
}

static void bad_arguments(void **state)
{
    (void)state;
    uint16_t bf[8] = {0};
    expect_error(ep_quantise(x, EP_I32, 1, 8, EP_SCALE_F32, q, scales),
                 "ep_quantise: dtype is I32 (5); it must be BF16, F16 or F32");
    expect_error(ep_quantise(x, EP_F32, 1, 8, (ep_scale)7, q, scales),
                 "ep_quantise: scale is 7; it must be EP_SCALE_F32, EP_SCALE_POW2 or "
                 "EP_SCALE_UE8M0");
    expect_error(ep_quantise(x, EP_F32, 1, 0, EP_SCALE_F32, q, scales),
                 "ep_quantise: hidden is 0; it must be 1..2147483647");
    expect_error(ep_quantise(x, EP_F32, -1, 8, EP_SCALE_F32, q, scales),
                 "ep_quantise: rows is -1; it must be 0..2147483647, and at most 2^60 / hidden");
    expect_error(ep_quantise(NULL, EP_F32, 1, 8, EP_SCALE_F32, q, scales),
                 "ep_quantise: x is NULL");
    expect_error(ep_quantise(x, EP_F32, 1, 8, EP_SCALE_F32, NULL, scales),
                 "ep_quantise: q is NULL");
    expect_error(ep_quantise(x, EP_F32, 1, 8, EP_SCALE_F32, q, NULL),
                 "ep_quantise: scales is NULL");
    expect_error(ep_dequantise(q, scales, EP_SCALE_F32, 1, 8, EP_E4M3, back),
                 "ep_dequantise: dtype is E4M3 (4); it must be BF16, F16 or F32");
    expect_error(ep_dequantise(q, scales, EP_SCALE_F32, 1, 8, EP_F32, NULL),
                 "ep_dequantise: out is NULL");
    expect_error(ep_convert(x, EP_F32, 1, EP_U8, bf),
                 "ep_convert: to is U8 (7); it must be BF16, F16 or F32");
    expect_error(ep_convert(x, EP_F32, -2, EP_BF16, bf),
                 "ep_convert: count is -2; it must be 0..2^60");
    expect_error(ep_convert(x, EP_F32, 2, EP_BF16, NULL), "ep_convert: out is NULL");
    expect_error(ep_logfmt_encode(NULL, 1, 8, q, NULL), "ep_logfmt_encode: x is NULL");
    expect_error(ep_logfmt_encode(bf, 1, INT64_C(1) << 40, q, NULL),
                 "ep_logfmt_encode: hidden is 1099511627776; it must be 1..2147483647");
    expect_error(ep_logfmt_decode(q, NULL, 1, 8, NULL), "ep_logfmt_decode: out is NULL");
}

/* EP_ISA is read at the first use, so each value needs a process. */
static void environment(void **state)
{
    const char *self = *state;
    static const char *const values[] = {"", "scalar", "nonsense"};
    for (size_t i = 0; i < sizeof values / sizeof *values; i++) {
        char line[256] = "";
        setenv("EP_ISA", values[i], 1);
        snprintf(line, sizeof line, "'%s' --print-isa", self);
        FILE *child = popen(line, "r");
        assert_non_null(child);
        assert_non_null(fgets(line, sizeof line, child));
        assert_int_equal(pclose(child), 0);
        if (i == 1)
            assert_string_equal(line, "scalar:\n");
        else if (i == 2)
            assert_non_null(strstr(line, ":EP_ISA=nonsense is not scalar, avx2 or avx512; using "));
        else
            assert_non_null(strstr(line, ":\n"));
    }
    unsetenv("EP_ISA");
    /* The best path is one that the features allow. */
    const char *features = ep_cpu_features();
    if (strcmp(ep_codec_isa(), "scalar"))
        assert_true(strstr(features, "avx2") && strstr(features, "fma") &&
                    strstr(features, "f16c"));
    if (!strcmp(ep_codec_isa(), "avx512"))
        assert_non_null(strstr(features, "avx512f avx512bw avx512vl avx512dq"));
}

int main(int argc, char **argv)
{
    if (argc > 1 && !strcmp(argv[1], "--print-isa")) {
        printf("%s:%s\n", ep_codec_isa(), ep_codec_isa_note());
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quantise_and_back),
        cmocka_unit_test(convert_and_back),
        cmocka_unit_test(logfmt_and_back),
        cmocka_unit_test(bad_arguments),
        cmocka_unit_test_prestate(environment, argv[0]),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
