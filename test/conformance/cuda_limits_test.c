/* SPDX-License-Identifier: MIT */
/*
 * What CUDA buffers do at their limits: room in the window for calls that can't
 * wait for it to grow, calls that fail on one rank, the largest numbers, more
 * allocations than peers can map. Skipped without a device.
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

/* One rank's bad id: nobody's result may show rows or be combined, and the next calls are whole
   ones, though it is released behind them only. */
static int bad_id_round(struct cuda_rank *c, const ep_tensor *bad, bool hook)
{
    ep_ll_recv recv, failed;
    ep_event *event = NULL;
    ep_tensor y;
    int32_t count = -1;
    const ep_tensor *ids = c->rank == 1 ? bad : &c->ids;
    TEST_OK(ll_dispatch(c, ids, 0, hook, &failed, &event));
    ep_status status = ep_event_wait(event);
    TEST_CHECK(status == (c->rank == 1 ? EP_ERR_ARGUMENT : EP_ERR_ABORTED));
    TEST_CHECK(c->rank == 1 ? CUDA_SAYS("topk_idx[0][0] is 77") : CUDA_SAYS("gave up"));
    cuda_read(c, &count, failed.count.data, sizeof count);
    TEST_CHECK(count == 0);
    TEST_CHECK(ep_ll_combine_buffer(c->buffer, failed.handle, &y) == EP_ERR_STATE);
    TEST_CHECK(CUDA_SAYS("its call failed"));
    ep_event_release(event);
    for (int i = 0; i < 3; i++) {
        event = NULL;
        TEST_OK(ll_dispatch(c, &c->ids, 0, hook, &recv, &event));
        TEST_OK(ep_event_wait(event));
        cuda_read(c, &count, recv.count.data, sizeof count);
        TEST_CHECK(count == c->num_ranks * c->num_tokens && !cuda_rows_differ(c, &recv.x));
        ep_event_release(event);
        ep_ll_recv_release(&recv);
    }
    ep_ll_recv_release(&failed);
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

/* ---------------------------------------------------------------- numbers */

/* A group that is too large, and one that is not, each rank a thread. */
static int group_body(ep_group *group, void *argument)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    ep_buffer *buffer = NULL;
    (void)argument;
    config.device = EP_DEVICE_CUDA;
    TEST_CHECK(ep_buffer_create(group, &config, &buffer) == EP_ERR_UNSUPPORTED && !buffer);
    TEST_CHECK(CUDA_SAYS("the group has 65 ranks", "1..64"));
    return 0;
}

/* A process that uses a device can't fork ranks that do. */
static int group_process(int rank, int num_ranks, void *argument)
{
    (void)rank, (void)num_ranks;
    return test_run_groups("threads", 65, group_body, argument) != 0;
}

static int numbers_body(ep_group *group, void *argument)
{
    enum { TOPK = 256 };
    struct cuda_rank c;
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    ep_buffer *buffer = NULL;
    ep_recv recv;
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    (void)argument;
    config.device = EP_DEVICE_CUDA;
    config.max_experts = 16385;
    TEST_CHECK(ep_buffer_create(group, &config, &buffer) == EP_ERR_UNSUPPORTED);
    TEST_CHECK(CUDA_SAYS("max_experts is 16385", "1..16384"));
    if (cuda_open(group, 0, 0, 3, 64, &c))
        return 1;
    int64_t *ids = test_zeros(3 * (TOPK + 1), 8);
    for (int i = 0; i < 3 * (TOPK + 1); i++)
        ids[i] = i % (TOPK + 1);
    ep_tensor most = tensor_new_ids(EP_I64, 3, TOPK, 0, ids),
              more = tensor_new_ids(EP_I64, 3, TOPK + 1, 0, ids);
    args.x = c.x;
    args.topk_idx = more;
    args.num_experts = TOPK + 1;
    args.stream = test_device.stream;
    recv = (ep_recv)EP_RECV_INIT;
    TEST_CHECK(ep_dispatch(c.buffer, &args, &recv, NULL) == EP_ERR_UNSUPPORTED);
    TEST_CHECK(CUDA_SAYS("topk_idx.shape[1] (top-k) is 257", "1..256"));
    args.topk_idx = most;
    args.layout = EP_ROWS_BY_EXPERT;
    TEST_OK(ep_dispatch(c.buffer, &args, &recv, NULL));
    TEST_CHECK(recv.num_rows == 3 * TOPK);
    cuda_drop(&recv);
    tensor_free(&most);
    tensor_free(&more);
    free(ids);
    cuda_close(&c);
    return 0;
}

/* All experts there can be, by token and by expert. */
static int experts_body(ep_group *group, void *argument)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    ep_recv recv = EP_RECV_INIT;
    ep_buffer *buffer = NULL;
    int64_t ids[2] = {0, 16383};
    uint16_t rows[2 * 64] = {0};
    (void)argument;
    TEST_OK(test_device_enter(ep_group_rank(group)));
    config.device = EP_DEVICE_CUDA;
    config.device_index = test_device.index;
    config.max_experts = 16384;
    TEST_OK(ep_buffer_create(group, &config, &buffer));
    args.x = tensor_new(EP_BF16, 2, 64, 0, rows);
    args.topk_idx = tensor_new_ids(EP_I64, 2, 1, 0, ids);
    args.num_experts = 16384;
    args.stream = test_device.stream;
    for (int layout = 0; layout < 2; layout++) {
        args.layout = (ep_row_layout)layout;
        TEST_OK(ep_dispatch(buffer, &args, &recv, NULL));
        TEST_CHECK(recv.num_rows == 2); /* one of each rank */
        cuda_drop(&recv);
    }
    tensor_free(&args.x);
    tensor_free(&args.topk_idx);
    ep_buffer_destroy(buffer);
    test_device_leave();
    return 0;
}

static void numbers_have_limits(void **state)
{
    (void)state;
    if (!cuda_present())
        skip();
    assert_int_equal(test_run_processes(1, group_process, NULL), 0);
    run(1, numbers_body);
    run(2, experts_body);
}

/* ---------------------------------------------------------------- exports */

/* Many allocations, so many that entries must be used again. */
enum { BUFFERS = 120, EXPORTS = 112, IDLE = 256 };
struct many {
    struct cuda_rank c;
    ep_handle *handle;
    void *memory[BUFFERS];
    ep_tensor out;
};

/* Sums the rows of one allocation, which are all alike. */
static ep_status sum_buffer(struct many *m, int i)
{
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = ep_tensor_2d(m->memory[i], EP_BF16, m->c.num_ranks * m->c.num_tokens, m->c.hidden);
    args.y.device = EP_DEVICE_CUDA;
    args.y.device_index = test_device.index;
    args.handle = m->handle;
    args.out = m->out;
    args.stream = test_device.stream;
    return ep_combine(m->c.buffer, &args, NULL);
}

static uint16_t small_number(int i)
{
    uint16_t value;
    float number = (float)(i + 1);
    memcpy(&value, (char *)&number + 2, 2); /* exact: BF16 has 8 bits */
    return value;
}

static int check_sum(struct many *m, int i)
{
    uint16_t first, last;
    size_t count = (size_t)(m->c.num_tokens * m->c.hidden);
    TEST_OK(sum_buffer(m, i));
    cuda_read(&m->c, &first, m->out.data, 2);
    cuda_read(&m->c, &last, (uint16_t *)m->out.data + count - 1, 2);
    TEST_CHECK(first == small_number(2 * i + 1) && last == first); /* two ranks' rows */
    return 0;
}

/* Whether the allocation is read in place: with the window full of results, nothing can be copied.
 */
static int check_export(struct many *m, int i, bool exported)
{
    enum { MOST = 64 };
    ep_recv held[MOST];
    int count = 0, failed;
    while (count < MOST && cuda_dispatch(&m->c, 0, m->handle, &held[count], NULL) == EP_OK)
        count++;
    TEST_CHECK(count < MOST);
    if (exported)
        failed = check_sum(m, i);
    else
        failed = sum_buffer(m, i) != EP_ERR_CAPACITY ||
                 !CUDA_SAYS("peers can't reach", "ep_buffer_alloc", "window_bytes of");
    for (int n = 0; n < count; n++)
        ep_recv_release(&held[n]);
    if (failed)
        fprintf(stderr, "allocation %d, %s\n", i, exported ? "exported" : "not exported");
    return failed;
}

static int make_buffers(struct many *m)
{
    int64_t elements = m->c.num_ranks * m->c.num_tokens * m->c.hidden;
    uint16_t *values = test_zeros(elements, 2);
    for (int i = 0; i < BUFFERS; i++) {
        TEST_OK(ep_device_alloc(EP_DEVICE_CUDA, test_device.index, (size_t)2 << 20, &m->memory[i]));
        for (int64_t e = 0; e < elements; e++)
            values[e] = small_number(i);
        test_memory_write(m->memory[i], values, (size_t)elements * 2);
    }
    free(values);
    return 0;
}

static int use_many(struct many *m)
{
    int failed = 0;
    for (int i = 0; i < BUFFERS && !failed; i++) /* copied, and offered as long as there is room */
        failed = check_sum(m, i);
    for (int i = 0; i < 2 && !failed; i++) /* all peers have come by */
        failed = check_sum(m, 0);
    for (int i = EXPORTS - 3; i < EXPORTS + 3 && !failed; i++)
        failed = check_export(m, i, i < EXPORTS);
    for (int i = 0; i < IDLE + 2 && !failed; i++) /* the others lie idle */
        failed = check_sum(m, 0);
    if (!failed)
        failed = check_sum(m, BUFFERS - 1) || check_sum(m, 0); /* takes the place of 1 */
    return failed || check_export(m, BUFFERS - 1, true) || check_export(m, 0, true) ||
           check_export(m, 2, true) || check_export(m, 1, false);
}

static int exports_body(ep_group *group, void *argument)
{
    struct many *m = test_zeros(1, sizeof *m);
    ep_recv recv;
    (void)argument;
    if (cuda_open(group, (size_t)1 << 20, 0, 64, 1024, &m->c))
        return 1;
    m->out = tensor_new(EP_BF16, m->c.num_tokens, m->c.hidden, 0, NULL);
    TEST_OK(cuda_dispatch(&m->c, 2 * m->c.num_tokens, NULL, &recv, NULL));
    m->handle = recv.handle;
    ep_recv_release(&recv);
    if (make_buffers(m) || use_many(m)) {
        fprintf(stderr, "  on rank %d\n", m->c.rank);
        return 1;
    }
    ep_handle_release(m->handle);
    tensor_free(&m->out);
    for (int i = 0; i < BUFFERS; i++)
        ep_device_free(EP_DEVICE_CUDA, test_device.index, m->memory[i]);
    cuda_close(&m->c);
    free(m);
    return 0;
}

static void many_allocations_are_exported(void **state)
{
    (void)state;
    unsetenv("EP_CUDA_EXPORT");
    run(2, exports_body);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_rank_without_room),         cmocka_unit_test(room_for_what_follows),
        cmocka_unit_test(captured_without_room),         cmocka_unit_test(failed_dispatch_is_empty),
        cmocka_unit_test(overflow_is_everybodys),        cmocka_unit_test(numbers_have_limits),
        cmocka_unit_test(many_allocations_are_exported),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
