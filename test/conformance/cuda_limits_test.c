/* SPDX-License-Identifier: MIT */
/*
 * What CUDA buffers do at their limits: room in the window for calls that can't
 * wait for it to grow, calls that fail on one rank. Skipped without a device.
 * ctest-timeout: 300
 */
#include "support/cuda.h"
#include "support/test.h"

#include "entrepot/low_latency.h"

#include <stdlib.h>
#include <string.h>

static void run(int num_ranks, test_group_fn body)
{
    if (!cuda_present())
        skip();
    assert_int_equal(test_run_groups("shm", num_ranks, body, NULL), 0);
}

/* ---------------------------------------------------------------- room */

/* All of the window but `left` bytes. */
static int fill_window(const struct cuda_rank *c, size_t left, void **memory)
{
    ep_buffer_info info = {.size = sizeof info};
    TEST_OK(ep_buffer_query(c->buffer, &info));
    TEST_CHECK(info.window_bytes - info.control_bytes > left);
    TEST_OK(ep_buffer_alloc(c->buffer, info.window_bytes - info.control_bytes - left, memory));
    return 0;
}

/* Rank 1 alone has no room: it learns so from the call, the other by its event; then all is well.
 */
static int lonely_body(ep_group *group, void *argument)
{
    struct cuda_rank c;
    ep_recv recv;
    ep_event *event = NULL;
    void *memory = NULL;
    (void)argument;
    if (cuda_open(group, (size_t)16 << 20, 0, 128, 4096, &c))
        return 1;
    int64_t worst = 2 * c.num_tokens;
    if (c.rank == 1 && fill_window(&c, 100000, &memory))
        return 1;
    ep_status status = cuda_dispatch(&c, worst, NULL, &recv, &event);
    if (c.rank == 1) {
        TEST_CHECK(status == EP_ERR_CAPACITY && event == NULL);
        TEST_CHECK(CUDA_SAYS("256 rows (num_worst_tokens)", "window_bytes of"));
    } else {
        TEST_CHECK(status == EP_OK && ep_event_wait(event) == EP_ERR_CAPACITY);
        TEST_CHECK(CUDA_SAYS("rank 1 has no room for its 256 rows", "window_bytes"));
    }
    ep_event_release(event);
    cuda_drop(&recv);
    TEST_OK(ep_buffer_free(c.buffer, memory));
    for (int round = 0; round < 3; round++) {
        TEST_OK(cuda_dispatch(&c, worst, NULL, &recv, NULL));
        TEST_CHECK(!cuda_rows_differ(&c, &recv.x));
        cuda_drop(&recv);
    }
    cuda_close(&c);
    return 0;
}

static void one_rank_without_room(void **state)
{
    (void)state;
    run(2, lonely_body);
}

static int combine(const struct cuda_rank *c, ep_handle *handle, const ep_tensor *y, bool backward,
                   ep_tensor *out)
{
    if (backward) {
        ep_dispatch_backward_args args = EP_DISPATCH_BACKWARD_ARGS_INIT;
        args.grad_recv_x = *y;
        args.handle = handle;
        args.grad_x = *out;
        args.stream = test_device.stream;
        TEST_OK(ep_dispatch_backward(c->buffer, &args, NULL));
    } else {
        ep_combine_args args = EP_COMBINE_ARGS_INIT;
        args.y = *y;
        args.handle = handle;
        args.out = *out;
        args.stream = test_device.stream;
        TEST_OK(ep_combine(c->buffer, &args, NULL));
    }
    return 0;
}

static int combine_backward(const struct cuda_rank *c, ep_handle *handle, ep_recv *recv)
{
    ep_combine_backward_args args = EP_COMBINE_BACKWARD_ARGS_INIT;
    ep_recv init = EP_RECV_INIT;
    *recv = init;
    args.grad_out = c->x;
    args.handle = handle;
    args.stream = test_device.stream;
    TEST_OK(ep_combine_backward(c->buffer, &args, recv, NULL));
    return 0;
}

/* One dispatch, then all that may follow it, the results held to the end, rows copied each time. */
static int follow(struct cuda_rank *c)
{
    enum { MOST = 40 };
    ep_recv first, cached, back, more[MOST];
    ep_tensor y = tensor_new(EP_BF16, c->num_ranks * c->num_tokens, c->hidden, 0, NULL);
    ep_tensor out = tensor_new(EP_BF16, c->num_tokens, c->hidden, 0, NULL);
    TEST_OK(cuda_dispatch(c, 0, NULL, &first, NULL));
    TEST_OK(cuda_dispatch(c, 0, first.handle, &cached, NULL));
    if (combine(c, first.handle, &y, false, &out) || combine_backward(c, first.handle, &back) ||
        combine(c, first.handle, &y, true, &out))
        return 1;
    TEST_CHECK(!cuda_rows_differ(c, &first.x) && !cuda_rows_differ(c, &cached.x) &&
               !cuda_rows_differ(c, &back.x));
    int held = 0; /* more than was promised: it ends with an error that says so */
    ep_status status = EP_OK;
    while (held < MOST && (status = cuda_dispatch(c, 0, first.handle, &more[held], NULL)) == EP_OK)
        held++;
    TEST_CHECK(status == EP_ERR_CAPACITY && CUDA_SAYS("rows (of handle)", "window_bytes of"));
    for (int i = 0; i < held; i++)
        cuda_drop(&more[i]);
    TEST_OK(cuda_dispatch(c, 0, first.handle, &more[0], NULL)); /* room is there again */
    TEST_CHECK(!cuda_rows_differ(c, &more[0].x));
    cuda_drop(&more[0]);
    cuda_drop(&cached);
    cuda_drop(&back);
    cuda_drop(&first);
    tensor_free(&y);
    tensor_free(&out);
    return 0;
}

static int followers_body(ep_group *group, void *argument)
{
    struct cuda_rank c;
    (void)argument;
    setenv("EP_CUDA_EXPORT", "0", 1); /* rows of y are always copied */
    if (cuda_open(group, (size_t)1 << 20, 0, 500, 7168, &c))
        return 1;
    for (int round = 0; round < 2; round++)
        if (follow(&c))
            return 1;
    cuda_close(&c);
    return 0;
}

static void room_for_what_follows(void **state)
{
    (void)state;
    run(2, followers_body);
}

/* A captured call can't grow the window either, and says what would help. */
static int captured_body(ep_group *group, void *argument)
{
    struct cuda_rank c;
    ep_recv recv;
    void *graph = NULL;
    (void)argument;
    if (cuda_open(group, (size_t)1 << 20, 0, 64, 7168, &c))
        return 1;
    TEST_OK(ep_graph_begin(EP_DEVICE_CUDA, test_device.index, test_device.stream));
    TEST_CHECK(cuda_dispatch(&c, 4000, NULL, &recv, NULL) == EP_ERR_CAPACITY);
    TEST_CHECK(CUDA_SAYS("4000 rows (num_worst_tokens)", "window_bytes of"));
    TEST_CHECK(cuda_dispatch(&c, 0, NULL, &recv, NULL) == EP_ERR_STATE);
    TEST_CHECK(CUDA_SAYS("captured", "num_worst_tokens"));
    TEST_OK(ep_graph_end(EP_DEVICE_CUDA, test_device.index, test_device.stream, &graph));
    ep_graph_destroy(EP_DEVICE_CUDA, test_device.index, graph);
    cuda_close(&c);
    return 0;
}

static void captured_without_room(void **state)
{
    (void)state;
    run(1, captured_body);
}

/* ---------------------------------------------------------------- low latency */

static ep_status ll_dispatch(struct cuda_rank *c, const ep_tensor *ids, int64_t room, bool hook,
                             ep_ll_recv *recv, ep_event **event)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    ep_ll_recv init = EP_LL_RECV_INIT;
    *recv = init;
    args.x = c->x;
    args.topk_idx = *ids;
    args.max_tokens = c->num_tokens;
    args.num_experts = c->num_ranks;
    args.max_expert_rows = room;
    args.completion = hook ? EP_COMPLETE_BY_HOOK : EP_COMPLETE_IN_BACKGROUND;
    args.stream = test_device.stream;
    return ep_ll_dispatch(c->buffer, &args, recv, event);
}

/* One rank's bad id: nobody's result may show rows, and the next call is a whole one. */
static int bad_id_round(struct cuda_rank *c, const ep_tensor *bad, bool hook)
{
    ep_ll_recv recv;
    ep_event *event = NULL;
    int32_t count = -1;
    const ep_tensor *ids = c->rank == 1 ? bad : &c->ids;
    TEST_OK(ll_dispatch(c, ids, 0, hook, &recv, &event));
    ep_status status = ep_event_wait(event);
    TEST_CHECK(status == (c->rank == 1 ? EP_ERR_ARGUMENT : EP_ERR_ABORTED));
    TEST_CHECK(c->rank == 1 ? CUDA_SAYS("topk_idx[0][0] is 77") : CUDA_SAYS("gave up"));
    cuda_read(c, &count, recv.count.data, sizeof count);
    TEST_CHECK(count == 0);
    ep_event_release(event);
    ep_ll_recv_release(&recv);
    for (int i = 0; i < 3; i++) {
        event = NULL;
        TEST_OK(ll_dispatch(c, &c->ids, 0, hook, &recv, &event));
        TEST_OK(ep_event_wait(event));
        cuda_read(c, &count, recv.count.data, sizeof count);
        TEST_CHECK(count == c->num_ranks * c->num_tokens && !cuda_rows_differ(c, &recv.x));
        ep_event_release(event);
        ep_ll_recv_release(&recv);
    }
    return 0;
}

static int bad_id_body(ep_group *group, void *argument)
{
    struct cuda_rank c;
    (void)argument;
    if (cuda_open(group, 0, 0, 20, 512, &c))
        return 1;
    int64_t *ids = test_zeros(c.num_tokens * c.num_ranks, 8);
    ids[0] = 77;
    ep_tensor bad = tensor_new_ids(EP_I64, c.num_tokens, c.num_ranks, 0, ids);
    for (int round = 0; round < 4; round++)
        if (bad_id_round(&c, &bad, round % 2 == 0))
            return 1;
    tensor_free(&bad);
    free(ids);
    cuda_close(&c);
    return 0;
}

static void failed_dispatch_is_empty(void **state)
{
    (void)state;
    run(3, bad_id_body);
}

/* Ids of c with expert `e` left to the first token (-1: none is), or every second token kept. */
static ep_tensor fewer_ids(const struct cuda_rank *c, int e)
{
    int64_t *ids = test_zeros(c->num_tokens * c->num_ranks, 8);
    for (int64_t i = 0; i < c->num_tokens * c->num_ranks; i++) {
        int64_t t = i / c->num_ranks, id = i % c->num_ranks;
        ids[i] = (e < 0 ? t % 2 : t > 0 && id == e) ? -1 : id;
    }
    ep_tensor tensor = tensor_new_ids(EP_I64, c->num_tokens, c->num_ranks, 0, ids);
    free(ids);
    return tensor;
}

/* More rows than an expert has room for: every rank gets the same error, and the next call works.
 */
static int overflow_body(ep_group *group, void *argument)
{
    static const char *const says[] = {"expert 0 on rank 0 receives 60 rows",
                                       "expert 1 on rank 1 receives 60 rows", ""};
    struct cuda_rank c;
    ep_ll_recv recv;
    (void)argument;
    if (cuda_open(group, 0, 0, 20, 512, &c))
        return 1;
    ep_tensor ids[3] = {c.ids, fewer_ids(&c, 0), fewer_ids(&c, -1)};
    for (int round = 0; round < 9; round++) {
        ep_event *event = NULL;
        int32_t count = -1;
        bool over = round % 3 != 2;
        TEST_OK(ll_dispatch(&c, &ids[round % 3], 59, round % 2, &recv, &event));
        TEST_CHECK(ep_event_wait(event) == (over ? EP_ERR_CAPACITY : EP_OK));
        TEST_CHECK(!over || CUDA_SAYS(says[round % 3], "max_expert_rows is 59"));
        cuda_read(&c, &count, recv.count.data, sizeof count);
        TEST_CHECK(count == (over ? 0 : 30));
        ep_event_release(event);
        ep_ll_recv_release(&recv);
    }
    tensor_free(&ids[1]);
    tensor_free(&ids[2]);
    cuda_close(&c);
    return 0;
}

static void overflow_is_everybodys(void **state)
{
    (void)state;
    run(3, overflow_body);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_without_room),  cmocka_unit_test(room_for_what_follows),
        cmocka_unit_test(captured_without_room),  cmocka_unit_test(failed_dispatch_is_empty),
        cmocka_unit_test(overflow_is_everybodys),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
