/* SPDX-License-Identifier: MIT */
/*
 * The host side of CUDA buffers over the fake GPU (support/fake_gpu.h): what
 * kernels are told, alike on all ranks where it must be; how calls end; that
 * nothing is left behind.
 */
#include "support/cuda.h"
#include "support/fake_gpu.h"
#include "support/test.h"

#include "entrepot/low_latency.h"

#include <stdlib.h>
#include <string.h>

#define TOKENS 64
#define HIDDEN 1024

static int open_rank(ep_group *group, struct cuda_rank *c)
{
    return cuda_open(group, (size_t)4 << 20, 0, TOKENS, HIDDEN, c);
}

/* Closes the rank: the buffer has left nothing on the device. */
static int close_rank(struct cuda_rank *c)
{
    struct fake_gpu *gpu = fake_gpu();
    TEST_CHECK(fake_gpu_script_done());
    ep_buffer_destroy(c->buffer);
    c->buffer = NULL;
    TEST_CHECK(gpu->num_mappings == 0);
    TEST_CHECK(gpu->num_allocations == 2); /* the test's x and ids */
    TEST_CHECK(gpu->num_events == 0 && gpu->num_streams == 1);
    cuda_close(c);
    return 0;
}

static size_t used_bytes(const struct cuda_rank *c)
{
    ep_buffer_info info = {.size = sizeof info};
    return ep_buffer_query(c->buffer, &info) == EP_OK ? info.used_bytes : SIZE_MAX;
}

static uint32_t num_calls(const struct cuda_rank *c)
{
    ep_buffer_info info = {.size = sizeof info};
    return ep_buffer_query(c->buffer, &info) == EP_OK ? (uint32_t)info.num_calls : 0;
}

/* Whether every rank has the same `bytes`, at most 1024. */
static bool alike(ep_group *group, const void *mine, size_t bytes)
{
    static uint8_t all[64][1024];
    uint8_t own[1024] = {0};
    memcpy(own, mine, bytes);
    if (ep_group_allgather(group, own, all, sizeof own) != EP_OK)
        return false;
    for (int r = 0; r < ep_group_num_ranks(group); r++)
        if (memcmp(all[r], own, sizeof own) != 0)
            return false;
    return true;
}

/* What ranks were told of one call: the number and what must agree are the same everywhere. */
static int calls_agree(ep_group *group, uint32_t serial, const uint32_t *field)
{
    TEST_CHECK(alike(group, &serial, sizeof serial));
    TEST_CHECK(alike(group, field, EPC_AGREED * sizeof *field));
    return 0;
}

/* The region that a dispatch offers, and whether every rank can write there. */
static int region_is_reached(const struct cuda_rank *c, const epc_dispatch_params *p)
{
    int32_t places[64];
    TEST_CHECK(fake_gpu_place(&p->comm, p->place, c->rank) + p->offset == p->region);
    TEST_OK(ep_group_allgather(c->group, &p->place, places, sizeof p->place));
    for (int r = 0; r < c->num_ranks; r++)
        TEST_CHECK(fake_gpu_place(&p->comm, places[r], r));
    return 0;
}

static int dispatches_agree(const struct cuda_rank *c)
{
    const epc_dispatch_params *p = &fake_gpu_launch(FAKE_DISPATCH, 0)->dispatch;
    if (calls_agree(c->group, p->serial, p->field))
        return 1;
    return region_is_reached(c, p);
}

static ep_status combine(const struct cuda_rank *c, ep_recv *recv, ep_tensor *out)
{
    ep_combine_args args = cuda_combine_args(c, recv);
    args.out = *out;
    return ep_combine(c->buffer, &args, NULL);
}

/* ---------------------------------------------------------------- normal calls */

/* A dispatch, one by its handle, and a combine; with counts or for the worst case. */
static int make_calls(struct cuda_rank *c, int64_t worst)
{
    ep_recv recv, again;
    ep_tensor out = c->x;
    TEST_OK(cuda_dispatch(c, worst, NULL, &recv, NULL));
    TEST_CHECK(recv.x.shape[0] == (worst ? worst : TOKENS));
    if (dispatches_agree(c))
        return 1;
    uint32_t serial = fake_gpu_launch(FAKE_DISPATCH, 0)->dispatch.serial, call = num_calls(c);
    TEST_OK(cuda_dispatch(c, 0, recv.handle, &again, NULL));
    if (dispatches_agree(c))
        return 1;
    TEST_OK(combine(c, &recv, &out));
    const epc_combine_params *p = &fake_gpu_launch(FAKE_COMBINE, 0)->combine;
    if (calls_agree(c->group, p->serial, p->field))
        return 1;
    TEST_CHECK(p->field[EPC_F_HANDLE] == call && p->serial == serial + 2);
    TEST_CHECK(fake_gpu_place(&p->comm, p->place, c->rank) + p->offset == recv.x.data);
    ep_recv_release(&again);
    cuda_drop(&recv);
    return 0;
}

static int calls_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    size_t before = 0;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    for (int round = 0; round < 6; round++) {
        if (make_calls(&c, round % 2 ? (int64_t)TOKENS * c.num_ranks : 0))
            return 1;
        if (round == 1)
            before = used_bytes(&c); /* tables and scratch, which stay */
    }
    TEST_CHECK(used_bytes(&c) == before);
    return close_rank(&c);
}

static void ranks_are_told_the_same(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks++)
        assert_int_equal(test_run_groups("shm", ranks, calls_body, NULL), 0);
}

/* Rank 1 gets more rows than there is room for: all grow, or take part in it, and go on. */
static int growth_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    int64_t rows = c.rank == 1 ? 40000 : TOKENS;
    fake_gpu_script((struct fake_outcome){.no_room = true, .rows = rows});
    fake_gpu_script((struct fake_outcome){.rows = rows});
    TEST_OK(cuda_dispatch(&c, 0, NULL, &recv, NULL));
    TEST_CHECK(recv.x.shape[0] == rows);
    if (dispatches_agree(&c))
        return 1;
    TEST_CHECK(fake_gpu_launch(FAKE_DISPATCH, 0)->dispatch.place == (c.rank == 1));
    TEST_CHECK(fake_gpu_launch(FAKE_DISPATCH, 1)->dispatch.place == 0);
    cuda_drop(&recv);
    if (make_calls(&c, 0))
        return 1;
    return close_rank(&c);
}

static void windows_grow(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 3; ranks++)
        assert_int_equal(test_run_groups("shm", ranks, growth_body, NULL), 0);
}

/* ---------------------------------------------------------------- failures */

static int failures_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    ep_event *event = NULL;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    fake_gpu_script((struct fake_outcome){.fail = EPC_FAIL_TIMEOUT, .late = 3});
    TEST_OK(cuda_dispatch(&c, TOKENS, NULL, &recv, &event)); /* all is known: its event tells */
    TEST_CHECK(ep_event_wait(event) == EP_ERR_TIMEOUT);
    TEST_CHECK(CUDA_SAYS("no word from ranks 0, 1"));
    ep_event_release(event);
    cuda_drop(&recv);
    fake_gpu_script((struct fake_outcome){.fail = EPC_FAIL_TIMEOUT, .late = 2});
    TEST_CHECK(cuda_dispatch(&c, 0, NULL, &recv, NULL) == EP_ERR_TIMEOUT);
    TEST_CHECK(CUDA_SAYS("ep_dispatch (call 2): no word from rank 1"));
    fake_gpu_script((struct fake_outcome){.dies = true});
    TEST_CHECK(cuda_dispatch(&c, 0, NULL, &recv, NULL) == EP_ERR_DEVICE);
    TEST_CHECK(CUDA_SAYS("the kernel ended without a report"));
    fake_gpu_script((struct fake_outcome){.launch_fails = true});
    TEST_CHECK(cuda_dispatch(&c, 0, NULL, &recv, NULL) == EP_ERR_DEVICE);
    TEST_CHECK(CUDA_SAYS("cudaLaunchKernel: error 700"));
    TEST_CHECK(fake_gpu_launch(FAKE_REFUSAL, 0)->combine.reject);
    TEST_OK(ep_group_recover(group));
    if (make_calls(&c, 0))
        return 1;
    return close_rank(&c);
}

static void failures_are_told(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, failures_body, NULL), 0);
}

/* What a graph records reports nothing; what would wait for counts can't be recorded. */
static int capture_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv, none;
    void *graph;
    (void)arg;
    if (open_rank(group, &c) || make_calls(&c, 0))
        return 1;
    TEST_OK(ep_graph_begin(EP_DEVICE_CUDA, test_device.index, test_device.stream));
    TEST_OK(cuda_dispatch(&c, (int64_t)TOKENS * c.num_ranks, NULL, &recv, NULL));
    TEST_CHECK(fake_gpu_launch(FAKE_DISPATCH, 0)->dispatch.serial == 0);
    TEST_CHECK(cuda_dispatch(&c, 0, NULL, &none, NULL) == EP_ERR_STATE);
    TEST_OK(ep_graph_end(EP_DEVICE_CUDA, test_device.index, test_device.stream, &graph));
    TEST_OK(ep_graph_destroy(EP_DEVICE_CUDA, test_device.index, graph));
    cuda_drop(&recv);
    if (make_calls(&c, 0))
        return 1;
    return close_rank(&c);
}

static void graphs_report_nothing(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, capture_body, NULL), 0);
}

/* ---------------------------------------------------------------- low latency */

static ep_status ll_dispatch(const struct cuda_rank *c, ep_ll_recv *recv, ep_event **event)
{
    ep_ll_dispatch_args args = cuda_ll_dispatch_args(c);
    *recv = (ep_ll_recv)EP_LL_RECV_INIT;
    args.completion = event ? EP_COMPLETE_BY_HOOK : args.completion;
    return ep_ll_dispatch(c->buffer, &args, recv, event);
}

/* The areas of the last low-latency kernel are this rank's own and one of each peer's. */
static int areas_are_reached(const struct cuda_rank *c)
{
    const epc_ll_params *p = &fake_gpu_launch(FAKE_LL, 0)->ll;
    int32_t told[3] = {(int32_t)p->serial, p->slot, (int32_t)(p->area.bytes >> 8)};
    TEST_CHECK(alike(c->group, told, sizeof told));
    for (int r = 0; r < c->num_ranks; r++) {
        const uint8_t *start = fake_gpu_place(&p->comm, 0, r);
        TEST_CHECK(start && p->area_of[r] > start && p->area_of[r] < start + ((size_t)1 << 30));
    }
    return 0;
}

static int low_latency_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_ll_recv recv;
    ep_event *event = NULL;
    (void)arg;
    if (cuda_open(group, (size_t)64 << 20, 0, TOKENS, HIDDEN, &c))
        return 1;
    for (int call = 0; call < 3; call++) {
        TEST_OK(ll_dispatch(&c, &recv, NULL));
        TEST_CHECK(fake_gpu_launch(FAKE_LL, 0)->which == EPC_LL_DISPATCH);
        TEST_CHECK(fake_gpu_launch(FAKE_LL, 0)->ll.slot == call % 2);
        if (areas_are_reached(&c))
            return 1;
        ep_ll_recv_release(&recv);
    }
    TEST_OK(ll_dispatch(&c, &recv, &event));
    TEST_CHECK(fake_gpu_launch(FAKE_LL, 0)->which == EPC_LL_SEND);
    TEST_OK(ep_event_wait(event));
    TEST_CHECK(fake_gpu_launch(FAKE_LL, 0)->which == EPC_LL_RECEIVE);
    ep_event_release(event);
    ep_ll_recv_release(&recv);
    fake_gpu_script((struct fake_outcome){.fail = EPC_FAIL_TIMEOUT, .late = 1});
    TEST_OK(ll_dispatch(&c, &recv, NULL));
    TEST_CHECK(ll_dispatch(&c, &recv, NULL) == EP_ERR_TIMEOUT); /* the next call tells */
    ep_ll_recv_release(&recv);
    return close_rank(&c);
}

static void low_latency_areas(void **state)
{
    (void)state;
    for (int ranks = 2; ranks <= 3; ranks++)
        assert_int_equal(test_run_groups("shm", ranks, low_latency_body, NULL), 0);
}

/* ---------------------------------------------------------------- events */

/* Whoever only ever asks whether a call is done learns of its death. */
static int query_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    ep_event *event;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    fake_gpu_script((struct fake_outcome){.dies = true});
    TEST_OK(cuda_dispatch(&c, TOKENS, NULL, &recv, &event));
    TEST_CHECK(ep_event_query(event) == EP_ERR_DEVICE && CUDA_SAYS("without a report"));
    TEST_CHECK(ep_event_query(event) == EP_ERR_DEVICE);
    ep_event_release(event);
    cuda_drop(&recv);
    return close_rank(&c);
}

static void queries_find_the_dead(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, query_body, NULL), 0);
}

/* Of a dispatch that has failed by the time its counts are asked for, and of calls without any. */
static int counts_body(ep_group *group, void *arg)
{
    const struct fake_outcome late = {.fail = EPC_FAIL_TIMEOUT, .late = 3};
    struct cuda_rank c;
    ep_recv recv, other;
    ep_ll_recv ll;
    ep_event *event;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    fake_gpu_script(late);
    TEST_OK(cuda_dispatch(&c, 0, NULL, &recv, &event));
    TEST_OK(cuda_dispatch(&c, 0, NULL, &other, NULL));
    cuda_drop(&other);
    TEST_CHECK(ep_event_wait_counts(event) == EP_ERR_TIMEOUT && !recv.owner);
    ep_event_release(event);
    TEST_OK(ll_dispatch(&c, &ll, &event));
    fake_gpu_script(late);
    TEST_CHECK(ep_event_wait_counts(event) == EP_ERR_TIMEOUT); /* runs the hook */
    ep_event_release(event);
    ep_ll_recv_release(&ll);
    return close_rank(&c);
}

static void counts_of_what_failed(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, counts_body, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranks_are_told_the_same), cmocka_unit_test(windows_grow),
        cmocka_unit_test(failures_are_told),       cmocka_unit_test(graphs_report_nothing),
        cmocka_unit_test(low_latency_areas),       cmocka_unit_test(queries_find_the_dead),
        cmocka_unit_test(counts_of_what_failed),
    };
    fake_gpu_use();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
