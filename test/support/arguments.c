/* SPDX-License-Identifier: MIT */
#include "support/arguments.h"

#include "support/ranks.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_ROWS = 64, POISON = 0x5a };

void args_next(struct args_bench *bench)
{
    bench->victim = bench->cases++ % ARGS_RANKS == bench->rank;
    memset(bench->out, POISON, sizeof bench->out);
    memset(bench->out_weights, POISON, sizeof bench->out_weights);
}

const char *args_other_text(const char *tensor)
{
    static _Thread_local char text[120];
    snprintf(text, sizeof text, "%s.device is %d; it must be %d as the buffer's", tensor,
             !test_device_wanted(), test_device_wanted());
    return text;
}

const char *args_index_text(const struct args_bench *bench, const char *tensor)
{
    static _Thread_local char text[120];
    int32_t count = 1;
    ep_device_count(EP_DEVICE_CUDA, &count);
    int index = (bench->victim ? bench->rank : !bench->rank) % count;
    snprintf(text, sizeof text, "%s.device_index is %d; it must be %d as the buffer's", tensor,
             index + 5, index);
    return text;
}

static bool is_poison(const void *memory, size_t bytes)
{
    const uint8_t *byte = memory;
    for (size_t i = 0; i < bytes; i++)
        if (byte[i] != POISON)
            return false;
    return true;
}

static void fail(struct args_bench *bench, const char *change, const char *what, const char *want)
{
    fprintf(stderr, "rank %d, after %s: %s\n  expected: %s\n  message:  %s\n", bench->rank, change,
            what, want, ep_last_error());
    bench->failed++;
}

/* What a kernel finds is known to others by its status alone. */
static bool is_reason(const char *text, ep_status want, const char *message)
{
    return strcmp(text, message) == 0 ||
           (test_device_wanted() && strcmp(text, ep_status_string(want)) == 0);
}

void args_check(struct args_bench *bench, const char *change, ep_status status, ep_status want,
                const char *message)
{
    const char *text = ep_last_error();
    if (!is_poison(bench->out, sizeof bench->out) ||
        !is_poison(bench->out_weights, sizeof bench->out_weights))
        fail(bench, change, "an output was written", "untouched outputs");
    if (bench->victim) {
        if (status != want)
            fail(bench, change, ep_status_string(status), ep_status_string(want));
        else if (strcmp(text, message) != 0)
            fail(bench, change, "another message", message);
        return;
    }
    char gave_up[32];
    snprintf(gave_up, sizeof gave_up, "rank %d gave up: ", !bench->rank);
    const char *reason = strstr(text, gave_up);
    if (status != EP_ERR_ABORTED)
        fail(bench, change, ep_status_string(status), "EP_ERR_ABORTED");
    else if (!reason || !is_reason(reason + strlen(gave_up), want, message))
        fail(bench, change, "another message", message);
}

/* Runs one call that must fail; it may take a moment, not a timeout. */
#define FAILING(bench, call)                                          \
    do {                                                              \
        int64_t start = test_now_ms();                                \
        ep_status status = call;                                      \
        if (test_now_ms() - start > 10000)                            \
            fail(bench, #call, "took over 10 s", "an error at once"); \
        return status;                                                \
    } while (0)

/* A recv that shows whether anything was written to it. */
static void poison(ep_recv *recv)
{
    memset(recv, POISON, sizeof *recv);
    recv->size = sizeof *recv;
}

static void check_untouched(struct args_bench *bench, const ep_recv *recv)
{
    ep_recv before;
    poison(&before);
    if (memcmp(recv, &before, sizeof before) != 0)
        fail(bench, "a failing call", "recv was written", "untouched recv");
}

static ep_status dispatch(struct args_bench *bench, const ep_dispatch_args *args)
{
    ep_recv recv;
    poison(&recv);
    ep_status status = ep_dispatch(bench->buffer, args, &recv, NULL);
    check_untouched(bench, &recv);
    return status;
}

static ep_status combine_backward(struct args_bench *bench, const ep_combine_backward_args *args)
{
    ep_recv recv;
    poison(&recv);
    ep_status status = ep_combine_backward(bench->buffer, args, &recv, NULL);
    check_untouched(bench, &recv);
    return status;
}

ep_status args_dispatch(struct args_bench *bench, const ep_dispatch_args *args)
{
    FAILING(bench, dispatch(bench, args));
}

ep_status args_combine_backward(struct args_bench *bench, const ep_combine_backward_args *args)
{
    FAILING(bench, combine_backward(bench, args));
}

ep_status args_combine(struct args_bench *bench, const ep_combine_args *args)
{
    FAILING(bench, ep_combine(bench->buffer, args, NULL));
}

ep_status args_dispatch_backward(struct args_bench *bench, const ep_dispatch_backward_args *args)
{
    FAILING(bench, ep_dispatch_backward(bench->buffer, args, NULL));
}

static void fill_inputs(struct args_bench *bench)
{
    static const int64_t ids[] = {0, 2, 3, 1, 2, -1};
    memcpy(bench->ids, ids, sizeof ids);
    bench->y = test_zeros(MOST_ROWS * ARGS_HIDDEN, sizeof *bench->y);
    bench->row_weights = test_zeros(MOST_ROWS * ARGS_TOPK, sizeof *bench->row_weights);
    bench->dispatch = (ep_dispatch_args)EP_DISPATCH_ARGS_INIT;
    bench->dispatch.x = ep_tensor_2d(bench->x, EP_BF16, ARGS_TOKENS, ARGS_HIDDEN);
    bench->dispatch.topk_idx = ep_tensor_2d(bench->ids, EP_I64, ARGS_TOKENS, ARGS_TOPK);
    bench->dispatch.topk_weights = ep_tensor_2d(bench->weights, EP_F32, ARGS_TOKENS, ARGS_TOPK);
    bench->dispatch.num_experts = ARGS_EXPERTS;
    bench->recv = bench->expert_recv = bench->other_recv = (ep_recv)EP_RECV_INIT;
}

static ep_tensor rows_of(const struct args_bench *bench, const ep_recv *recv)
{
    return ep_tensor_2d(bench->y, EP_BF16, recv->x.shape[0], ARGS_HIDDEN);
}

/* What follows the dispatches, once their rows are known. */
static void fill_outputs(struct args_bench *bench)
{
    ep_tensor out = ep_tensor_2d(bench->out, EP_BF16, ARGS_TOKENS, ARGS_HIDDEN);
    ep_tensor out_weights = ep_tensor_2d(bench->out_weights, EP_F32, ARGS_TOKENS, ARGS_TOPK);
    int64_t rows = bench->recv.x.shape[0];
    bench->combine = (ep_combine_args)EP_COMBINE_ARGS_INIT;
    bench->combine.y = rows_of(bench, &bench->recv);
    bench->combine.handle = bench->recv.handle;
    bench->combine.topk_weights = ep_tensor_2d(bench->row_weights, EP_F32, rows, ARGS_TOPK);
    bench->combine.bias[0] = bench->combine.bias[1] = bench->dispatch.x;
    bench->combine.out = out;
    bench->combine.out_weights = out_weights;
    bench->expert_combine = (ep_combine_args)EP_COMBINE_ARGS_INIT;
    bench->expert_combine.y = rows_of(bench, &bench->expert_recv);
    bench->expert_combine.handle = bench->expert_recv.handle;
    bench->expert_combine.topk_weights = bench->dispatch.topk_weights;
    bench->expert_combine.out = out;
    bench->dispatch_backward = (ep_dispatch_backward_args)EP_DISPATCH_BACKWARD_ARGS_INIT;
    bench->dispatch_backward.grad_recv_x = bench->combine.y;
    bench->dispatch_backward.grad_recv_weights = bench->combine.topk_weights;
    bench->dispatch_backward.handle = bench->recv.handle;
    bench->dispatch_backward.grad_x = out;
    bench->dispatch_backward.grad_topk_weights = out_weights;
    bench->combine_backward = (ep_combine_backward_args)EP_COMBINE_BACKWARD_ARGS_INIT;
    bench->combine_backward.grad_out = bench->dispatch.x;
    bench->combine_backward.handle = bench->recv.handle;
    bench->expert_backward = bench->combine_backward;
    bench->expert_backward.handle = bench->expert_recv.handle;
    bench->expert_backward.y = bench->expert_combine.y;
    bench->expert_backward.topk_weights = bench->dispatch.topk_weights;
    bench->expert_backward.grad_topk_weights = out_weights;
}

/* The good calls work, before the bad ones and after them. */
static int good_calls(struct args_bench *bench)
{
    ep_recv recv = EP_RECV_INIT, gradient = EP_RECV_INIT;
    TEST_OK(ep_dispatch(bench->buffer, &bench->dispatch, &recv, NULL));
    TEST_OK(ep_combine(bench->buffer, &bench->combine, NULL));
    TEST_OK(ep_combine(bench->buffer, &bench->expert_combine, NULL));
    TEST_OK(ep_dispatch_backward(bench->buffer, &bench->dispatch_backward, NULL));
    TEST_OK(ep_combine_backward(bench->buffer, &bench->combine_backward, &gradient, NULL));
    ep_recv_release(&gradient);
    TEST_OK(ep_combine_backward(bench->buffer, &bench->expert_backward, &gradient, NULL));
    ep_recv_release(&gradient);
    ep_recv_release(&recv);
    ep_handle_release(recv.handle);
    return 0;
}

static int set_up(struct args_bench *bench)
{
    fill_inputs(bench);
    TEST_OK(ep_buffer_create(bench->group, NULL, &bench->buffer));
    TEST_OK(ep_buffer_create(bench->group, NULL, &bench->other));
    TEST_OK(ep_dispatch(bench->buffer, &bench->dispatch, &bench->recv, NULL));
    TEST_OK(ep_dispatch(bench->other, &bench->dispatch, &bench->other_recv, NULL));
    ep_dispatch_args args = bench->dispatch;
    args.layout = EP_ROWS_BY_EXPERT;
    TEST_OK(ep_dispatch(bench->buffer, &args, &bench->expert_recv, NULL));
    fill_outputs(bench);
    return good_calls(bench);
}

static void tear_down(struct args_bench *bench)
{
    ep_recv *all[] = {&bench->recv, &bench->expert_recv, &bench->other_recv};
    for (int i = 0; i < 3; i++) {
        ep_recv_release(all[i]);
        ep_handle_release(all[i]->handle);
    }
    ep_buffer_destroy(bench->buffer);
    ep_buffer_destroy(bench->other);
    free(bench->y);
    free(bench->row_weights);
}

static int run_rank(ep_group *group, void *argument)
{
    void (*body)(struct args_bench *);
    memcpy(&body, argument, sizeof body);
    struct args_bench bench = {.group = group, .rank = ep_group_rank(group)};
    int failed = set_up(&bench);
    if (!failed) {
        body(&bench);
        failed = bench.failed || good_calls(&bench);
    }
    tear_down(&bench);
    return failed;
}

int args_run(const char *transport, void (*body)(struct args_bench *))
{
    return test_run_groups(transport, ARGS_RANKS, run_rank, &body);
}
