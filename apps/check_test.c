/* SPDX-License-Identifier: MIT */
/* The reference of --check: right results pass, and each kind of wrong result is found. */
#include "check.h"

#include "support/test.h"

#include <math.h>
#include <stdio.h>

enum { RANKS = 2, TOKENS = 3, HIDDEN = 136, TOPK = 2, EXPERTS = 4, BLOCKS = 2, RANK = 1 };

/* What rank 1 of two receives, worked out here row by row. */
static struct {
    workload load;
    ep_recv recv;
    int64_t n;
    uint16_t x[RANKS * TOKENS][HIDDEN];
    uint8_t codes[RANKS * TOKENS][HIDDEN];
    float scales[RANKS * TOKENS][BLOCKS];
    int32_t ids[RANKS * TOKENS][TOPK], tokens[RANKS * TOKENS];
    float weights[RANKS * TOKENS][TOPK];
} w;

static bool receive(int32_t ids[TOPK], const float weights[TOPK], int64_t row)
{
    bool any = false;
    for (int k = 0; k < TOPK; k++) {
        bool here = ids[k] >= 2;
        w.ids[row][k] = here ? ids[k] - 2 : -1;
        w.weights[row][k] = here ? weights[k] : 0;
        any |= here;
    }
    return any;
}

static int set_up(void **state)
{
    (void)state;
    w.load = (workload){5, RANKS, TOKENS, HIDDEN, TOPK, EXPERTS, NULL, NULL};
    w.n = 0;
    for (int rank = 0; rank < RANKS; rank++) {
        int32_t ids[TOKENS][TOPK];
        float weights[TOKENS][TOPK];
        if (!workload_routing(&w.load, rank, ids[0], weights[0]))
            return 1;
        for (int t = 0; t < TOKENS; t++) {
            if (!receive(ids[t], weights[t], w.n))
                continue;
            workload_row(&w.load, rank, t, w.x[w.n]);
            check_quantise(w.x[w.n], HIDDEN, w.codes[w.n], w.scales[w.n]);
            w.tokens[w.n++] = t;
        }
    }
    ep_recv recv = EP_RECV_INIT;
    recv.num_rows = w.n;
    recv.x = ep_tensor_2d(w.x, EP_BF16, w.n, HIDDEN);
    recv.topk_idx = ep_tensor_2d(w.ids, EP_I32, w.n, TOPK);
    recv.topk_weights = ep_tensor_2d(w.weights, EP_F32, w.n, TOPK);
    recv.source_token = ep_tensor_1d(w.tokens, EP_I32, w.n);
    recv.scales = ep_tensor_2d(w.scales, EP_F32, w.n, BLOCKS);
    w.recv = recv;
    return w.n < 3; /* or there would be nothing to spoil */
}

static void right_rows_pass(void **state)
{
    (void)state;
    char message[CHECK_MESSAGE_MAX];
    assert_true(check_dispatch(&w.load, RANK, false, &w.recv, message));
    w.recv.x = ep_tensor_2d(w.codes, EP_E4M3, w.n, HIDDEN);
    assert_true(check_dispatch(&w.load, RANK, true, &w.recv, message));
}

/* Expects the row that was just spoilt to be found, and what about it. */
static void expect_wrong(bool fp8, int row, const char *what)
{
    char message[CHECK_MESSAGE_MAX], start[32], end[64];
    assert_false(check_dispatch(&w.load, RANK, fp8, &w.recv, message));
    snprintf(start, sizeof start, "dispatch: row %d (rank ", row);
    snprintf(end, sizeof end, "): %s differs", what);
    assert_non_null(strstr(message, start));
    assert_non_null(strstr(message, end));
}

static void each_wrong_part_is_found(void **state)
{
    (void)state;
    w.x[1][HIDDEN - 1] ^= 1;
    expect_wrong(false, 1, "value");
    w.x[1][HIDDEN - 1] ^= 1;
    w.ids[2][0]++;
    expect_wrong(false, 2, "expert id");
    w.ids[2][0]--;
    w.weights[0][1] += 0.25f;
    expect_wrong(false, 0, "weight");
    w.weights[0][1] -= 0.25f;
    w.tokens[2]++;
    expect_wrong(false, 2, "source token");
    w.tokens[2]--;
    w.recv.x = ep_tensor_2d(w.codes, EP_E4M3, w.n, HIDDEN);
    w.codes[0][7] ^= 0x80;
    expect_wrong(true, 0, "E4M3 code");
    w.codes[0][7] ^= 0x80;
    w.scales[2][BLOCKS - 1] *= 2;
    expect_wrong(true, 2, "scale");
    w.scales[2][BLOCKS - 1] /= 2;
}

static void missing_and_extra_rows_are_found(void **state)
{
    (void)state;
    char message[CHECK_MESSAGE_MAX];
    w.recv.num_rows--;
    assert_false(check_dispatch(&w.load, RANK, false, &w.recv, message));
    w.recv.num_rows += 2;
    assert_false(check_dispatch(&w.load, RANK, false, &w.recv, message));
}

/* Every token to both ranks: the sum of two rounded rows, or of all experts at once. */
static void wrong_sums_are_found(void **state)
{
    (void)state;
    static uint16_t out[TOKENS][HIDDEN];
    int32_t ids[TOKENS][TOPK];
    float weights[TOKENS][TOPK];
    char message[CHECK_MESSAGE_MAX];
    assert_true(workload_routing(&w.load, RANK, ids[0], weights[0]));
    for (int t = 0; t < TOKENS; t++) {
        uint16_t row[HIDDEN];
        workload_row(&w.load, RANK, t, row);
        for (int h = 0; h < HIDDEN; h++) {
            float sum[RANKS] = {0}, weight[RANKS] = {0};
            for (int k = 0; k < TOPK; k++)
                weight[ids[t][k] / 2] += weights[t][k];
            for (int r = 0; r < RANKS; r++)
                sum[r] = float_from_bf16(bf16_from_float(weight[r] * float_from_bf16(row[h])));
            out[t][h] = bf16_from_float(sum[0] + sum[1]);
        }
    }
    assert_true(check_combine(&w.load, RANK, false, out[0], message));
    out[2][100] ^= 1;
    assert_false(check_combine(&w.load, RANK, false, out[0], message));
    assert_non_null(strstr(message, "combine: token 2, channel 100: "));
}

static void e4m3_rounds_to_nearest_even(void **state)
{
    (void)state;
    for (int code = 0; code < 256; code++) {
        double value = check_e4m3_value((uint8_t)code);
        if (isnan(value)) {
            assert_int_equal(code & 0x7f, 0x7f);
            continue;
        }
        assert_int_equal(check_e4m3_from(value), code);
        if ((code & 0x7f) == 0x7e)
            continue;
        /* half way to the next larger magnitude goes to the even code */
        double middle = (value + check_e4m3_value((uint8_t)(code + 1))) / 2;
        assert_int_equal(check_e4m3_from(middle), code & 1 ? code + 1 : code);
    }
    assert_int_equal(check_e4m3_from(1e9), 0x7e);
    assert_int_equal(check_e4m3_from(-465), 0xfe);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(right_rows_pass, set_up),
        cmocka_unit_test_setup(each_wrong_part_is_found, set_up),
        cmocka_unit_test_setup(missing_and_extra_rows_are_found, set_up),
        cmocka_unit_test_setup(wrong_sums_are_found, set_up),
        cmocka_unit_test(e4m3_rounds_to_nearest_even),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
