/* SPDX-License-Identifier: MIT */
/*
 * A rank that gives a call up and is in the next one before a slow peer has
 * looked: the peer must learn that the call was given up, and not go on with
 * the mail of two calls ago.
 */
#include "entrepot/ep.h"

#include "support/on_device.h"
#include "support/ranks.h"
#include "support/test.h"

#include <string.h>

enum { TOKENS = 4, HIDDEN = 16, EXPERTS = 8 };

static ep_status dispatch(ep_buffer *buffer, int64_t num_experts)
{
    static const int64_t idx[TOKENS] = {0, 7, 3, 5};
    static const float x[TOKENS][HIDDEN] = {{1}, {2}, {3}, {4}};
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d((void *)x, EP_F32, TOKENS, HIDDEN);
    args.topk_idx = ep_tensor_2d((void *)idx, EP_I64, TOKENS, 1);
    args.num_experts = num_experts;
    ep_recv recv = EP_RECV_INIT;
    ep_status status = ep_dispatch(buffer, &args, &recv, NULL);
    ep_recv_release(&recv);
    ep_handle_release(recv.handle);
    return status;
}

static int give_up_and_go_on(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group);
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, NULL, &buffer));
    for (int round = 0; round < 200; round++) {
        TEST_OK(dispatch(buffer, EXPERTS));
        TEST_OK(dispatch(buffer, EXPERTS));
        if (rank == 0) {
            TEST_CHECK(dispatch(buffer, 0) == EP_ERR_ARGUMENT);
        } else {
            TEST_CHECK(dispatch(buffer, EXPERTS) == EP_ERR_ABORTED);
            TEST_CHECK(strstr(ep_last_error(), "rank 0 gave up") != NULL);
            TEST_CHECK(strstr(ep_last_error(), "num_experts") != NULL);
        }
        TEST_OK(dispatch(buffer, EXPERTS));
    }
    TEST_OK(ep_group_barrier(group));
    ep_buffer_destroy(buffer);
    return 0;
}

static void a_call_given_up_is_not_mistaken_for_entered(void **state)
{
    (void)state;
    static const int ranks[] = {2, 8};
    for (size_t i = 0; i < 2; i++) {
        assert_int_equal(test_run_groups("threads", ranks[i], give_up_and_go_on, NULL), 0);
        assert_int_equal(test_run_groups("shm", ranks[i], give_up_and_go_on, NULL), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_call_given_up_is_not_mistaken_for_entered),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
