/* SPDX-License-Identifier: MIT */
/* Lifetime of low-latency results: places known before the hook, retiring, unused rows. */
#include "entrepot/low_latency.h"

#include "support/ranks.h"
#include "support/test.h"

#include <stdbool.h>
#include <string.h>

enum { TOKENS = 4, HIDDEN = 1024, EXPERTS = 4, MOST = 64 };

typedef struct call {
    uint16_t x[TOKENS][HIDDEN], out[TOKENS][HIDDEN];
    int64_t idx[TOKENS][1];
    float weights[TOKENS][1];
    ep_ll_recv recv;
    ep_event *event;
} call;

static ep_status dispatch(ep_buffer *buffer, call *c, ep_dtype wire, bool hook)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    for (int t = 0; t < TOKENS; t++) {
        c->idx[t][0] = t % EXPERTS;
        c->weights[t][0] = 1;
        for (int h = 0; h < HIDDEN; h++)
            c->x[t][h] = 0x3f80; /* 1.0 */
    }
    args.x = ep_tensor_2d(c->x, EP_BF16, TOKENS, HIDDEN);
    args.topk_idx = ep_tensor_2d(c->idx, EP_I64, TOKENS, 1);
    args.max_tokens = MOST;
    args.num_experts = EXPERTS;
    args.wire = wire;
    args.completion = EP_COMPLETE_BY_HOOK;
    ep_ll_recv init = EP_LL_RECV_INIT;
    c->recv = init;
    return ep_ll_dispatch(buffer, &args, &c->recv, hook ? &c->event : NULL);
}

static ep_status combine(ep_buffer *buffer, call *c)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    args.y = c->recv.x;
    args.topk_idx = ep_tensor_2d(c->idx, EP_I64, TOKENS, 1);
    args.topk_weights = ep_tensor_2d(c->weights, EP_F32, TOKENS, 1);
    args.handle = c->recv.handle;
    args.out = ep_tensor_2d(c->out, EP_BF16, TOKENS, HIDDEN);
    return ep_ll_combine(buffer, &args, NULL);
}

static int lifetimes(ep_group *group, void *arg)
{
    (void)arg;
    static _Thread_local call c[5];
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, NULL, &buffer));

    /* Tensors are in place before the hook has received anything. */
    TEST_OK(dispatch(buffer, &c[0], EP_BF16, true));
    TEST_CHECK(c[0].recv.x.data != NULL && c[0].recv.count.data != NULL);
    void *place = c[0].recv.x.data;
    TEST_OK(ep_event_wait(c[0].event));
    ep_event_release(c[0].event);
    TEST_CHECK(c[0].recv.x.data == place);
    int64_t local = c[0].recv.x.shape[0], room = c[0].recv.x.shape[1];
    TEST_CHECK(((int32_t *)c[0].recv.count.data)[0] > 0 && ((uint16_t *)place)[0] == 0x3f80);

    /* Rows that nothing arrived in can be read and written. */
    uint16_t *rows = place;
    for (int64_t i = (local * room - 1) * HIDDEN; i < local * room * HIDDEN; i++)
        rows[i] = (uint16_t)(rows[i] + 1);
    ep_tensor y;
    TEST_OK(ep_ll_combine_buffer(buffer, c[0].recv.handle, &y));
    memset(y.data, 0, (size_t)(local * room * HIDDEN) * 2);

    /* A third call while two results are alive needs one of them retired. */
    TEST_OK(dispatch(buffer, &c[1], EP_BF16, false));
    TEST_CHECK(dispatch(buffer, &c[2], EP_BF16, false) == EP_ERR_STATE);
    ep_ll_recv_retire(&c[0].recv);
    ep_ll_recv_retire(&c[0].recv);
    TEST_OK(dispatch(buffer, &c[2], EP_BF16, false));
    TEST_CHECK(c[2].recv.x.data == place);
    TEST_CHECK(combine(buffer, &c[0]) == EP_ERR_STATE);
    TEST_CHECK(strstr(ep_last_error(), "retired") != NULL);
    TEST_CHECK(ep_ll_combine_buffer(buffer, c[0].recv.handle, &y) == EP_ERR_STATE);
    /* Releasing the retired one must not free the slot that another result now has. */
    ep_ll_recv_release(&c[0].recv);
    TEST_OK(combine(buffer, &c[2]));
    TEST_CHECK(c[2].out[0][0] == 0x3f80);

    /* Another shape while retired results are still looked at. */
    ep_ll_recv_retire(&c[1].recv);
    ep_ll_recv_retire(&c[2].recv);
    TEST_OK(dispatch(buffer, &c[3], EP_E4M3, false));
    ((uint16_t *)c[2].recv.x.data)[0] = 7;
    ((int32_t *)c[1].recv.source_token.data)[0] = 7;
    ep_ll_recv_release(&c[1].recv);
    ep_ll_recv_release(&c[2].recv);
    ep_ll_recv_release(&c[3].recv);
    TEST_OK(ep_group_barrier(group));
    ep_buffer_destroy(buffer);
    return 0;
}

static int failing_hook(ep_group *group, void *arg)
{
    (void)arg;
    static _Thread_local call c;
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, NULL, &buffer));
    TEST_OK(dispatch(buffer, &c, EP_E4M3, false)); /* sets memory up */
    ep_ll_recv_release(&c.recv);
    TEST_OK(ep_group_set_timeout_ms(group, 200));
    if (ep_group_rank(group) == 0) { /* the other rank does not come */
        TEST_OK(dispatch(buffer, &c, EP_E4M3, true));
        TEST_CHECK(ep_event_wait(c.event) == EP_ERR_TIMEOUT);
        ep_event_release(c.event);
        TEST_CHECK(((float *)c.recv.scales.data)[0] + 1 != 0); /* still there to be looked at */
        TEST_CHECK(ep_ll_combine_buffer(buffer, c.recv.handle, &c.recv.dropped) == EP_ERR_STATE);
        ep_ll_recv_release(&c.recv);
    }
    TEST_OK(ep_group_set_timeout_ms(group, 20000));
    TEST_OK(ep_group_barrier(group));
    TEST_OK(ep_group_set_timeout_ms(group, 200)); /* rank 1 will never read the lost call's rows */
    ep_buffer_destroy(buffer);
    return 0;
}

/* A rank that is done destroys its buffer while slower ones still read from it. */
static int leave_at_once(ep_group *group, void *arg)
{
    (void)arg;
    static _Thread_local call c;
    for (int round = 0; round < 20; round++) {
        ep_buffer *buffer;
        TEST_OK(ep_buffer_create(group, NULL, &buffer));
        for (int shape = 0; shape < 2; shape++) {
            TEST_OK(dispatch(buffer, &c, shape ? EP_E4M3 : EP_BF16, false));
            ep_tensor y;
            TEST_OK(ep_ll_combine_buffer(buffer, c.recv.handle, &y));
            for (int64_t i = 0; i < y.shape[0] * y.shape[1] * HIDDEN; i++)
                ((uint16_t *)y.data)[i] = 0x4000; /* 2.0 */
            c.recv.x = y;
            TEST_OK(combine(buffer, &c));
            ep_ll_recv_release(&c.recv);
            for (int t = 0; t < TOKENS; t++)
                for (int h = 0; h < HIDDEN; h++)
                    TEST_CHECK(c.out[t][h] == 0x4000);
        }
        ep_buffer_destroy(buffer);
    }
    return 0;
}

static void results_live_as_promised(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 2; ranks++) {
        assert_int_equal(test_run_groups("threads", ranks, lifetimes, NULL), 0);
        assert_int_equal(test_run_groups("shm", ranks, lifetimes, NULL), 0);
    }
    assert_int_equal(test_run_groups("threads", 2, failing_hook, NULL), 0);
    assert_int_equal(test_run_groups("shm", 2, failing_hook, NULL), 0);
}

static void nobody_reads_from_a_buffer_that_is_gone(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("threads", 4, leave_at_once, NULL), 0);
    assert_int_equal(test_run_groups("shm", 4, leave_at_once, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(nobody_reads_from_a_buffer_that_is_gone),
        cmocka_unit_test(results_live_as_promised),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
