/* SPDX-License-Identifier: MIT */
/* A dispatch whose result is known before its rows are there: used at once, given up early, failed
   after all. */
#include "entrepot/ep.h"

#include "support/on_device.h"
#include "support/ranks.h"
#include "support/tensors.h"
#include "support/test.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { TOKENS = 64, HIDDEN = 256, ROUNDS = 20 };

typedef struct batch {
    float x[TOKENS][HIDDEN], out[TOKENS][HIDDEN];
    int64_t idx[TOKENS][1];
} batch;

/* Token t of every rank goes to rank t % R. */
static batch *new_batch(ep_group *group)
{
    batch *b = calloc(1, sizeof *b);
    int rank = ep_group_rank(group), num_ranks = ep_group_num_ranks(group);
    for (int t = 0; b && t < TOKENS; t++) {
        b->idx[t][0] = t % num_ranks;
        for (int h = 0; h < HIDDEN; h++)
            b->x[t][h] = (float)(rank * 1000 + t * 4 + h % 4);
    }
    return b;
}

static ep_dispatch_args args_of(ep_group *group, batch *b)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(b->x, EP_F32, TOKENS, HIDDEN);
    args.topk_idx = ep_tensor_2d(b->idx, EP_I64, TOKENS, 1);
    args.num_experts = ep_group_num_ranks(group);
    return args;
}

static int64_t expected_rows(ep_group *group)
{
    int rank = ep_group_rank(group), num_ranks = ep_group_num_ranks(group);
    return (int64_t)num_ranks * ((TOKENS - rank + num_ranks - 1) / num_ranks);
}

static int open_buffer(ep_group *group, int num_threads, ep_buffer **buffer)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.num_threads = num_threads;
    TEST_OK(ep_buffer_create(group, &config, buffer));
    return 0;
}

/* A combine of the rows is queued before they are there. */
static int use_at_once(ep_group *group, ep_buffer *buffer, batch *b)
{
    ep_dispatch_args args = args_of(group, b);
    ep_recv recv = EP_RECV_INIT;
    ep_event *sent, *back;
    TEST_OK(ep_dispatch(buffer, &args, &recv, &sent));
    TEST_OK(ep_event_wait_counts(sent));
    TEST_CHECK(recv.num_rows == expected_rows(group) && recv.x.shape[0] == recv.num_rows);
    TEST_CHECK(recv.host_tokens_per_expert[0] == recv.num_rows && recv.handle);
    ep_combine_args combine = EP_COMBINE_ARGS_INIT;
    combine.y = recv.x;
    combine.handle = recv.handle;
    combine.out = ep_tensor_2d(b->out, EP_F32, TOKENS, HIDDEN);
    TEST_OK(ep_combine(buffer, &combine, &back));
    TEST_OK(ep_event_wait_counts(sent));
    TEST_OK(ep_event_wait_counts(back));
    TEST_OK(ep_event_wait(back));
    TEST_OK(ep_event_wait(sent));
    TEST_CHECK(memcmp(b->out, b->x, sizeof b->x) == 0);
    ep_event_release(back);
    ep_event_release(sent);
    ep_handle_release(recv.handle);
    ep_recv_release(&recv);
    return 0;
}

/* Nobody wants the rows any more while they come. */
static int give_up_early(ep_group *group, ep_buffer *buffer, batch *b)
{
    ep_dispatch_args args = args_of(group, b);
    ep_recv recv = EP_RECV_INIT;
    ep_event *event;
    TEST_OK(ep_dispatch(buffer, &args, &recv, &event));
    TEST_OK(ep_event_wait_counts(event));
    ep_handle_release(recv.handle);
    ep_recv_release(&recv);
    TEST_OK(ep_event_wait(event));
    ep_event_release(event);
    return 0;
}

static int rounds(ep_group *group, void *argument)
{
    ep_buffer *buffer;
    batch *b = new_batch(group);
    ep_buffer_info before = {.size = sizeof before}, after = {.size = sizeof after};
    int failed = !b || open_buffer(group, *(int *)argument, &buffer);
    if (failed) {
        free(b);
        return 1;
    }
    failed = use_at_once(group, buffer, b); /* after it a device has what it keeps */
    ep_buffer_query(buffer, &before);
    for (int i = 0; i < ROUNDS && !failed; i++)
        failed = use_at_once(group, buffer, b) || give_up_early(group, buffer, b);
    ep_buffer_query(buffer, &after);
    failed |= after.used_bytes != before.used_bytes;
    ep_buffer_destroy(buffer);
    free(b);
    return failed;
}

static void known_early(void **state)
{
    (void)state;
    for (int threads = 0; threads <= 2; threads++)
        for (int ranks = 1; ranks <= 3; ranks++) {
            assert_int_equal(test_run_groups("threads", ranks, rounds, &threads), 0);
            assert_int_equal(test_run_groups("shm", ranks, rounds, &threads), 0);
        }
}

/* Called when the counts have come. */
static void *die(void *context, size_t bytes)
{
    (void)context;
    (void)bytes;
    _exit(0);
}

static void nothing(void *context, void *memory)
{
    (void)context;
    (void)memory;
}

static int survivor(ep_buffer *buffer, const ep_dispatch_args *args, _Atomic int *known)
{
    ep_recv recv = EP_RECV_INIT;
    ep_event *event;
    TEST_OK(ep_dispatch(buffer, args, &recv, &event));
    ep_status early = ep_event_wait_counts(event);
    TEST_CHECK(early == EP_OK || early == EP_ERR_RANK_DEAD); /* it may have failed by now */
    TEST_CHECK(early != EP_OK || recv.x.shape[0] > 0);
    TEST_CHECK(ep_event_wait(event) == EP_ERR_RANK_DEAD);
    if (early == EP_OK) {
        ((float *)recv.x.data)[0] = 1; /* the memory is still there */
        atomic_fetch_add(known, 1);
    }
    ep_event_release(event);
    ep_handle_release(recv.handle);
    ep_recv_release(&recv);
    return 0;
}

/* Rank 1 ends between the counts and its rows. */
static int loss(ep_group *group, void *argument)
{
    ep_buffer *buffer;
    batch *b = new_batch(group);
    ep_allocator allocator = {die, nothing, NULL};
    int failed = !b || open_buffer(group, 1, &buffer);
    if (!failed) {
        ep_dispatch_args args = args_of(group, b);
        if (ep_group_rank(group) == 1) {
            ep_recv recv = EP_RECV_INIT;
            args.allocator = &allocator;
            ep_dispatch(buffer, &args, &recv, NULL);
        }
        failed = survivor(buffer, &args, argument);
        ep_buffer_destroy(buffer);
    }
    free(b);
    return failed;
}

static void failed_after_all(void **state)
{
    (void)state;
    if (test_device_wanted())
        skip(); /* a kernel waits for the rank until the timeout, and the memory is the device's */
    _Atomic int *known = test_shared_alloc(sizeof *known);
    for (int i = 0; i < 50 && atomic_load(known) < 3; i++)
        assert_int_equal(test_run_groups("shm", 2, loss, (void *)known), 0);
    assert_true(atomic_load(known) > 0);
    test_shared_free(known, sizeof *known);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_early),
        cmocka_unit_test(failed_after_all),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
