/* SPDX-License-Identifier: MIT */
/* The smallest end-to-end check: what goes out comes back summed, on threads and processes. */
#include "entrepot/ep.h"

#include "support/ranks.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

enum { TOKENS = 5, HIDDEN = 16, TOPK = 2, EXPERTS = 6 };

static int round_trip(ep_group *group, void *arg)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.num_threads = *(int *)arg % 10;
    config.verify = *(int *)arg / 10;
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, &config, &buffer));
    int rank = ep_group_rank(group), num_ranks = ep_group_num_ranks(group);
    float x[TOKENS][HIDDEN], out[TOKENS][HIDDEN], weights[TOKENS][TOPK];
    int64_t idx[TOKENS][TOPK];
    for (int t = 0; t < TOKENS; t++) {
        for (int h = 0; h < HIDDEN; h++)
            x[t][h] = (float)(rank * 100 + t * 10 + h);
        for (int k = 0; k < TOPK; k++) {
            idx[t][k] = (t * 3 + k * 2 + rank) % EXPERTS;
            weights[t][k] = (float)(1 + k);
        }
    }
    for (int round = 0; round < 20; round++) {
        ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
        args.x = ep_tensor_2d(x, EP_F32, TOKENS, HIDDEN);
        args.topk_idx = ep_tensor_2d(idx, EP_I64, TOKENS, TOPK);
        args.topk_weights = ep_tensor_2d(weights, EP_F32, TOKENS, TOPK);
        args.num_experts = EXPERTS;
        args.layout = round % 2 ? EP_ROWS_BY_EXPERT : EP_ROWS_BY_TOKEN;
        ep_recv recv = EP_RECV_INIT;
        ep_event *event = NULL;
        TEST_OK(ep_dispatch(buffer, &args, &recv, round % 3 ? &event : NULL));
        if (event)
            TEST_OK(ep_event_wait(event));
        ep_event_release(event);
        ep_combine_args combine = EP_COMBINE_ARGS_INIT;
        combine.y = recv.x;
        float *ordinary = malloc((size_t)recv.x.shape[0] * HIDDEN * sizeof(float) + 4);
        memcpy(ordinary, recv.x.data, (size_t)recv.x.shape[0] * HIDDEN * sizeof(float));
        if (round % 4 >= 2)
            combine.y.data = ordinary;
        combine.handle = recv.handle;
        combine.out = ep_tensor_2d(out, EP_F32, TOKENS, HIDDEN);
        TEST_OK(ep_combine(buffer, &combine, NULL));
        free(ordinary);
        for (int t = 0; t < TOKENS; t++) {
            int per = EXPERTS / num_ranks;
            float times = idx[t][0] / per == idx[t][1] / per ? 1 : 2;
            if (round % 2)
                times = 3;
            for (int h = 0; h < HIDDEN; h++)
                TEST_CHECK(out[t][h] == times * x[t][h]);
        }
        ep_recv_release(&recv);
        ep_handle_release(recv.handle);
    }
    ep_buffer_destroy(buffer);
    return 0;
}

static void on_threads(void **state)
{
    (void)state;
    int options[] = {0, 1, 3, 10};
    for (int i = 0; i < 4; i++)
        for (int ranks = 1; ranks <= 3; ranks++)
            assert_int_equal(test_run_groups("threads", ranks, round_trip, &options[i]), 0);
}

static void on_processes(void **state)
{
    (void)state;
    int options[] = {0, 1, 3, 10};
    for (int i = 0; i < 4; i++)
        for (int ranks = 1; ranks <= 3; ranks++)
            assert_int_equal(test_run_groups("shm", ranks, round_trip, &options[i]), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(on_threads),
        cmocka_unit_test(on_processes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
