/* SPDX-License-Identifier: MIT */
/* Every bad argument of dispatch, and ranks that disagree: the exact message of each. */
#include "support/arguments.h"
#include "support/ranks.h"
#include "support/test.h"

#include <string.h>

#define ARG EP_ERR_ARGUMENT

static const float some_scales[ARGS_TOKENS] = {1, 1, 1};
static const ep_allocator no_alloc = {NULL, NULL, NULL};

static void sizes(struct args_bench *bench)
{
    char text[200];
    snprintf(text, sizeof text,
             "ep_dispatch: args->size is 4; it must be sizeof the struct (%zu here): start from "
             "its _INIT macro",
             sizeof(ep_dispatch_args));
    BAD(dispatch, dispatch, a.size = 4, ARG, text);
    snprintf(text, sizeof text,
             "ep_dispatch: args->size is 70000; it must be sizeof the struct (%zu here): start "
             "from its _INIT macro",
             sizeof(ep_dispatch_args));
    BAD(dispatch, dispatch, a.size = 70000, ARG, text);
}

static void rows(struct args_bench *bench)
{
    BAD(dispatch, dispatch, a.x = (ep_tensor)EP_TENSOR_NONE, ARG, "ep_dispatch: x is not given");
    BAD(dispatch, dispatch, a.x.ndim = 3, ARG, "ep_dispatch: x.ndim is 3; it must be 2");
    BAD(dispatch, dispatch, a.x.dtype = EP_I32, ARG,
        "ep_dispatch: x.dtype is I32 (5); it must be BF16, F16, F32 or E4M3");
    BAD(dispatch, dispatch, a.x.dtype = (ep_dtype)77, ARG,
        "ep_dispatch: x.dtype is ? (77); it must be BF16, F16, F32 or E4M3");
    BAD(dispatch, dispatch, a.x.dtype = (ep_dtype)-1, ARG,
        "ep_dispatch: x.dtype is ? (-1); it must be BF16, F16, F32 or E4M3");
    BAD_DEVICES(dispatch, dispatch, x, "ep_dispatch: x");
    BAD_DEVICES(dispatch, dispatch, topk_idx, "ep_dispatch: topk_idx");
    BAD_DEVICES(dispatch, dispatch, topk_weights, "ep_dispatch: topk_weights");
    BAD(dispatch, dispatch, a.x.shape[0] = -1, ARG,
        "ep_dispatch: x.shape[0] is -1; it must be 0..2147483647");
    BAD(dispatch, dispatch, a.x.shape[1] = (int64_t)1 << 40, ARG,
        "ep_dispatch: x.shape[1] is 1099511627776; it must be 0..2147483647");
    BAD(dispatch, dispatch, a.x.shape[1] = 12, ARG,
        "ep_dispatch: x.shape[1] (hidden) is 12; it must be a positive multiple of 8");
    BAD(dispatch, dispatch, a.x.shape[1] = 0, ARG,
        "ep_dispatch: x.shape[1] (hidden) is 0; it must be a positive multiple of 8");
    BAD(dispatch, dispatch, a.x.stride[1] = 2, ARG, "ep_dispatch: x.stride[1] is 2; it must be 1");
    BAD(dispatch, dispatch, a.x.stride[0] = 63, ARG,
        "ep_dispatch: x.stride[0] is 63; it must be at least 64");
    BAD(dispatch, dispatch, a.x.stride[0] = -64, ARG,
        "ep_dispatch: x.stride[0] is -64; it must be at least 64");
    BAD(dispatch, dispatch, a.x.data = NULL, ARG, "ep_dispatch: x.data is NULL");
}

static void scales(struct args_bench *bench)
{
    BAD(dispatch, dispatch, a.scales = ep_tensor_2d((void *)some_scales, EP_F32, ARGS_TOKENS, 1),
        ARG, "ep_dispatch: scales are given; x.dtype is BF16, which has none");
    BAD(dispatch, dispatch, a.x.dtype = EP_E4M3, ARG, "ep_dispatch: scales is not given");
    BAD(dispatch, dispatch, a.x.dtype = EP_E4M3;
        a.scales = ep_tensor_2d((void *)some_scales, EP_F32, ARGS_TOKENS, 2), ARG,
        "ep_dispatch: scales.shape[1] is 2; it must be 1");
    BAD(dispatch, dispatch, a.x.dtype = EP_E4M3;
        a.scales = ep_tensor_2d((void *)some_scales, EP_F32, 2, 1), ARG,
        "ep_dispatch: scales.shape[0] is 2; it must be 3");
    BAD(dispatch, dispatch, a.x.dtype = EP_E4M3;
        a.scales = ep_tensor_2d((void *)some_scales, EP_BF16, ARGS_TOKENS, 1), ARG,
        "ep_dispatch: scales.dtype is BF16 (1); it must be F32 or UE8M0X4");
    BAD(dispatch, dispatch, a.x.dtype = EP_E4M3; a.wire = EP_WIRE_FP8;
        a.scales = ep_tensor_2d((void *)some_scales, EP_F32, ARGS_TOKENS, 1), ARG,
        "ep_dispatch: wire is EP_WIRE_FP8; x is E4M3 already, use EP_WIRE_INPUT");
    BAD(dispatch, dispatch, a.wire = (ep_wire)2, ARG,
        "ep_dispatch: wire is 2; it must be 0 or 1 (ep_wire)");
    BAD(dispatch, dispatch, a.scale = (ep_scale)3, ARG,
        "ep_dispatch: scale is 3; it must be 0..2 (ep_scale)");
    if (!test_device_wanted())
        BAD(dispatch, dispatch, a.stream = (void *)1, ARG,
            "ep_dispatch: stream is 0x1; it must be NULL on the CPU");
}

static void routing(struct args_bench *bench)
{
    int32_t table[ARGS_EXPERTS] = {0, 1, 9, 1};
    BAD(dispatch, dispatch, a.topk_idx = (ep_tensor)EP_TENSOR_NONE, ARG,
        "ep_dispatch: topk_idx is not given");
    BAD(dispatch, dispatch, a.topk_idx.dtype = EP_F32, ARG,
        "ep_dispatch: topk_idx.dtype is F32 (3); it must be I32 or I64");
    BAD(dispatch, dispatch, a.topk_idx.shape[0] = 2, ARG,
        "ep_dispatch: topk_idx.shape[0] is 2; it must be 3");
    BAD(dispatch, dispatch, a.topk_idx.stride[0] = 1, ARG,
        "ep_dispatch: topk_idx.stride[0] is 1; it must be at least 2");
    BAD(dispatch, dispatch, a.topk_idx.data = NULL, ARG, "ep_dispatch: topk_idx.data is NULL");
    BAD(dispatch, dispatch, a.num_experts = 0, ARG,
        "ep_dispatch: num_experts is 0; it must be 1..1024 (max_experts of the buffer)");
    BAD(dispatch, dispatch, a.num_experts = 1026, ARG,
        "ep_dispatch: num_experts is 1026; it must be 1..1024 (max_experts of the buffer)");
    BAD(dispatch, dispatch, a.num_experts = 5, ARG,
        "ep_dispatch: num_experts is 5; without expert_rank it must be a multiple of the 2 ranks");
    BAD(dispatch, dispatch, a.topk_idx.shape[1] = 0, ARG,
        "ep_dispatch: topk_idx.shape[1] (top-k) is 0; it must be 1..4 (num_experts)");
    BAD(dispatch, dispatch, a.num_experts = 1;
        a.topk_idx.shape[1] = 2, ARG,
        "ep_dispatch: topk_idx.shape[1] (top-k) is 2; it must be 1..1 (num_experts)");
    BAD(dispatch, dispatch, a.expert_rank = table, ARG,
        "ep_dispatch: expert_rank[2] is 9; it must be 0..1");
    BAD(dispatch, dispatch, a.topk_weights.dtype = EP_BF16, ARG,
        "ep_dispatch: topk_weights.dtype is BF16 (1); it must be F32");
    BAD(dispatch, dispatch, a.topk_weights.shape[1] = 1, ARG,
        "ep_dispatch: topk_weights.shape[1] is 1; it must be 2");
    BAD(dispatch, dispatch, a.layout = (ep_row_layout)2, ARG,
        "ep_dispatch: layout is 2; it must be 0 or 1 (ep_row_layout)");
    BAD(dispatch, dispatch, a.expert_alignment = 0, ARG,
        "ep_dispatch: expert_alignment is 0; it must be 1..65536");
    BAD(dispatch, dispatch, a.num_worst_tokens = -1, ARG,
        "ep_dispatch: num_worst_tokens is -1; it must be 0..2147483647");
    BAD(dispatch, dispatch, a.allocator = &no_alloc, ARG, "ep_dispatch: allocator->alloc is NULL");
}

static void ids(struct args_bench *bench)
{
    int64_t wrong[ARGS_TOKENS * ARGS_TOPK] = {0, 1, 2, 4, 0, 0};
    int32_t wrong32[ARGS_TOKENS * ARGS_TOPK] = {0, 1, 2, 3, -2, 0};
    BAD(dispatch, dispatch, a.topk_idx.data = wrong, ARG,
        "ep_dispatch: topk_idx[1][1] is 4; it must be -1..3");
    BAD(dispatch, dispatch, a.topk_idx = ep_tensor_2d(wrong32, EP_I32, ARGS_TOKENS, ARGS_TOPK), ARG,
        "ep_dispatch: topk_idx[2][0] is -2; it must be -1..3");
}

static ep_dispatch_args cached(const struct args_bench *bench)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = bench->dispatch.x;
    args.handle = bench->recv.handle;
    return args;
}

static void cached_calls(struct args_bench *bench)
{
    const char *const messages[] = {
        "ep_dispatch: topk_idx is given with handle; it comes from the handle",
        "ep_dispatch: topk_weights is given with handle; it comes from the handle",
        "ep_dispatch: num_experts is given with handle; it comes from the handle",
        "ep_dispatch: layout is given with handle; it comes from the handle",
        "ep_dispatch: expert_alignment is given with handle; it comes from the handle",
        "ep_dispatch: num_worst_tokens is given with handle; it comes from the handle",
        "ep_dispatch: x.shape[0] is 2; it must be 3, the tokens of handle",
        "ep_dispatch: handle was made by another buffer",
    };
    for (int i = 0; i < 8; i++) {
        args_next(bench);
        ep_dispatch_args a = cached(bench);
        if (bench->victim && i == 0)
            a.topk_idx = bench->dispatch.topk_idx;
        if (bench->victim && i == 1)
            a.topk_weights = bench->dispatch.topk_weights;
        if (bench->victim && i == 2)
            a.num_experts = 4;
        if (bench->victim && i == 3)
            a.layout = EP_ROWS_BY_EXPERT;
        if (bench->victim && i == 4)
            a.expert_alignment = 8;
        if (bench->victim && i == 5)
            a.num_worst_tokens = 8;
        if (bench->victim && i == 6)
            a.x.shape[0] = 2;
        if (bench->victim && i == 7)
            a.handle = bench->other_recv.handle;
        args_check(bench, "cached", args_dispatch(bench, &a), ARG, messages[i]);
    }
}

static void missing(struct args_bench *bench)
{
    args_next(bench);
    ep_dispatch_args good = bench->dispatch;
    args_check(bench, "args = NULL", args_dispatch(bench, bench->victim ? NULL : &good), ARG,
               "ep_dispatch: args is NULL");
    args_next(bench);
    ep_recv recv = EP_RECV_INIT;
    args_check(bench, "recv = NULL",
               ep_dispatch(bench->buffer, &good, bench->victim ? NULL : &recv, NULL), ARG,
               "ep_dispatch: recv is NULL");
    args_next(bench);
    if (bench->victim)
        recv.size = 3;
    args_check(bench, "recv.size = 3", ep_dispatch(bench->buffer, &good, &recv, NULL), ARG,
               "ep_dispatch: recv->size is 3; it must be sizeof(ep_recv): start from EP_RECV_INIT");
}

static void disagreement(struct args_bench *bench)
{
    int32_t table[ARGS_EXPERTS] = {1, 0, 1, 0};
    const ep_status differ = EP_ERR_MISMATCH;
    BOTH(dispatch, dispatch, a.x.shape[1] = 56, differ,
         "ep_dispatch: hidden differs: 64 on rank 0, 56 on rank 1");
    BOTH(dispatch, dispatch, a.x.dtype = EP_F16, differ,
         "ep_dispatch: dtype (ep_dtype) differs: 1 on rank 0, 2 on rank 1");
    BOTH(dispatch, dispatch, a.wire = EP_WIRE_FP8, differ,
         "ep_dispatch: dtype (ep_dtype) differs: 1 on rank 0, 4 on rank 1");
    BOTH(dispatch, dispatch, a.num_experts = 6, differ,
         "ep_dispatch: num_experts differs: 4 on rank 0, 6 on rank 1");
    BOTH(dispatch, dispatch, a.topk_idx.shape[1] = a.topk_weights.shape[1] = 1, differ,
         "ep_dispatch: topk differs: 2 on rank 0, 1 on rank 1");
    BOTH(dispatch, dispatch, a.topk_weights = (ep_tensor)EP_TENSOR_NONE, differ,
         "ep_dispatch: topk_weights given differs: 1 on rank 0, 0 on rank 1");
    BOTH(dispatch, dispatch, a.layout = EP_ROWS_BY_EXPERT, differ,
         "ep_dispatch: layout (ep_row_layout) differs: 0 on rank 0, 1 on rank 1");
    BOTH(dispatch, dispatch, a.expert_alignment = 8, differ,
         "ep_dispatch: expert_alignment differs: 1 on rank 0, 8 on rank 1");
    args_next(bench);
    ep_dispatch_args a = bench->dispatch;
    if (bench->rank == 1)
        a.expert_rank = table;
    ep_status status = args_dispatch(bench, &a);
    if (status != differ || !strstr(ep_last_error(), "expert_rank (checksum) differs")) {
        fprintf(stderr, "a table on one rank: %s\n", ep_last_error());
        bench->failed++;
    }
}

static void capacity(struct args_bench *bench)
{
    BOTH(dispatch, dispatch, a.num_worst_tokens = 4, EP_ERR_CAPACITY,
         "ep_dispatch: rank 1 receives 6 rows; its num_worst_tokens is 4");
    bench->dispatch.layout = EP_ROWS_BY_EXPERT;
    bench->dispatch.expert_alignment = 4;
    BOTH(dispatch, dispatch, a.num_worst_tokens = 7, EP_ERR_CAPACITY,
         "ep_dispatch: rank 1 receives 8 rows; its num_worst_tokens is 7");
    bench->dispatch.layout = EP_ROWS_BY_TOKEN;
    bench->dispatch.expert_alignment = 1;
}

/* A buffer on a device that there is not; on a CPU there are no numbers. */
static void device_index(struct args_bench *bench)
{
    char own[120], other[200];
    int32_t count = 0;
    ep_buffer *buffer = NULL;
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    if (!test_device_wanted() || ep_device_count(EP_DEVICE_CUDA, &count) != EP_OK)
        return;
    config.device_index = bench->rank == 1 ? count : 0;
    ep_status status = ep_buffer_create(bench->group, &config, &buffer);
    snprintf(own, sizeof own, "ep_buffer_create: device_index is %d; it must be 0..%d",
             (int)(1 % count + count), (int)count - 1);
    snprintf(other, sizeof other, "ep_buffer_create: rank 1 failed: %s", own);
    if (status != (bench->rank == 1 ? ARG : EP_ERR_ABORTED) ||
        strcmp(ep_last_error(), bench->rank == 1 ? own : other) != 0 || buffer) {
        fprintf(stderr, "device_index on rank %d: %s\n", bench->rank, ep_last_error());
        bench->failed++;
    }
}

static void all(struct args_bench *bench)
{
    sizes(bench);
    missing(bench);
    rows(bench);
    scales(bench);
    routing(bench);
    ids(bench);
    cached_calls(bench);
    disagreement(bench);
    capacity(bench);
    device_index(bench);
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
