/* SPDX-License-Identifier: MIT */
/* The low-latency reference of --check: right results pass, each kind of wrong one is found. */
#include "check_ll.h"

#include "support/test.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

enum { RANKS = 2, TOKENS = 3, HIDDEN = 136, TOPK = 3, EXPERTS = 4, LOCAL = 2, ROOM = 6, RANK = 1 };

/* What rank 1 of two receives, worked out here. */
static struct {
    workload load;
    ep_ll_recv recv;
    uint16_t x[LOCAL][ROOM][HIDDEN];
    uint8_t codes[LOCAL][ROOM][HIDDEN];
    float scales[LOCAL][ROOM][2];
    int32_t count[LOCAL], tokens[LOCAL][ROOM];
    int64_t range[LOCAL][RANKS];
} w;

static void receive_token(int source, int token, const int32_t ids[TOPK])
{
    for (int k = 0; k < TOPK; k++) {
        int expert = ids[k] - RANK * LOCAL;
        if (expert < 0)
            continue;
        int row = w.count[expert]++;
        workload_row(&w.load, source, token, w.x[expert][row]);
        check_quantise(w.x[expert][row], HIDDEN, w.codes[expert][row], w.scales[expert][row]);
        w.tokens[expert][row] = token;
        if ((w.range[expert][source] & 0xffffffff) == 0)
            w.range[expert][source] = (int64_t)row << 32;
        w.range[expert][source]++;
    }
}

static ep_tensor tensor_3d(void *data, ep_dtype dtype, int64_t columns)
{
    ep_tensor t = ep_tensor_2d(data, dtype, ROOM, columns);
    t.ndim = 3;
    t.shape[0] = LOCAL, t.shape[1] = ROOM, t.shape[2] = columns;
    t.stride[0] = ROOM * columns, t.stride[1] = columns, t.stride[2] = 1;
    return t;
}

static int set_up(void **state)
{
    (void)state;
    memset(&w, 0, sizeof w);
    w.load = (workload){5, RANKS, TOKENS, HIDDEN, TOPK, EXPERTS, NULL, NULL};
    for (int source = 0; source < RANKS; source++) {
        int32_t ids[TOKENS][TOPK];
        float weights[TOKENS][TOPK];
        if (!workload_routing(&w.load, source, ids[0], weights[0]))
            return 1;
        for (int t = 0; t < TOKENS; t++)
            receive_token(source, t, ids[t]);
    }
    ep_ll_recv recv = EP_LL_RECV_INIT;
    recv.x = tensor_3d(w.x, EP_BF16, HIDDEN);
    recv.scales = tensor_3d(w.scales, EP_F32, 2);
    recv.count = ep_tensor_1d(w.count, EP_I32, LOCAL);
    recv.source_token = ep_tensor_2d(w.tokens, EP_I32, LOCAL, ROOM);
    recv.source_range = ep_tensor_2d(w.range, EP_I64, LOCAL, RANKS);
    w.recv = recv;
    return w.count[0] < 2 || w.count[1] < 2; /* or there would be nothing to spoil */
}

static void expect_wrong(bool fp8, const char *what)
{
    char message[CHECK_MESSAGE_MAX], end[64];
    assert_false(check_ll_dispatch(&w.load, RANK, fp8, &w.recv, message));
    snprintf(end, sizeof end, ": %s differs", what);
    assert_non_null(strstr(message, end));
}

static void right_rows_pass(void **state)
{
    (void)state;
    char message[CHECK_MESSAGE_MAX];
    assert_true(check_ll_dispatch(&w.load, RANK, false, &w.recv, message));
    w.recv.x = tensor_3d(w.codes, EP_E4M3, HIDDEN);
    assert_true(check_ll_dispatch(&w.load, RANK, true, &w.recv, message));
}

static void each_wrong_part_is_found(void **state)
{
    (void)state;
    w.x[1][1][HIDDEN - 1] ^= 1;
    expect_wrong(false, "value");
    w.x[1][1][HIDDEN - 1] ^= 1;
    w.tokens[0][1]++;
    expect_wrong(false, "source token");
    w.tokens[0][1]--;
    w.count[1]++;
    expect_wrong(false, "count");
    w.count[1] -= 2;
    expect_wrong(false, "count");
    w.count[1]++;
    w.range[1][0]++;
    expect_wrong(false, "source range");
    w.range[1][0]--;
    w.recv.x = tensor_3d(w.codes, EP_E4M3, HIDDEN);
    w.codes[0][1][7] ^= 0x80;
    expect_wrong(true, "E4M3 code");
    w.codes[0][1][7] ^= 0x80;
    w.scales[1][1][1] *= 2;
    expect_wrong(true, "scale");
}

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
            float sum = 0;
            for (int k = 0; k < TOPK; k++) {
                float y = (1 + (float)ids[t][k] / 8) * float_from_bf16(row[h]);
                sum = fmaf(weights[t][k], float_from_bf16(bf16_from_float(y)), sum);
            }
            out[t][h] = bf16_from_float(sum);
        }
    }
    assert_true(check_ll_combine(&w.load, RANK, false, out[0], message));
    out[1][0] ^= 1;
    assert_false(check_ll_combine(&w.load, RANK, false, out[0], message));
    assert_non_null(strstr(message, "combine: token 1, channel 0: "));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(right_rows_pass, set_up),
        cmocka_unit_test_setup(each_wrong_part_is_found, set_up),
        cmocka_unit_test_setup(wrong_sums_are_found, set_up),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
