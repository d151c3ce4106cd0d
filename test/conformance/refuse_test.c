/* SPDX-License-Identifier: MIT */
/*
 * A caller that can't make a call says so with ep_buffer_refuse: the others fail at
 * once with its reason, and the calls after are what they would have been. Every call,
 * refused by each rank in turn; low latency with its memory there and set up anew.
 */
#include "entrepot/low_latency.h"

#include "support/on_device.h"
#include "support/ranks.h"
#include "support/small_calls.h"
#include "support/tensors.h"
#include "support/test.h"

#include <string.h>

enum { NUM_CALLS = EP_CALL_LL_COMBINE + 1 };

static const char *const names[NUM_CALLS] = {"ep_dispatch",          "ep_combine",
                                             "ep_dispatch_backward", "ep_combine_backward",
                                             "ep_ll_dispatch",       "ep_ll_combine"};

typedef struct small_calls bench;

static ep_status make(bench *b, int call)
{
    ep_recv recv = EP_RECV_INIT;
    ep_ll_recv ll_recv = EP_LL_RECV_INIT;
    ep_status status = EP_OK;
    switch (call) {
    case EP_CALL_DISPATCH:
        status = small_dispatch(b, &recv);
        break;
    case EP_CALL_COMBINE:
        status = small_combine(b);
        break;
    case EP_CALL_DISPATCH_BACKWARD:
        status = small_dispatch_backward(b);
        break;
    case EP_CALL_COMBINE_BACKWARD:
        status = small_combine_backward(b, &recv);
        break;
    case EP_CALL_LL_DISPATCH:
        status = small_ll_dispatch(b, &ll_recv);
        break;
    default:
        status = small_ll_combine(b);
    }
    ep_ll_recv_release(&ll_recv);
    ep_recv_release(&recv);
    ep_handle_release(recv.handle);
    return status;
}

/* Whoever is not the rank that refuses: in time, with its reason. */
static int told(int call, int by)
{
    char expected[128];
    snprintf(expected, sizeof expected, "rank %d gave up: %s: refused by the caller: no tensor", by,
             names[call]);
    TEST_CHECK(strncmp(ep_last_error(), names[call], strlen(names[call])) == 0);
    TEST_CHECK(strstr(ep_last_error(), expected) != NULL);
    return 0;
}

static int refused(bench *b, int call, int by)
{
    TEST_OK(small_dispatch(b, &b->recv));
    TEST_OK(small_ll_dispatch(b, &b->ll_recv));
    if (call == EP_CALL_LL_DISPATCH && b->hooks) { /* the memory of the next is another */
        ep_ll_recv_release(&b->ll_recv);
        b->max_tokens ^= 1;
    }
    int64_t start = test_now_ms();
    if (b->rank == by) {
        TEST_OK(ep_buffer_refuse(b->buffer, (ep_call)call, "no tensor"));
    } else {
        TEST_CHECK(make(b, call) == EP_ERR_ABORTED);
        if (told(call, by))
            return 1;
    }
    TEST_CHECK(test_now_ms() - start < 5000);
    TEST_OK(small_combine(b));
    if (b->ll_recv.handle)
        TEST_OK(small_ll_combine(b));
    small_calls_drop(b);
    return 0;
}

static int bad_arguments(bench *b)
{
    TEST_CHECK(ep_buffer_refuse(NULL, EP_CALL_DISPATCH, "x") == EP_ERR_ARGUMENT);
    TEST_CHECK(strcmp(ep_last_error(), "ep_buffer_refuse: buffer is NULL") == 0);
    TEST_CHECK(ep_buffer_refuse(b->buffer, EP_CALL_DISPATCH, NULL) == EP_ERR_ARGUMENT);
    TEST_CHECK(strcmp(ep_last_error(), "ep_buffer_refuse: reason is NULL") == 0);
    TEST_CHECK(ep_buffer_refuse(b->buffer, (ep_call)6, "x") == EP_ERR_ARGUMENT);
    TEST_CHECK(strcmp(ep_last_error(), "ep_buffer_refuse: call is 6; it must be 0..5 (ep_call)") ==
               0);
    return 0;
}

static int run(ep_group *group, void *arg)
{
    static _Thread_local bench b;
    if (small_calls_open(group, arg, &b))
        return 1;
    if (bad_arguments(&b))
        return 1;
    for (int hooks = 0; hooks < 2; hooks++)
        for (int by = 0; by < b.num_ranks; by++)
            for (int call = 0; call < NUM_CALLS; call++) {
                b.hooks = hooks;
                if (refused(&b, call, by)) {
                    fprintf(stderr, "rank %d: %s refused by rank %d, hooks %d\n", b.rank,
                            names[call], by, hooks);
                    return 1;
                }
            }
    TEST_OK(ep_group_barrier(group));
    ep_buffer_destroy(b.buffer);
    return 0;
}

static void the_others_learn_the_reason(void **state)
{
    (void)state;
    static const int ranks[] = {1, 2, 3, 8};
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    for (config.num_threads = 0; config.num_threads < 2; config.num_threads++)
        for (size_t i = 0; i < sizeof ranks / sizeof *ranks; i++) {
            if (!test_device_wanted()) /* there it is the same as the next */
                assert_int_equal(test_run_groups("threads", ranks[i], run, &config), 0);
            assert_int_equal(test_run_groups("shm", ranks[i], run, &config), 0);
        }
}

/* A rank that gives calls up waits for nobody, and may be calls ahead of the others. */
static int in_a_row(bench *b, int call, int by, int times)
{
    int64_t start = test_now_ms();
    for (int i = 0; i < times; i++) {
        if (b->rank == by) {
            TEST_OK(ep_buffer_refuse(b->buffer, (ep_call)call, "no tensor"));
        } else {
            TEST_CHECK(make(b, call) == EP_ERR_ABORTED);
            if (i < 7 && told(call, by)) /* there is room for so many reasons */
                return 1;
            TEST_CHECK(strstr(ep_last_error(), "gave up") != NULL);
        }
    }
    TEST_CHECK(test_now_ms() - start < 5000);
    TEST_OK(make(b, EP_CALL_DISPATCH));
    TEST_OK(make(b, EP_CALL_LL_DISPATCH));
    return 0;
}

static int ahead(ep_group *group, void *arg)
{
    static _Thread_local bench b;
    (void)arg;
    if (small_calls_open(group, NULL, &b))
        return 1;
    TEST_OK(make(&b, EP_CALL_LL_DISPATCH));
    for (int round = 0; round < 20; round++) {
        int by = round % b.num_ranks;
        if (in_a_row(&b, EP_CALL_DISPATCH, by, 20) || in_a_row(&b, EP_CALL_LL_DISPATCH, by, 20))
            return 1;
    }
    TEST_OK(ep_group_barrier(group));
    ep_buffer_destroy(b.buffer);
    return 0;
}

static void reasons_of_a_rank_ahead(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 4; ranks++) {
        if (!test_device_wanted())
            assert_int_equal(test_run_groups("threads", ranks, ahead, NULL), 0);
        assert_int_equal(test_run_groups("shm", ranks, ahead, NULL), 0);
    }
}

/* Words about the recovery are still under way when a rank refuses the call after it. */
static int after_recovery(ep_group *group, void *arg)
{
    static _Thread_local bench b;
    (void)arg;
    if (small_calls_open(group, NULL, &b))
        return 1;
    for (int round = 0; round < 10; round++) {
        TEST_OK(make(&b, EP_CALL_LL_DISPATCH));
        TEST_OK(ep_group_recover(group));
        int call = round & 1 ? EP_CALL_DISPATCH : EP_CALL_LL_DISPATCH;
        if (in_a_row(&b, call, round % b.num_ranks, 2))
            return 1;
    }
    TEST_OK(ep_group_barrier(group));
    ep_buffer_destroy(b.buffer);
    return 0;
}

static void reasons_right_after_a_recovery(void **state)
{
    (void)state;
    static const char *const late = "fault(threads):seed=7,delay_us=2000,reorder=1,repeat=20";
    for (int ranks = 2; ranks <= 4; ranks++) {
        if (!test_device_wanted()) /* faults are of the host's notifications */
            assert_int_equal(test_run_groups(late, ranks, after_recovery, NULL), 0);
        assert_int_equal(test_run_groups("shm", ranks, after_recovery, NULL), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_others_learn_the_reason),
        cmocka_unit_test(reasons_of_a_rank_ahead),
        cmocka_unit_test(reasons_right_after_a_recovery),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
