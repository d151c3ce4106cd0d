/* SPDX-License-Identifier: MIT */
/*
 * The host side of CUDA buffers over the fake GPU (support/fake_gpu.h): calls
 * that are refused, or whose kernels can't be started or die. What they leave
 * behind must not meet later calls.
 */
#include "support/cuda.h"
#include "support/fake_gpu.h"
#include "support/test.h"

#include "entrepot/low_latency.h"

#include <stdlib.h>
#include <string.h>

#define TOKENS 64
#define HIDDEN 1024
#define TOO_MANY_SMS 999

static int open_rank(ep_group *group, struct cuda_rank *c)
{
    return cuda_open(group, (size_t)16 << 20, 0, TOKENS, HIDDEN, c);
}

/* Closes the rank: the buffer has left nothing on the device. */
static int close_rank(struct cuda_rank *c)
{
    const struct fake_gpu *gpu = fake_gpu();
    TEST_CHECK(fake_gpu_script_done());
    ep_buffer_destroy(c->buffer);
    c->buffer = NULL;
    TEST_CHECK(gpu->num_mappings == 0 && gpu->num_events == 0 && gpu->num_streams == 1);
    cuda_close(c);
    return 0;
}

static ep_tensor rows_of(int64_t rows, int64_t columns, ep_dtype dtype)
{
    void *zeros = test_zeros(rows * columns, ep_dtype_size(dtype));
    ep_tensor tensor = tensor_new(dtype, rows, columns, 0, zeros);
    free(zeros);
    return tensor;
}

static ep_status combine(const struct cuda_rank *c, const ep_recv *recv, int32_t num_sms)
{
    ep_combine_args args = cuda_combine_args(c, recv);
    args.num_sms = num_sms;
    return ep_combine(c->buffer, &args, NULL);
}

static ep_status ll_dispatch_on(const struct cuda_rank *c, ep_dtype wire, int32_t num_sms,
                                ep_ll_recv *recv, ep_event **event)
{
    ep_ll_dispatch_args args = cuda_ll_dispatch_args(c);
    *recv = (ep_ll_recv)EP_LL_RECV_INIT;
    args.wire = wire;
    args.num_sms = num_sms;
    args.completion = event ? EP_COMPLETE_BY_HOOK : args.completion;
    return ep_ll_dispatch(c->buffer, &args, recv, event);
}

static ep_status ll_dispatch(const struct cuda_rank *c, int32_t num_sms, ep_ll_recv *recv,
                             ep_event **event)
{
    return ll_dispatch_on(c, EP_BF16, num_sms, recv, event);
}

static ep_status ll_combine(const struct cuda_rank *c, const ep_ll_recv *recv, int32_t num_sms,
                            ep_event **event)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    ep_tensor weights = rows_of(TOKENS, c->num_ranks, EP_F32);
    args.handle = recv->handle;
    args.topk_idx = c->ids;
    args.topk_weights = weights;
    args.out = c->x;
    args.stream = test_device.stream;
    args.num_sms = num_sms;
    args.completion = event ? EP_COMPLETE_BY_HOOK : args.completion;
    ep_status status = ep_ll_combine_buffer(c->buffer, recv->handle, &args.y);
    if (status == EP_OK)
        status = ep_ll_combine(c->buffer, &args, event);
    tensor_free(&weights);
    return status;
}

/* ---------------------------------------------------------------- numbers of calls */

/* A dispatch and its combine, of which all ranks say the same. */
static int ranks_agree(struct cuda_rank *c)
{
    ep_recv recv;
    uint32_t handles[64], own;
    TEST_OK(cuda_dispatch(c, 0, NULL, &recv, NULL));
    TEST_OK(combine(c, &recv, 0));
    own = fake_gpu_launch(FAKE_COMBINE, 0)->combine.field[EPC_F_HANDLE];
    TEST_OK(ep_group_allgather(c->group, &own, handles, sizeof own));
    for (int r = 0; r < c->num_ranks; r++)
        TEST_CHECK(handles[r] == own);
    cuda_drop(&recv);
    return 0;
}

/* Rank 0 refuses a call that the others make: by what the core checks, and by what CUDA does. */
static int refused_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    (void)arg;
    if (open_rank(group, &c) || ranks_agree(&c))
        return 1;
    TEST_OK(cuda_dispatch(&c, 0, NULL, &recv, NULL));
    bool refuses = c.rank == 0;
    TEST_CHECK(combine(&c, &recv, refuses ? TOO_MANY_SMS : 0) ==
               (refuses ? EP_ERR_ARGUMENT : EP_OK));
    cuda_drop(&recv);
    if (ranks_agree(&c))
        return 1;
    if (refuses)
        TEST_OK(ep_buffer_refuse(c.buffer, EP_CALL_DISPATCH, "a test"));
    else {
        TEST_OK(cuda_dispatch(&c, 0, NULL, &recv, NULL));
        cuda_drop(&recv);
    }
    if (ranks_agree(&c))
        return 1;
    return close_rank(&c);
}

static void refused_calls_count_once(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, refused_body, NULL), 0);
}

/* The backward of a combine by expert, in halves. */
static ep_status backward(const struct cuda_rank *c, const ep_recv *forward, ep_tensor grad_out,
                          ep_tensor grad_weights, int32_t num_sms, ep_recv *recv)
{
    ep_combine_backward_args args = EP_COMBINE_BACKWARD_ARGS_INIT;
    ep_recv init = EP_RECV_INIT;
    *recv = init;
    args.grad_out = grad_out;
    if (grad_weights.data)
        args.y = forward->x;
    args.handle = forward->handle;
    args.grad_topk_weights = grad_weights;
    args.stream = test_device.stream;
    args.num_sms = num_sms;
    return ep_combine_backward(c->buffer, &args, recv, NULL);
}

static int backward_with(struct cuda_rank *c, int64_t columns, int32_t num_sms, ep_status expected)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_recv recv = EP_RECV_INIT, grad;
    args.x = c->x;
    args.topk_idx = c->ids;
    args.num_experts = c->num_ranks;
    args.layout = EP_ROWS_BY_EXPERT;
    args.stream = test_device.stream;
    fake_gpu_script((struct fake_outcome){.rows = (int64_t)TOKENS * c->num_ranks});
    TEST_OK(ep_dispatch(c->buffer, &args, &recv, NULL));
    ep_tensor weights = rows_of(TOKENS, c->num_ranks, EP_F32), grad_out = c->x;
    grad_out.shape[1] = columns;
    TEST_CHECK(backward(c, &recv, grad_out, weights, num_sms, &grad) == expected);
    ep_recv_release(&grad);
    cuda_drop(&recv);
    tensor_free(&weights);
    return 0;
}

static int halves_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    bool refuses = c.rank == 0;
    ep_status expected = refuses ? EP_ERR_ARGUMENT : EP_OK;
    if (backward_with(&c, HIDDEN, 0, EP_OK) || ranks_agree(&c))
        return 1;
    if (backward_with(&c, refuses ? 12 : HIDDEN, 0, expected) || ranks_agree(&c))
        return 1;
    if (backward_with(&c, HIDDEN, refuses ? TOO_MANY_SMS : 0, expected) || ranks_agree(&c))
        return 1;
    return close_rank(&c);
}

static void calls_in_halves_count_once(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, halves_body, NULL), 0);
}

/* Rank 0 refuses the call that sets memory up for low latency: all leave it after one exchange. */
static int first_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv normal;
    ep_ll_recv recv;
    ep_event *event;
    (void)arg;
    if (open_rank(group, &c) || ranks_agree(&c))
        return 1;
    TEST_OK(ep_group_set_timeout_ms(group, 2000));
    bool refuses = c.rank == 0;
    fake_gpu_script((struct fake_outcome){.no_room = true, .rows = 40000});
    TEST_OK(cuda_dispatch(&c, 0, NULL, &normal, &event)); /* windows grow first */
    if (refuses)
        TEST_OK(ep_buffer_refuse(c.buffer, EP_CALL_LL_DISPATCH, "a test"));
    else
        TEST_CHECK(ll_dispatch(&c, 0, &recv, NULL) == EP_ERR_ABORTED && CUDA_SAYS("a test"));
    TEST_OK(ep_event_wait(event));
    ep_event_release(event);
    cuda_drop(&normal);
    TEST_CHECK(ll_dispatch(&c, refuses ? TOO_MANY_SMS : 0, &recv, NULL) ==
               (refuses ? EP_ERR_ARGUMENT : EP_ERR_ABORTED));
    TEST_CHECK(refuses || CUDA_SAYS("rank 0 gave up", "num_sms is 999"));
    TEST_OK(ll_dispatch(&c, 0, &recv, NULL));
    ep_ll_recv_release(&recv);
    if (ranks_agree(&c))
        return 1;
    return close_rank(&c);
}

static void refused_setup_is_exchanged_once(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 3, first_body, NULL), 0);
}

/* ---------------------------------------------------------------- num_sms */

static ep_status dispatch_with_sms(struct cuda_rank *c, int32_t num_sms)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_recv recv = EP_RECV_INIT;
    args.x = c->x;
    args.topk_idx = c->ids;
    args.num_experts = c->num_ranks;
    args.stream = test_device.stream;
    args.num_sms = num_sms;
    ep_status status = ep_dispatch(c->buffer, &args, &recv, NULL);
    cuda_drop(&recv);
    return status;
}

static ep_status dispatch_backward(struct cuda_rank *c, const ep_recv *recv, int32_t num_sms)
{
    ep_dispatch_backward_args args = EP_DISPATCH_BACKWARD_ARGS_INIT;
    args.grad_recv_x = recv->x;
    args.handle = recv->handle;
    args.grad_x = c->x;
    args.stream = test_device.stream;
    args.num_sms = num_sms;
    return ep_dispatch_backward(c->buffer, &args, NULL);
}

/* Every call, with a count that is out of range. */
static int refuses_sms(struct cuda_rank *c, const ep_recv *recv, const ep_ll_recv *ll, int32_t sms)
{
    char value[64];
    ep_ll_recv none;
    ep_recv grad;
    ep_tensor not_given = EP_TENSOR_NONE;
    snprintf(value, sizeof value, "num_sms is %d; it must be 0..132", (int)sms);
    TEST_CHECK(dispatch_with_sms(c, sms) == EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("ep_dispatch: ", value));
    TEST_CHECK(combine(c, recv, sms) == EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("ep_combine: ", value));
    TEST_CHECK(dispatch_backward(c, recv, sms) == EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("ep_dispatch_backward: ", value));
    TEST_CHECK(backward(c, recv, c->x, not_given, sms, &grad) == EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("ep_combine_backward: ", value));
    TEST_CHECK(ll_combine(c, ll, sms, NULL) == EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("ep_ll_combine: ", value));
    TEST_CHECK(ll_dispatch(c, sms, &none, NULL) == EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("ep_ll_dispatch: ", value));
    return 0;
}

static int sms_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    ep_ll_recv ll;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    TEST_OK(cuda_dispatch(&c, 0, NULL, &recv, NULL));
    TEST_CHECK(fake_gpu_launch(FAKE_DISPATCH, 0)->blocks == 16);
    TEST_OK(ll_dispatch(&c, 132, &ll, NULL));
    TEST_CHECK(fake_gpu_launch(FAKE_LL, 0)->blocks == 132);
    TEST_OK(combine(&c, &recv, 1));
    TEST_CHECK(fake_gpu_launch(FAKE_COMBINE, 0)->blocks == 1);
    if (refuses_sms(&c, &recv, &ll, -1) || refuses_sms(&c, &recv, &ll, 133))
        return 1;
    TEST_OK(dispatch_with_sms(&c, 132)); /* the buffer stays usable */
    TEST_OK(ll_combine(&c, &ll, 7, NULL));
    ep_ll_recv_release(&ll);
    cuda_drop(&recv);
    return close_rank(&c);
}

static void num_sms_is_checked(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, sms_body, NULL), 0);
}

/* ---------------------------------------------------------------- numbers too large for kernels */

/* Of more (token, place) pairs than an int32 counts. Nothing is read: so much memory is not there.
 */
static int pairs_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_ll_recv recv = EP_LL_RECV_INIT;
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    const int64_t tokens = (int64_t)1 << 20, topk = 2048;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    ep_buffer_destroy(c.buffer);
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.max_experts = (int32_t)topk;
    config.device = EP_DEVICE_CUDA;
    config.device_index = test_device.index;
    TEST_OK(ep_buffer_create(group, &config, &c.buffer));
    args.x = c.x;
    args.topk_idx = c.ids;
    args.x.shape[0] = args.topk_idx.shape[0] = args.max_tokens = tokens;
    args.topk_idx.shape[1] = args.topk_idx.stride[0] = args.num_experts = topk;
    args.max_expert_rows = 1;
    args.overflow = EP_OVERFLOW_DROP;
    args.stream = test_device.stream;
    TEST_CHECK(ep_ll_dispatch(c.buffer, &args, &recv, NULL) == EP_ERR_UNSUPPORTED);
    TEST_CHECK(CUDA_SAYS("ep_ll_dispatch: topk_idx is [1048576, 2048]; on CUDA it must have fewer "
                         "than 2147483648 elements"));
    TEST_OK(ll_dispatch(&c, 0, &recv, NULL));
    ep_ll_recv_release(&recv);
    return close_rank(&c);
}

static void low_latency_pairs_are_bounded(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, pairs_body, NULL), 0);
}

/* ---------------------------------------------------------------- hooks */

static size_t used_bytes(const struct cuda_rank *c)
{
    ep_buffer_info info = {.size = sizeof info};
    return ep_buffer_query(c->buffer, &info) == EP_OK ? info.used_bytes : SIZE_MAX;
}

/* The receiving half of the call to come can't be launched, as often as it is asked for. */
static void script_hook(int times)
{
    fake_gpu_script((struct fake_outcome){0});
    for (int i = 0; i < times; i++)
        fake_gpu_script((struct fake_outcome){.launch_fails = true});
}

/* A dispatch or combine whose hook is asked for `times` times, the last time by the release. */
static int lose_hook(struct cuda_rank *c, bool combines, int times)
{
    ep_ll_recv recv;
    ep_event *event;
    if (combines)
        TEST_OK(ll_dispatch(c, 0, &recv, NULL));
    script_hook(times);
    TEST_OK(combines ? ll_combine(c, &recv, 0, &event) : ll_dispatch(c, 0, &recv, &event));
    for (int i = 1; i < times; i++)
        TEST_CHECK((i % 2 ? ep_event_wait(event) : ep_event_query(event)) == EP_ERR_DEVICE);
    ep_event_release(event);
    TEST_CHECK(fake_gpu_script_done());
    if (!combines)
        TEST_CHECK(ll_combine(c, &recv, 0, NULL) == EP_ERR_STATE); /* the dispatch failed */
    ep_ll_recv_release(&recv);
    return 0;
}

/* More often than calls can be in flight: nothing of them may be left. */
static int hooks_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    size_t before = 0;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    for (int i = 0; i < 80; i++) {
        if (lose_hook(&c, i % 2, 1 + i % 3))
            return 1;
        if (i == 1)
            before = used_bytes(&c);
    }
    TEST_CHECK(used_bytes(&c) == before);
    if (ranks_agree(&c))
        return 1;
    return close_rank(&c);
}

static void hooks_that_do_not_start(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, hooks_body, NULL), 0);
}

/* ---------------------------------------------------------------- kernels that die */

/* Takes pieces of the window until it has none that a call could use. */
static int fill_window(struct cuda_rank *c, void **memory, int most, int *count)
{
    ep_buffer_info before = {.size = sizeof before}, after = before;
    TEST_OK(ep_buffer_query(c->buffer, &before));
    for (*count = 0; *count < most && after.window_bytes <= before.window_bytes; ++*count) {
        TEST_OK(ep_buffer_alloc(c->buffer, 65536, &memory[*count]));
        TEST_OK(ep_buffer_query(c->buffer, &after));
    }
    TEST_CHECK(*count < most);
    return 0;
}

/* A call that has no room waits for the one before to give some back; which died. */
static int death_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv, again;
    void *memory[512];
    int count;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    TEST_OK(cuda_dispatch(&c, 0, NULL, &recv, NULL));
    fake_gpu_script((struct fake_outcome){.dies = true});
    TEST_OK(combine(&c, &recv, 0));
    if (fill_window(&c, memory, 512, &count))
        return 1;
    TEST_CHECK(cuda_dispatch(&c, 0, recv.handle, &again, NULL) == EP_ERR_CAPACITY);
    while (count--)
        TEST_OK(ep_buffer_free(c.buffer, memory[count]));
    TEST_OK(cuda_dispatch(&c, 0, recv.handle, &again, NULL));
    ep_recv_release(&again);
    cuda_drop(&recv);
    return close_rank(&c);
}

static void no_wait_for_the_dead(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, death_body, NULL), 0);
}

/* As many dead calls as can be in flight: the next one says so. */
static int deaths_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_recv recv;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    TEST_OK(cuda_dispatch(&c, 0, NULL, &recv, NULL));
    for (int i = 0; i < 64; i++) {
        fake_gpu_script((struct fake_outcome){.dies = true});
        TEST_OK(combine(&c, &recv, 0));
        TEST_CHECK(fake_gpu_script_done());
    }
    TEST_CHECK(combine(&c, &recv, 0) == EP_ERR_DEVICE);
    TEST_CHECK(CUDA_SAYS("ep_combine: the kernel of ep_combine (call 2)", "without a report"));
    cuda_drop(&recv);
    return close_rank(&c);
}

static void no_wait_for_a_place_of_the_dead(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, deaths_body, NULL), 0);
}

/* Hooks that nobody asked for hold as many: an error, and once they have run all is well. */
static int pending_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_ll_recv recv;
    ep_event *event[64];
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    TEST_OK(ll_dispatch(&c, 0, &recv, NULL));
    for (int i = 0; i < 64; i++)
        TEST_OK(ll_combine(&c, &recv, 0, &event[i]));
    TEST_CHECK(ll_combine(&c, &recv, 0, NULL) == EP_ERR_STATE);
    TEST_CHECK(CUDA_SAYS("64 calls are in flight already, whose hooks have yet to run"));
    for (int i = 0; i < 64; i++) {
        TEST_OK(ep_event_wait(event[i]));
        ep_event_release(event[i]);
    }
    TEST_OK(ll_combine(&c, &recv, 0, NULL));
    ep_ll_recv_release(&recv);
    return close_rank(&c);
}

static void no_wait_for_hooks(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, pending_body, NULL), 0);
}

/* ---------------------------------------------------------------- graphs of low latency */

static bool overlap(const void *a, int64_t a_bytes, const void *b, int64_t b_bytes)
{
    const uint8_t *at = a, *other = b;
    return at < other + b_bytes && other < at + a_bytes;
}

/* Whether memory has nothing of what the low-latency kernel was told of this rank. */
static bool apart(const struct cuda_rank *c, const epc_ll_params *p, const void *at, int64_t bytes)
{
    int64_t rows = (int64_t)p->num_local * p->expert_rows * p->row_bytes;
    return !overlap(p->area_of[c->rank], p->area.bytes, at, bytes) &&
           !overlap(p->recv_x, rows, at, bytes);
}

/* A call of each mode; none gets memory of the graph's kernel. */
static int calls_stay_apart(struct cuda_rank *c, const epc_ll_params *graph, ep_dtype wire)
{
    ep_ll_recv ll;
    ep_recv recv;
    TEST_OK(ll_dispatch_on(c, wire, 0, &ll, NULL));
    const epc_ll_params *p = &fake_gpu_launch(FAKE_LL, 0)->ll;
    TEST_CHECK(apart(c, graph, p->area_of[c->rank], p->area.bytes));
    TEST_CHECK(apart(c, graph, p->recv_x, p->num_local * p->expert_rows * p->row_bytes));
    TEST_OK(ll_combine(c, &ll, 0, NULL));
    ep_ll_recv_release(&ll);
    TEST_OK(cuda_dispatch(c, 0, NULL, &recv, NULL));
    const epc_dispatch_params *d = &fake_gpu_launch(FAKE_DISPATCH, 0)->dispatch;
    TEST_CHECK(apart(c, graph, d->region, d->pieces[0]));
    cuda_drop(&recv);
    return 0;
}

/* A dispatch and its combine, captured; what the kernels were told. */
static int capture(struct cuda_rank *c, epc_ll_params *told)
{
    ep_ll_recv ll;
    void *graph;
    TEST_OK(ep_graph_begin(EP_DEVICE_CUDA, test_device.index, test_device.stream));
    TEST_OK(ll_dispatch(c, 0, &ll, NULL));
    *told = fake_gpu_launch(FAKE_LL, 0)->ll;
    TEST_CHECK(told->serial == 0);
    TEST_OK(ll_combine(c, &ll, 0, NULL));
    TEST_CHECK(fake_gpu_launch(FAKE_LL, 0)->ll.serial == 0);
    TEST_OK(ep_graph_end(EP_DEVICE_CUDA, test_device.index, test_device.stream, &graph));
    TEST_OK(ep_graph_destroy(EP_DEVICE_CUDA, test_device.index, graph));
    ep_ll_recv_release(&ll);
    return 0;
}

static int graph_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_ll_recv ll;
    epc_ll_params graph;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    TEST_OK(ll_dispatch(&c, 0, &ll, NULL)); /* sets memory up, which a graph can't */
    ep_ll_recv_release(&ll);
    if (capture(&c, &graph))
        return 1;
    for (int round = 0; round < 3; round++) {
        if (calls_stay_apart(&c, &graph, EP_E4M3))
            return 1;
        if (round == 1)
            TEST_OK(ep_group_recover(group));
        if (calls_stay_apart(&c, &graph, EP_BF16))
            return 1;
    }
    return close_rank(&c);
}

static void graphs_keep_their_memory(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 3; ranks++)
        assert_int_equal(test_run_groups("shm", ranks, graph_body, NULL), 0);
}

/* Recovery right behind a graph; and without a graph all memory comes back. */
static int shapes_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_ll_recv ll;
    epc_ll_params graph, none;
    size_t before = 0;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    memset(&none, 0, sizeof none);
    for (int round = 0; round < 4; round++) {
        if (calls_stay_apart(&c, &none, round % 2 ? EP_E4M3 : EP_BF16))
            return 1;
        if (round == 1)
            before = used_bytes(&c);
    }
    TEST_CHECK(used_bytes(&c) == before);
    TEST_OK(ll_dispatch(&c, 0, &ll, NULL));
    ep_ll_recv_release(&ll);
    if (capture(&c, &graph))
        return 1;
    TEST_OK(ep_group_recover(group));
    if (calls_stay_apart(&c, &graph, EP_BF16))
        return 1;
    return close_rank(&c);
}

static void shapes_without_graphs_give_back(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 2, shapes_body, NULL), 0);
}

/* A result released before its hook has run: the hook's kernel still writes there. */
static int hook_body(ep_group *group, void *arg)
{
    struct cuda_rank c;
    ep_ll_recv ll;
    ep_event *event;
    (void)arg;
    if (open_rank(group, &c))
        return 1;
    for (int round = 0; round < 3; round++) {
        TEST_OK(ll_dispatch(&c, 0, &ll, &event));
        ep_ll_recv_release(&ll);
        TEST_CHECK(ll_dispatch_on(&c, EP_E4M3, 0, &ll, NULL) == EP_ERR_STATE);
        TEST_CHECK(CUDA_SAYS("whose hook has yet to run"));
        TEST_OK(ep_event_wait(event));
        ep_event_release(event);
        TEST_OK(ll_dispatch_on(&c, EP_E4M3, 0, &ll, NULL));
        ep_ll_recv_release(&ll);
    }
    return close_rank(&c);
}

static void hooks_keep_their_memory(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 2; ranks++)
        assert_int_equal(test_run_groups("shm", ranks, hook_body, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(refused_calls_count_once),
        cmocka_unit_test(calls_in_halves_count_once),
        cmocka_unit_test(refused_setup_is_exchanged_once),
        cmocka_unit_test(num_sms_is_checked),
        cmocka_unit_test(low_latency_pairs_are_bounded),
        cmocka_unit_test(hooks_that_do_not_start),
        cmocka_unit_test(no_wait_for_the_dead),
        cmocka_unit_test(no_wait_for_a_place_of_the_dead),
        cmocka_unit_test(no_wait_for_hooks),
        cmocka_unit_test(graphs_keep_their_memory),
        cmocka_unit_test(shapes_without_graphs_give_back),
        cmocka_unit_test(hooks_keep_their_memory),
    };
    fake_gpu_use();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
