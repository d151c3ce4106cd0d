/* SPDX-License-Identifier: MIT */
/*
 * A caller that can't make a call says so with ep_buffer_refuse: the others fail at
 * once with its reason, and the calls after are what they would have been. Every call,
 * refused by each rank in turn; low latency with its memory there and set up anew.
 */
#include "entrepot/low_latency.h"

#include "support/on_device.h"
#include "support/ranks.h"
#include "support/tensors.h"
#include "support/test.h"

#include <stdbool.h>
#include <string.h>

enum {
    TOKENS = 8,
    HIDDEN = 16,
    EXPERTS = 24,
    MOST = 8 * TOKENS,
    NUM_CALLS = EP_CALL_LL_COMBINE + 1
};

static const char *const names[NUM_CALLS] = {"ep_dispatch",          "ep_combine",
                                             "ep_dispatch_backward", "ep_combine_backward",
                                             "ep_ll_dispatch",       "ep_ll_combine"};

typedef struct bench {
    ep_buffer *buffer;
    int rank, num_ranks;
    bool hooks, anew; /* the next ep_ll_dispatch is of another shape */
    int64_t ids[TOKENS];
    float weights[TOKENS];
    uint16_t x[TOKENS * HIDDEN], out[TOKENS * HIDDEN];
    uint16_t y[EXPERTS * MOST * HIDDEN];
    ep_recv recv;
    ep_ll_recv ll_recv;
} bench;

static ep_status dispatch(bench *b, ep_recv *recv)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(b->x, EP_BF16, TOKENS, HIDDEN);
    args.topk_idx = ep_tensor_2d(b->ids, EP_I64, TOKENS, 1);
    args.num_experts = EXPERTS;
    return ep_dispatch(b->buffer, &args, recv, NULL);
}

static ep_status combine(bench *b)
{
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = b->recv.x;
    args.handle = b->recv.handle;
    args.out = ep_tensor_2d(b->out, EP_BF16, TOKENS, HIDDEN);
    return ep_combine(b->buffer, &args, NULL);
}

static ep_status dispatch_backward(bench *b)
{
    ep_dispatch_backward_args args = EP_DISPATCH_BACKWARD_ARGS_INIT;
    args.grad_recv_x = b->recv.x;
    args.handle = b->recv.handle;
    args.grad_x = ep_tensor_2d(b->out, EP_BF16, TOKENS, HIDDEN);
    return ep_dispatch_backward(b->buffer, &args, NULL);
}

static ep_status combine_backward(bench *b, ep_recv *recv)
{
    ep_combine_backward_args args = EP_COMBINE_BACKWARD_ARGS_INIT;
    args.grad_out = ep_tensor_2d(b->x, EP_BF16, TOKENS, HIDDEN);
    args.handle = b->recv.handle;
    return ep_combine_backward(b->buffer, &args, recv, NULL);
}

static ep_status finish(ep_status status, ep_event *event)
{
    if (status == EP_OK && event)
        status = ep_event_wait(event);
    ep_event_release(event);
    return status;
}

static ep_status ll_dispatch(bench *b, ep_ll_recv *recv)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    ep_event *event = NULL;
    args.x = ep_tensor_2d(b->x, EP_BF16, TOKENS, HIDDEN);
    args.topk_idx = ep_tensor_2d(b->ids, EP_I64, TOKENS, 1);
    args.max_tokens = TOKENS + b->anew;
    args.max_expert_rows = b->num_ranks * TOKENS;
    args.num_experts = EXPERTS;
    args.completion = EP_COMPLETE_BY_HOOK;
    ep_status status = ep_ll_dispatch(b->buffer, &args, recv, b->hooks ? &event : NULL);
    return finish(status, event);
}

static ep_status ll_combine(bench *b)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    ep_event *event = NULL;
    args.y = b->ll_recv.x;
    args.y.data = b->y;
    args.topk_idx = ep_tensor_2d(b->ids, EP_I64, TOKENS, 1);
    args.topk_weights = ep_tensor_2d(b->weights, EP_F32, TOKENS, 1);
    args.handle = b->ll_recv.handle;
    args.out = ep_tensor_2d(b->out, EP_BF16, TOKENS, HIDDEN);
    args.completion = EP_COMPLETE_BY_HOOK;
    ep_status status = ep_ll_combine(b->buffer, &args, b->hooks ? &event : NULL);
    return finish(status, event);
}

static ep_status make(bench *b, int call)
{
    ep_recv recv = EP_RECV_INIT;
    ep_ll_recv ll_recv = EP_LL_RECV_INIT;
    ep_status status = EP_OK;
    switch (call) {
    case EP_CALL_DISPATCH:
        status = dispatch(b, &recv);
        break;
    case EP_CALL_COMBINE:
        status = combine(b);
        break;
    case EP_CALL_DISPATCH_BACKWARD:
        status = dispatch_backward(b);
        break;
    case EP_CALL_COMBINE_BACKWARD:
        status = combine_backward(b, &recv);
        break;
    case EP_CALL_LL_DISPATCH:
        status = ll_dispatch(b, &ll_recv);
        break;
    default:
        status = ll_combine(b);
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
    b->ll_recv = (ep_ll_recv)EP_LL_RECV_INIT;
    b->recv = (ep_recv)EP_RECV_INIT;
    TEST_OK(dispatch(b, &b->recv));
    TEST_OK(ll_dispatch(b, &b->ll_recv));
    if (call == EP_CALL_LL_DISPATCH && b->hooks) { /* the memory of the next is another */
        ep_ll_recv_release(&b->ll_recv);
        b->anew = !b->anew;
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
    TEST_OK(combine(b));
    if (b->ll_recv.handle)
        TEST_OK(ll_combine(b));
    ep_ll_recv_release(&b->ll_recv);
    ep_recv_release(&b->recv);
    ep_handle_release(b->recv.handle);
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

static int begin(bench *b, ep_group *group, const ep_buffer_config *config)
{
    memset(b, 0, sizeof *b);
    b->rank = ep_group_rank(group);
    b->num_ranks = ep_group_num_ranks(group);
    for (int t = 0; t < TOKENS; t++)
        b->ids[t] = 3 * t; /* every rank hears from every rank in every call */
    TEST_OK(ep_group_set_timeout_ms(group, 30000));
    TEST_OK(ep_buffer_create(group, config, &b->buffer));
    return 0;
}

static int run(ep_group *group, void *arg)
{
    static _Thread_local bench b;
    if (begin(&b, group, arg))
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
    if (begin(&b, group, NULL))
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
    if (begin(&b, group, NULL))
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
