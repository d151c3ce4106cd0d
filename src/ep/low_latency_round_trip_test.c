/* SPDX-License-Identifier: MIT */
/* The smallest end-to-end check of the low-latency mode, with hooks and two batches in flight. */
#include "entrepot/low_latency.h"

#include "support/ranks.h"
#include "support/test.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS = 7, HIDDEN = 128, TOPK = 3, EXPERTS = 6, MOST = 9 };

typedef struct batch {
    uint16_t x[TOKENS][HIDDEN], out[TOKENS][HIDDEN];
    int32_t idx[TOKENS][TOPK];
    float weights[TOKENS][TOPK];
    ep_ll_recv recv;
    ep_event *event;
} batch;

/* Small integers are exact in BF16, and so are their sums weighted by powers of two. */
static uint16_t bf16(int value)
{
    float f = (float)value;
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static void fill(batch *b, int rank, int salt)
{
    for (int t = 0; t < TOKENS; t++) {
        for (int h = 0; h < HIDDEN; h++)
            b->x[t][h] = bf16((rank * 5 + t * 3 + h + salt) % 16);
        for (int k = 0; k < TOPK; k++) {
            b->idx[t][k] = (t * 5 + k + rank + salt) % EXPERTS;
            b->weights[t][k] = k == 0 ? 1.0f : k == 1 ? 0.5f : 0.25f;
        }
    }
    b->idx[TOKENS - 1][0] = -1;
}

static int start(ep_buffer *buffer, batch *b, ep_dtype wire, ep_completion completion)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(b->x, EP_BF16, TOKENS, HIDDEN);
    args.topk_idx = ep_tensor_2d(b->idx, EP_I32, TOKENS, TOPK);
    args.max_tokens = MOST;
    args.num_experts = EXPERTS;
    args.wire = wire;
    args.scale = EP_SCALE_POW2;
    args.completion = completion;
    ep_ll_recv init = EP_LL_RECV_INIT;
    b->recv = init;
    TEST_OK(ep_ll_dispatch(buffer, &args, &b->recv, &b->event));
    return 0;
}

static int finish(ep_buffer *buffer, batch *b, bool zero_copy, ep_combine_wire wire)
{
    TEST_OK(ep_event_wait(b->event));
    ep_event_release(b->event);
    ep_ll_recv *recv = &b->recv;
    int64_t local = recv->x.shape[0], room = recv->x.shape[1];
    uint16_t *ordinary = malloc((size_t)(local * room * HIDDEN) * 2 + 2);
    ep_tensor y = recv->x;
    y.data = ordinary;
    y.dtype = EP_BF16;
    if (zero_copy)
        TEST_OK(ep_ll_combine_buffer(buffer, recv->handle, &y));
    for (int64_t l = 0; l < local; l++)
        for (int i = 0; i < ((int32_t *)recv->count.data)[l]; i++) {
            uint16_t *to = (uint16_t *)y.data + l * y.stride[0] + i * y.stride[1];
            size_t row = (size_t)(l * room + i);
            if (recv->x.dtype == EP_BF16)
                memcpy(to, (uint16_t *)recv->x.data + row * HIDDEN, HIDDEN * 2);
            else
                TEST_OK(ep_dequantise((uint8_t *)recv->x.data + row * HIDDEN,
                                      (float *)recv->scales.data + row, EP_SCALE_POW2, 1, HIDDEN,
                                      EP_BF16, to));
        }
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    args.y = y;
    args.topk_idx = ep_tensor_2d(b->idx, EP_I32, TOKENS, TOPK);
    args.topk_weights = ep_tensor_2d(b->weights, EP_F32, TOKENS, TOPK);
    args.handle = recv->handle;
    args.wire = wire;
    args.out = ep_tensor_2d(b->out, EP_BF16, TOKENS, HIDDEN);
    TEST_OK(ep_ll_combine(buffer, &args, NULL));
    ep_ll_recv_release(recv);
    free(ordinary);
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < HIDDEN; h++) {
            float x, sum = 0, out;
            uint32_t bits = (uint32_t)b->x[t][h] << 16, got = (uint32_t)b->out[t][h] << 16;
            memcpy(&x, &bits, 4);
            memcpy(&out, &got, 4);
            for (int k = 0; k < TOPK; k++)
                sum += b->idx[t][k] < 0 ? 0 : b->weights[t][k] * x;
            TEST_CHECK(out == sum);
        }
    return 0;
}

static int round_trip(ep_group *group, void *arg)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.num_threads = *(int *)arg % 10;
    config.verify = *(int *)arg / 10;
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, &config, &buffer));
    batch *b = calloc(2, sizeof *b);
    for (int round = 0; round < 16; round++) {
        ep_dtype wire = round % 8 < 4 ? EP_BF16 : EP_E4M3;
        ep_completion completion = round % 2 ? EP_COMPLETE_BY_HOOK : EP_COMPLETE_IN_BACKGROUND;
        for (int i = 0; i < 2; i++) {
            fill(&b[i], ep_group_rank(group), round + i);
            TEST_CHECK(start(buffer, &b[i], wire, completion) == 0);
        }
        for (int i = 0; i < 2; i++)
            TEST_CHECK(finish(buffer, &b[i], round % 4 > 1, EP_COMBINE_BF16) == 0);
    }
    free(b);
    ep_buffer_destroy(buffer);
    return 0;
}

static void on(const char *transport)
{
    int options[] = {0, 1, 3, 10};
    for (int i = 0; i < 4; i++)
        for (int ranks = 1; ranks <= 3; ranks++)
            assert_int_equal(test_run_groups(transport, ranks, round_trip, &options[i]), 0);
}

static void on_threads(void **state)
{
    (void)state;
    on("threads");
}

static void on_processes(void **state)
{
    (void)state;
    on("shm");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(on_threads),
        cmocka_unit_test(on_processes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
