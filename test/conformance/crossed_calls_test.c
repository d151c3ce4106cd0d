/* SPDX-License-Identifier: MIT */
/*
 * Rank 0 makes one call and the others another: all learn at once that the calls
 * differ, by no timeout, and go on. Every pair of calls, low latency with its
 * memory there and set up anew, with hooks and without.
 */
#include "entrepot/low_latency.h"

#include "support/on_device.h"
#include "support/ranks.h"
#include "support/sanitize.h"
#include "support/small_calls.h"
#include "support/tensors.h"
#include "support/test.h"

#include <stdbool.h>
#include <string.h>

enum kind { LL_DISPATCH, LL_SETUP, LL_COMBINE, DISPATCH, COMBINE, NUM_KINDS };

static const char *const names[] = {"ep_ll_dispatch", "ep_ll_dispatch", "ep_ll_combine",
                                    "a call of the normal mode", "a call of the normal mode"};

typedef struct small_calls bench;

static ep_status call(bench *b, enum kind kind)
{
    ep_recv recv = EP_RECV_INIT;
    ep_ll_recv ll_recv = EP_LL_RECV_INIT;
    ep_status status = EP_OK;
    if (kind == LL_SETUP)
        b->max_tokens = SMALL_TOKENS + 1 + b->hooks; /* another than in the round before */
    if (kind == LL_DISPATCH || kind == LL_SETUP)
        status = small_ll_dispatch(b, &ll_recv);
    else if (kind == LL_COMBINE)
        status = small_ll_combine(b);
    else if (kind == DISPATCH)
        status = small_dispatch(b, &recv);
    else
        status = small_combine(b);
    b->max_tokens = SMALL_TOKENS;
    ep_ll_recv_release(&ll_recv);
    ep_recv_release(&recv);
    ep_handle_release(recv.handle);
    return status;
}

static bool says_why(enum kind own, enum kind other)
{
    const char *text = ep_last_error();
    return strstr(text, "the call (1 dispatch, 2 combine, 3 ") || strstr(text, names[other]) ||
           strstr(text, names[own]);
}

/* The calls cross, and the next ones work. The next ep_ll_dispatch may fail once more: a rank that
   heard only that the call was given up keeps its memory, which the others have dropped. */
static int cross(bench *b, enum kind first, enum kind others)
{
    enum kind own = b->rank ? others : first, other = b->rank ? first : others;
    ep_status status = small_ll_dispatch(b, &b->ll_recv);
    if (status != EP_OK) {
        TEST_CHECK(status == EP_ERR_MISMATCH || status == EP_ERR_ABORTED);
        ep_ll_recv_release(&b->ll_recv);
        status = small_ll_dispatch(b, &b->ll_recv);
    }
    TEST_OK(status);
    TEST_OK(small_dispatch(b, &b->recv));
    TEST_OK(small_ll_combine(b));
    TEST_OK(small_combine(b));
    int64_t start = test_now_ms();
    status = call(b, own);
    TEST_CHECK(test_now_ms() - start < 5000);
    TEST_CHECK(status == EP_ERR_MISMATCH || /* told by one that saw it first */
               (status == EP_ERR_ABORTED && strstr(ep_last_error(), "gave up: ")));
    TEST_CHECK(says_why(own, other));
    TEST_OK(small_ll_combine(b));
    TEST_OK(small_combine(b));
    small_calls_drop(b);
    return 0;
}

/* What on a device has no header, or is the host's, finds its peers missing. */
static int cross_on_device(bench *b, ep_group *group, enum kind own)
{
    ep_status status = small_ll_dispatch(b, &b->ll_recv);
    TEST_OK(status);
    TEST_OK(small_dispatch(b, &b->recv));
    if (own == LL_SETUP) /* which wants the memory of results before */
        ep_ll_recv_release(&b->ll_recv);
    TEST_OK(ep_group_barrier(group)); /* timeouts start together */
    TEST_OK(ep_group_set_timeout_ms(group, 300));
    status = call(b, own);
    TEST_CHECK(status == EP_ERR_TIMEOUT || status == EP_ERR_ABORTED);
    TEST_CHECK(strstr(ep_last_error(), "no word from rank"));
    TEST_OK(ep_group_set_timeout_ms(group, 30000));
    small_calls_drop(b);
    TEST_OK(ep_group_recover(group));
    return 0;
}

static bool same_call(enum kind a, enum kind b)
{
    return a == b || (a <= LL_SETUP && b <= LL_SETUP);
}

static int run(ep_group *group, void *arg)
{
    static _Thread_local bench b;
    (void)arg;
    if (small_calls_open(group, NULL, &b))
        return 1;
    for (int round = 0; round < (TEST_SANITIZED ? 2 : 8); round++)
        for (int first = 0; first < NUM_KINDS; first++)
            for (int others = 0; others < NUM_KINDS; others++) {
                b.hooks = round & 1;
                if (same_call(first, others))
                    continue;
                bool late = test_device_wanted() && (first < DISPATCH || others < DISPATCH);
                if (late && round > 1)
                    continue;
                if (late ? cross_on_device(&b, group, b.rank ? others : first)
                         : cross(&b, first, others)) {
                    fprintf(stderr, "rank %d: call %d on rank 0, %d on others\n", b.rank, first,
                            others);
                    return 1;
                }
            }
    TEST_OK(ep_group_barrier(group));
    ep_buffer_destroy(b.buffer);
    return 0;
}

static void crossed_calls_fail_at_once(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 3; ranks++) {
        if (!test_device_wanted()) /* there it is the same as the next */
            assert_int_equal(test_run_groups("threads", ranks, run, NULL), 0);
        assert_int_equal(test_run_groups("shm", ranks, run, NULL), 0);
    }
}

static void even_with_late_words(void **state)
{
    (void)state;
    if (test_device_wanted())
        skip(); /* faults are of the host's notifications */
    for (int ranks = 2; ranks <= 3; ranks++) {
        assert_int_equal(test_run_groups("fault(threads):seed=5,delay_us=100,reorder=1,repeat=20",
                                         ranks, run, NULL),
                         0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(crossed_calls_fail_at_once),
        cmocka_unit_test(even_with_late_words),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
