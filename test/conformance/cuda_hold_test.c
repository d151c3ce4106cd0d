/* SPDX-License-Identifier: MIT */
/*
 * Memory that a failed call let peers write is given to nobody before all ranks
 * have left that call, over the fake GPU (support/fake_gpu.h).
 */
#include "support/cuda.h"
#include "support/fake_gpu.h"
#include "support/test.h"

#include "entrepot/low_latency.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TOKENS 64
#define HIDDEN 1024
#define PIECE ((size_t)4 << 10)

static int open_rank(ep_group *group, struct cuda_rank *c)
{
    return cuda_open(group, (size_t)4 << 20, 0, TOKENS, HIDDEN, c);
}

struct range {
    const uint8_t *memory;
    size_t bytes;
};

/* The region of the last dispatch, or the part of it that its rows take. */
static struct range region_of(const ep_recv *recv)
{
    const epc_dispatch_params *p = &fake_gpu_launch(FAKE_DISPATCH, 0)->dispatch;
    struct range range = {p->region, (size_t)p->pieces[0]};
    if (recv)
        range.bytes = (size_t)epc_region_of(&p->shape, recv->x.shape[0]).end;
    return range;
}

static bool meets(struct range range, const uint8_t *memory, size_t bytes)
{
    return memory < range.memory + range.bytes && memory + bytes > range.memory;
}

/* Whether the buffer gives out any of the range: takes all that it has. */
static bool is_given_out(const struct cuda_rank *c, struct range range)
{
    static uint8_t *taken[4096];
    ep_buffer_info before = {.size = sizeof before}, now = before;
    int count = 0;
    bool found = false;
    ep_buffer_query(c->buffer, &before);
    do {
        if (ep_buffer_alloc(c->buffer, PIECE, (void **)&taken[count]) != EP_OK)
            abort();
        found |= meets(range, taken[count], PIECE);
        ep_buffer_query(c->buffer, &now);
    } while (++count < 4096 && now.window_bytes == before.window_bytes);
    while (count > 0)
        ep_buffer_free(c->buffer, taken[--count]);
    return found;
}

static int dispatch_well(struct cuda_rank *c, int64_t worst)
{
    ep_recv recv;
    TEST_OK(cuda_dispatch(c, worst, NULL, &recv, NULL));
    cuda_drop(&recv);
    return 0;
}

static const struct fake_outcome no_room = {.no_room = true};

/* Rank 0 times out, the others hear of it. */
static struct fake_outcome timeout_of(int rank)
{
    struct fake_outcome late = {.fail = EPC_FAIL_TIMEOUT, .late = 2};
    struct fake_outcome told = {.fail = EPC_FAIL_ABORTED,
                                .detail = {EPC_WHY(0, EP_ERR_TIMEOUT, 2)}};
    return rank == 0 ? late : told;
}

static ep_status timeout_status(int rank)
{
    return rank == 0 ? EP_ERR_TIMEOUT : EP_ERR_ABORTED;
}

/* ---------------------------------------------------------------- counts */

/* The region is the most there was: the next call begins without it, and finds that all ranks have
   come to it. No window grows for that. */
static int counts_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    (void)arg;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    size_t before = fake_gpu()->allocated_bytes;
    for (int round = 0; round < 20; round++) {
        fake_gpu_script(timeout_of(c.rank));
        TEST_CHECK(cuda_dispatch(&c, 0, NULL, &recv, NULL) == timeout_status(c.rank));
        struct range region = region_of(NULL);
        TEST_CHECK(region.bytes > ((size_t)1 << 20));
        TEST_CHECK(round || !is_given_out(&c, region)); /* takes a segment of this rank's own */
        before = round ? before : fake_gpu()->allocated_bytes;
        fake_gpu_script(no_room);
        TEST_OK(cuda_dispatch(&c, 0, NULL, &recv, NULL));
        TEST_CHECK(!meets(region, fake_gpu_launch(FAKE_DISPATCH, 1)->dispatch.region, 1));
        TEST_CHECK(meets(region, fake_gpu_launch(FAKE_DISPATCH, 0)->dispatch.region, 1));
        TEST_CHECK(fake_gpu()->allocated_bytes == before);
        cuda_drop(&recv);
    }
    cuda_close(&c);
    return 0;
}

static void next_call_begins_without(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 3; ranks++)
        assert_int_equal(test_run_groups("shm", ranks, counts_body, NULL), 0);
}

/* ---------------------------------------------------------------- results */

/* A result whose call fails after all, released before that is known or after; then by its rows
   alone is it known what may be written. */
static int result_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    ep_event *event = NULL;
    (void)arg;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    for (int early = 0; early < 2; early++)
        for (int again = 0; again < 2; again++) { /* by handle too */
            ep_recv first;
            TEST_OK(cuda_dispatch(&c, again ? 0 : TOKENS, NULL, &first, NULL));
            fake_gpu_script(timeout_of(c.rank));
            TEST_OK(
                cuda_dispatch(&c, again ? 0 : TOKENS, again ? first.handle : NULL, &recv, &event));
            struct range region = region_of(&recv);
            if (early && again)
                ep_recv_release(&recv);
            else if (early)
                cuda_drop(&recv);
            TEST_CHECK(ep_event_wait(event) == timeout_status(c.rank));
            ep_event_release(event);
            TEST_CHECK(!is_given_out(&c, region));
            if (!early && again)
                ep_recv_release(&recv);
            else if (!early)
                cuda_drop(&recv);
            TEST_CHECK(!is_given_out(&c, region));
            cuda_drop(&first);
            if (dispatch_well(&c, TOKENS))
                return 1;
            TEST_OK(cuda_dispatch(&c, TOKENS, NULL, &first, NULL)); /* tells how the last went */
            cuda_drop(&first);
            TEST_CHECK(is_given_out(&c, region));
        }
    fake_gpu_script(timeout_of(c.rank));
    TEST_OK(cuda_dispatch(&c, TOKENS, NULL, &recv, NULL));
    struct range region = region_of(&recv);
    cuda_drop(&recv);
    TEST_CHECK(!is_given_out(&c, region)); /* though nobody has asked how the call went */
    cuda_close(&c);
    return 0;
}

static void results_are_held(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, result_body, NULL), 0);
}

/* ---------------------------------------------------------------- ends of holding */

/* Nobody writes in a call that a rank refuses. */
static int refused_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    (void)arg;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    fake_gpu_script((struct fake_outcome){.fail = EPC_FAIL_ABORTED,
                                          .detail = {EPC_WHY(1, EP_ERR_ARGUMENT, 0)}});
    TEST_CHECK(cuda_dispatch(&c, 0, NULL, &recv, NULL) == EP_ERR_ABORTED);
    TEST_CHECK(is_given_out(&c, region_of(NULL)));
    cuda_close(&c);
    return 0;
}

/* A kernel that died may have told its region; recovering ends all kernels. */
static int recover_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    (void)arg;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    fake_gpu_script((struct fake_outcome){.dies = true});
    TEST_CHECK(cuda_dispatch(&c, 0, NULL, &recv, NULL) == EP_ERR_DEVICE);
    struct range region = region_of(NULL);
    TEST_CHECK(!is_given_out(&c, region));
    TEST_OK(ep_group_recover(group));
    TEST_CHECK(is_given_out(&c, region));
    if (dispatch_well(&c, 0))
        return 1;
    cuda_close(&c);
    return 0;
}

/* What fails for want of room tells as much as what succeeds: all have come. */
static int worst_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    (void)arg;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    fake_gpu_script(timeout_of(c.rank));
    TEST_CHECK(cuda_dispatch(&c, 0, NULL, &recv, NULL) == timeout_status(c.rank));
    fake_gpu_script((struct fake_outcome){.fail = EPC_FAIL_CAPACITY, .detail = {[4] = TOKENS}});
    TEST_CHECK(cuda_dispatch(&c, TOKENS, NULL, &recv, NULL) == EP_ERR_CAPACITY);
    cuda_drop(&recv);
    if (dispatch_well(&c, TOKENS))
        return 1;
    cuda_close(&c);
    return 0;
}

/* A rank that is left out but runs may write yet; one that has ended does not. */
static int masked_body(ep_group *group, void *arg)
{
    _Atomic int *stay = arg;
    struct cuda_rank c;
    ep_recv recv;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    if (c.rank == 2) { /* ends without a word, when it is told to */
        while (*stay)
            test_sleep_ms(1);
        _exit(0);
    }
    fake_gpu_script((struct fake_outcome){.fail = EPC_FAIL_TIMEOUT, .late = 4});
    TEST_OK(cuda_dispatch(&c, TOKENS, NULL, &recv, NULL));
    struct range region = region_of(&recv);
    cuda_drop(&recv);
    TEST_OK(ep_group_mask(group, 2, 1));
    TEST_CHECK(cuda_dispatch(&c, TOKENS, NULL, &recv, NULL) == EP_ERR_TIMEOUT); /* the one before */
    for (int call = 0; call < 2; call++)
        if (dispatch_well(&c, TOKENS))
            return 1;
    TEST_CHECK(!is_given_out(&c, region));
    TEST_OK(ep_group_barrier(group));
    *stay = 0;
    for (int tries = 0; tries < 1000 && !is_given_out(&c, region); tries++) {
        test_sleep_ms(5);
        if (dispatch_well(&c, TOKENS))
            return 1;
    }
    TEST_CHECK(is_given_out(&c, region));
    cuda_close(&c);
    return 0;
}

static void holding_ends(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, refused_body, NULL), 0);
    assert_int_equal(test_run_groups("shm", 2, recover_body, NULL), 0);
    assert_int_equal(test_run_groups("shm", 2, worst_body, NULL), 0);
    _Atomic int *stay = test_shared_alloc(sizeof *stay);
    *stay = 1;
    assert_int_equal(test_run_groups("shm", 3, masked_body, stay), 0);
    test_shared_free(stay, sizeof *stay);
}

/* ---------------------------------------------------------------- low latency */

static ep_status ll_dispatch(const struct cuda_rank *c, ep_dtype wire, ep_ll_recv *recv)
{
    ep_ll_dispatch_args args = cuda_ll_dispatch_args(c);
    *recv = (ep_ll_recv)EP_LL_RECV_INIT;
    args.wire = wire;
    return ep_ll_dispatch(c->buffer, &args, recv, NULL);
}

/* Areas of a shape make way for those of another, once all ranks have come to that. */
static int shapes_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_ll_recv recv;
    size_t before = 0;
    (void)arg;
    if (open_rank(group, &c) || dispatch_well(&c, 0))
        return 1;
    for (int call = 0; call < 12; call++) {
        TEST_OK(ll_dispatch(&c, call % 2 ? EP_E4M3 : EP_BF16, &recv));
        ep_ll_recv_release(&recv);
        if (call == 1)
            before = fake_gpu()->allocated_bytes;
    }
    TEST_CHECK(fake_gpu()->allocated_bytes == before);
    const epc_ll_params *p = &fake_gpu_launch(FAKE_LL, 0)->ll;
    struct range areas = {p->area_of[c.rank] - p->slot * p->area.bytes, (size_t)p->area.bytes * 2};
    TEST_OK(ep_group_barrier(group));
    if (c.rank == 0) { /* rank 1 is late: it may not have left the last call */
        TEST_OK(ep_group_set_timeout_ms(group, 200));
        TEST_CHECK(ll_dispatch(&c, EP_BF16, &recv) == EP_ERR_TIMEOUT);
        TEST_CHECK(!is_given_out(&c, areas));
        TEST_OK(ep_group_set_timeout_ms(group, 20000));
    }
    TEST_OK(ep_group_recover(group));
    TEST_CHECK(is_given_out(&c, areas));
    cuda_close(&c);
    return 0;
}

static void areas_are_held(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, shapes_body, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(next_call_begins_without),
        cmocka_unit_test(results_are_held),
        cmocka_unit_test(holding_ends),
        cmocka_unit_test(areas_are_held),
    };
    fake_gpu_use();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
