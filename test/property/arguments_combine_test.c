/* SPDX-License-Identifier: MIT */
/* Every bad argument of combine and of both backwards: the exact message of each. */
#include "support/arguments.h"
#include "support/ranks.h"
#include "support/test.h"

#define ARG EP_ERR_ARGUMENT
#define NONE (ep_tensor) EP_TENSOR_NONE

static void rows(struct args_bench *bench)
{
    BAD(combine, combine, a.y = NONE, ARG, "ep_combine: y is not given");
    BAD(combine, combine, a.y.dtype = EP_E4M3, ARG,
        "ep_combine: y.dtype is E4M3 (4); it must be BF16, F16 or F32");
    BAD(combine, combine, a.y.shape[1] = 60, ARG,
        "ep_combine: y.shape[1] (hidden) is 60; it must be a positive multiple of 8");
    BAD(combine, combine, a.y.stride[0] = 8, ARG,
        "ep_combine: y.stride[0] is 8; it must be at least 64");
    BAD_DEVICES(combine, combine, y, "ep_combine: y");
    BAD(combine, combine, a.y.data = NULL, ARG, "ep_combine: y.data is NULL");
    BAD(combine, combine, a.handle = NULL, ARG, "ep_combine: handle is NULL");
    if (!test_device_wanted())
        BAD(combine, combine, a.stream = (void *)1, ARG,
            "ep_combine: stream is 0x1; it must be NULL on the CPU");
    BAD(combine, combine, a.handle = bench->other_recv.handle, ARG,
        "ep_combine: handle was made by another buffer");
}

static void rows_of_the_handle(struct args_bench *bench)
{
    char text[100];
    args_next(bench);
    ep_combine_args a = bench->combine;
    /* The victim is rank 0 or 1 by turns; its rows tell the message. */
    int victim = bench->victim ? bench->rank : !bench->rank;
    int rows = victim == 0 ? 4 : 6;
    if (bench->victim)
        a.y.shape[0] = rows - 1;
    snprintf(text, sizeof text, "ep_combine: y.shape[0] is %d; it must be %d", rows - 1, rows);
    args_check(bench, "a.y.shape[0]", args_combine(bench, &a), ARG, text);
}

static void outputs(struct args_bench *bench)
{
    BAD(combine, combine, a.out = NONE, ARG, "ep_combine: out is not given");
    BAD(combine, combine, a.out.shape[0] = 2, ARG, "ep_combine: out.shape[0] is 2; it must be 3");
    BAD(combine, combine, a.out.shape[1] = 56, ARG,
        "ep_combine: out.shape[1] is 56; it must be 64");
    BAD(combine, combine, a.out.dtype = EP_F16, ARG,
        "ep_combine: out.dtype is F16 (2); it must be y's");
    BAD(combine, combine, a.out.stride[1] = 2, ARG, "ep_combine: out.stride[1] is 2; it must be 1");
    BAD(combine, combine, a.out.stride[0] = 0, ARG,
        "ep_combine: out.stride[0] is 0; it must be at least 64");
    BAD_DEVICES(combine, combine, out, "ep_combine: out");
    BAD_DEVICES(combine, combine, bias[1], "ep_combine: bias[1]");
    BAD(combine, combine, a.out.data = NULL, ARG, "ep_combine: out.data is NULL");
    BAD(combine, combine, a.bias[0].shape[0] = 1, ARG,
        "ep_combine: bias[0].shape[0] is 1; it must be 3");
    BAD(combine, combine, a.bias[1].dtype = EP_F32, ARG,
        "ep_combine: bias[1].dtype is F32 (3); it must be y's");
    BAD(combine, combine, a.bias[1].shape[1] = 8, ARG,
        "ep_combine: bias[1].shape[1] is 8; it must be 64");
}

static void weights(struct args_bench *bench)
{
    BAD(combine, combine, a.topk_weights = NONE, ARG,
        "ep_combine: topk_weights is not given; topk_weights and out_weights go together");
    BAD(combine, combine, a.out_weights = NONE, ARG,
        "ep_combine: out_weights is not given; topk_weights and out_weights go together");
    BAD_DEVICES(combine, combine, topk_weights, "ep_combine: topk_weights");
    BAD_DEVICES(combine, combine, out_weights, "ep_combine: out_weights");
    BAD(combine, combine, a.topk_weights.shape[1] = 1, ARG,
        "ep_combine: topk_weights.shape[1] is 1; it must be 2");
    BAD(combine, combine, a.topk_weights.dtype = EP_F16, ARG,
        "ep_combine: topk_weights.dtype is F16 (2); it must be F32");
    BAD(combine, combine, a.out_weights.shape[0] = 4, ARG,
        "ep_combine: out_weights.shape[0] is 4; it must be 3");
    BAD(combine, expert_combine, a.out_weights = bench->combine.out_weights, ARG,
        "ep_combine: out_weights is given; it applies to handles of EP_ROWS_BY_TOKEN only");
    BAD(combine, expert_combine, a.topk_weights.shape[0] = 1, ARG,
        "ep_combine: topk_weights.shape[0] is 1; it must be 3");
    BAD(combine, expert_combine, a.topk_weights.dtype = EP_F64, ARG,
        "ep_combine: topk_weights.dtype is F64 (8); it must be F32");
}

static void disagreement(struct args_bench *bench)
{
    const ep_status differ = EP_ERR_MISMATCH;
    BOTH(combine, combine,
         a.y.shape[1] = a.out.shape[1] = a.bias[0].shape[1] = a.bias[1].shape[1] = 56, differ,
         "ep_combine: hidden differs: 64 on rank 0, 56 on rank 1");
    BOTH(combine, combine, a.y.dtype = a.out.dtype = a.bias[0].dtype = a.bias[1].dtype = EP_F16,
         differ, "ep_combine: dtype (ep_dtype) differs: 1 on rank 0, 2 on rank 1");
    BOTH(combine, combine, a.topk_weights = a.out_weights = NONE, differ,
         "ep_combine: topk_weights given differs: 1 on rank 0, 0 on rank 1");
    BOTH(combine, combine, a = bench->expert_combine, differ,
         "ep_combine: topk_weights given differs: 1 on rank 0, 0 on rank 1");
}

static void different_calls(struct args_bench *bench)
{
    char message[200];
    snprintf(message, sizeof message,
             "%s: the call (1 dispatch, 2 combine, 3 %s) differs: 1 on rank 0, 2 on rank 1",
             bench->rank == 0 ? "ep_dispatch" : "ep_combine",
             test_device_wanted() ? "cached dispatch" : "low-latency setup");
    args_next(bench);
    bench->victim = true;
    ep_status status = bench->rank == 0 ? args_dispatch(bench, &bench->dispatch)
                                        : args_combine(bench, &bench->combine);
    args_check(bench, "different calls", status, EP_ERR_MISMATCH, message);
}

static void dispatch_backward(struct args_bench *bench)
{
    BAD(dispatch_backward, dispatch_backward, a.grad_recv_x = NONE, ARG,
        "ep_dispatch_backward: grad_recv_x is not given");
    BAD(dispatch_backward, dispatch_backward, a.grad_recv_x.dtype = EP_I64, ARG,
        "ep_dispatch_backward: grad_recv_x.dtype is I64 (6); it must be BF16, F16 or F32");
    BAD(dispatch_backward, dispatch_backward, a.grad_x = NONE, ARG,
        "ep_dispatch_backward: grad_x is not given");
    BAD_DEVICES(dispatch_backward, dispatch_backward, grad_recv_x,
                "ep_dispatch_backward: grad_recv_x");
    BAD_DEVICES(dispatch_backward, dispatch_backward, grad_x, "ep_dispatch_backward: grad_x");
    BAD(dispatch_backward, dispatch_backward, a.grad_x.dtype = EP_F32, ARG,
        "ep_dispatch_backward: grad_x.dtype is F32 (3); it must be grad_recv_x's");
    BAD(dispatch_backward, dispatch_backward, a.grad_recv_weights = NONE, ARG,
        "ep_dispatch_backward: grad_recv_weights is not given; grad_recv_weights and "
        "grad_topk_weights go together");
    BAD(dispatch_backward, dispatch_backward, a.grad_topk_weights = NONE, ARG,
        "ep_dispatch_backward: grad_topk_weights is not given; grad_recv_weights and "
        "grad_topk_weights go together");
    BAD(dispatch_backward, dispatch_backward, a.grad_topk_weights.shape[1] = 3, ARG,
        "ep_dispatch_backward: grad_topk_weights.shape[1] is 3; it must be 2");
    BAD(dispatch_backward, dispatch_backward, a.handle = NULL, ARG,
        "ep_dispatch_backward: handle is NULL");
    if (!test_device_wanted())
        BAD(dispatch_backward, dispatch_backward, a.stream = (void *)1, ARG,
            "ep_dispatch_backward: stream is 0x1; it must be NULL on the CPU");
    BAD(dispatch_backward, dispatch_backward, a.handle = bench->other_recv.handle, ARG,
        "ep_dispatch_backward: handle was made by another buffer");
}

static void combine_backward(struct args_bench *bench)
{
    static const ep_allocator no_alloc = {NULL, NULL, NULL};
    BAD(combine_backward, combine_backward, a.grad_out = NONE, ARG,
        "ep_combine_backward: grad_out is not given");
    BAD(combine_backward, combine_backward, a.grad_out.dtype = EP_U8, ARG,
        "ep_combine_backward: grad_out.dtype is U8 (7); it must be BF16, F16 or F32");
    BAD_DEVICES(combine_backward, combine_backward, grad_out, "ep_combine_backward: grad_out");
    BAD(combine_backward, combine_backward, a.grad_out.shape[0] = 2, ARG,
        "ep_combine_backward: grad_out.shape[0] is 2; it must be 3");
    BAD(combine_backward, combine_backward, a.grad_out.shape[1] = 20, ARG,
        "ep_combine_backward: grad_out.shape[1] (hidden) is 20; it must be a positive multiple of "
        "8");
    BAD(combine_backward, combine_backward, a.handle = NULL, ARG,
        "ep_combine_backward: handle is NULL");
    if (!test_device_wanted())
        BAD(combine_backward, combine_backward, a.stream = (void *)1, ARG,
            "ep_combine_backward: stream is 0x1; it must be NULL on the CPU");
    BAD(combine_backward, combine_backward, a.handle = bench->other_recv.handle, ARG,
        "ep_combine_backward: handle was made by another buffer");
    BAD(combine_backward, combine_backward, a.topk_weights = bench->dispatch.topk_weights, ARG,
        "ep_combine_backward: topk_weights is given; it applies to handles of EP_ROWS_BY_EXPERT "
        "only");
    BAD(combine_backward, combine_backward,
        a.grad_topk_weights = bench->expert_backward.grad_topk_weights, ARG,
        "ep_combine_backward: grad_topk_weights is given; it applies to handles of "
        "EP_ROWS_BY_EXPERT only");
    BAD(combine_backward, combine_backward, a.allocator = &no_alloc, ARG,
        "ep_combine_backward: allocator->alloc is NULL");
    BAD(combine_backward, expert_backward, a.y = NONE, ARG,
        "ep_combine_backward: y is not given; y and grad_topk_weights go together");
    BAD(combine_backward, expert_backward, a.grad_topk_weights = NONE, ARG,
        "ep_combine_backward: grad_topk_weights is not given; y and grad_topk_weights go together");
    BAD(combine_backward, expert_backward, a.topk_weights.shape[1] = 1, ARG,
        "ep_combine_backward: topk_weights.shape[1] is 1; it must be 2");
    BAD(combine_backward, expert_backward, a.y.dtype = EP_F32, ARG,
        "ep_combine_backward: y.dtype is F32 (3); it must be grad_out's");
}

static void missing(struct args_bench *bench)
{
    args_next(bench);
    args_check(bench, "NULL", args_combine(bench, bench->victim ? NULL : &bench->combine), ARG,
               "ep_combine: args is NULL");
    args_next(bench);
    args_check(bench, "NULL",
               args_dispatch_backward(bench, bench->victim ? NULL : &bench->dispatch_backward), ARG,
               "ep_dispatch_backward: args is NULL");
    args_next(bench);
    args_check(bench, "NULL",
               args_combine_backward(bench, bench->victim ? NULL : &bench->combine_backward), ARG,
               "ep_combine_backward: args is NULL");
}

static void all(struct args_bench *bench)
{
    missing(bench);
    rows(bench);
    rows_of_the_handle(bench);
    rows_of_the_handle(bench);
    outputs(bench);
    weights(bench);
    disagreement(bench);
    different_calls(bench);
    dispatch_backward(bench);
    combine_backward(bench);
}

static void over_threads(void **state)
{
    (void)state;
    assert_int_equal(args_run("threads", all), 0);
}

static void over_processes(void **state)
{
    (void)state;
    assert_int_equal(args_run("shm", all), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(over_threads),
        cmocka_unit_test(over_processes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
