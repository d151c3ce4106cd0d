/* SPDX-License-Identifier: MIT */
/* Every bad argument of low latency, of masks and of the diagnosis calls, and ranks that disagree:
   the exact message of each. */
#include "entrepot/low_latency.h"

#include "support/arguments.h"
#include "support/ranks.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

#define ARG EP_ERR_ARGUMENT

enum { ROOM = ARGS_RANKS * ARGS_TOKENS, LOCAL = ARGS_EXPERTS / ARGS_RANKS, POISON = 0x5a };

/* What low latency needs beside the bench; results alive throughout lend their handles. */
typedef struct ll_bench {
    struct args_bench *base;
    ep_ll_recv recv, other_recv;
    ep_ll_dispatch_args dispatch;
    ep_ll_combine_args combine;
    uint16_t y[LOCAL * ROOM * ARGS_HIDDEN];
    int32_t expert_tokens[LOCAL];
} ll_bench;

static void report(ll_bench *ll, const char *what)
{
    fprintf(stderr, "rank %d: %s (message: %s)\n", ll->base->rank, what, ep_last_error());
    ll->base->failed++;
}

static bool is_poison(const void *memory, size_t bytes)
{
    const uint8_t *byte = memory;
    for (size_t i = 0; i < bytes; i++)
        if (byte[i] != POISON)
            return false;
    return true;
}

static void check_prompt(ll_bench *ll, int64_t start)
{
    if (test_now_ms() - start > 10000)
        report(ll, "took over 10 s");
}

static ep_status args_ll_dispatch(ll_bench *ll, const ep_ll_dispatch_args *args)
{
    ep_ll_recv recv;
    int64_t start = test_now_ms();
    memset(&recv, POISON, sizeof recv);
    recv.size = sizeof recv;
    memset(ll->expert_tokens, POISON, sizeof ll->expert_tokens);
    ep_status status = ep_ll_dispatch(ll->base->buffer, args, &recv, NULL);
    check_prompt(ll, start);
    if (!is_poison((uint8_t *)&recv + sizeof recv.size, sizeof recv - sizeof recv.size))
        report(ll, "recv was written");
    if (!is_poison(ll->expert_tokens, sizeof ll->expert_tokens))
        report(ll, "expert_tokens was written");
    return status;
}

static ep_status args_ll_combine(ll_bench *ll, const ep_ll_combine_args *args)
{
    int64_t start = test_now_ms();
    ep_status status = ep_ll_combine(ll->base->buffer, args, NULL);
    check_prompt(ll, start);
    return status;
}

/* As BAD of support/arguments.h. */
#define LL_BAD(kind, change, want, message)                                   \
    do {                                                                      \
        args_next(ll->base);                                                  \
        ep_ll_##kind##_args a = ll->kind;                                     \
        if (ll->base->victim) {                                               \
            change;                                                           \
        }                                                                     \
        args_check(ll->base, #change, args_ll_##kind(ll, &a), want, message); \
    } while (0)

/* As BAD_DEVICES. */
#define LL_BAD_DEVICES(kind, member, tensor)                                                 \
    do {                                                                                     \
        LL_BAD(kind, a.member.device = ARGS_OTHER, ARG, args_other_text(tensor));            \
        if (test_device_wanted())                                                            \
            LL_BAD(kind, a.member.device_index = 5, ARG, args_index_text(ll->base, tensor)); \
    } while (0)

static void dispatch_sizes(ll_bench *ll)
{
    char text[200];
    snprintf(text, sizeof text,
             "ep_ll_dispatch: args->size is 4; it must be sizeof the struct (%zu here): start "
             "from its _INIT macro",
             sizeof(ep_ll_dispatch_args));
    LL_BAD(dispatch, a.size = 4, ARG, text);
    args_next(ll->base);
    ep_ll_dispatch_args good = ll->dispatch;
    ep_status status = args_ll_dispatch(ll, ll->base->victim ? NULL : &good);
    args_check(ll->base, "args = NULL", status, ARG, "ep_ll_dispatch: args is NULL");
    args_next(ll->base);
    ep_ll_recv recv = EP_LL_RECV_INIT;
    status = ep_ll_dispatch(ll->base->buffer, &good, ll->base->victim ? NULL : &recv, NULL);
    args_check(ll->base, "recv = NULL", status, ARG, "ep_ll_dispatch: recv is NULL");
    args_next(ll->base);
    recv.size = ll->base->victim ? 3 : sizeof recv;
    status = ep_ll_dispatch(ll->base->buffer, &good, &recv, NULL);
    args_check(ll->base, "recv.size = 3", status, ARG,
               "ep_ll_dispatch: recv->size is 3; it must be sizeof(ep_ll_recv): start from "
               "EP_LL_RECV_INIT");
}

static void dispatch_rows(ll_bench *ll)
{
    LL_BAD(dispatch, a.x = (ep_tensor)EP_TENSOR_NONE, ARG, "ep_ll_dispatch: x is not given");
    LL_BAD(dispatch, a.x.ndim = 3, ARG, "ep_ll_dispatch: x.ndim is 3; it must be 2");
    LL_BAD(dispatch, a.x.dtype = EP_F16, ARG,
           "ep_ll_dispatch: x.dtype is F16 (2); it must be BF16");
    LL_BAD_DEVICES(dispatch, x, "ep_ll_dispatch: x");
    LL_BAD_DEVICES(dispatch, topk_idx, "ep_ll_dispatch: topk_idx");
    LL_BAD_DEVICES(dispatch, expert_tokens, "ep_ll_dispatch: expert_tokens");
    LL_BAD(dispatch, a.x.shape[0] = -1, ARG,
           "ep_ll_dispatch: x.shape[0] is -1; it must be 0..2147483647");
    LL_BAD(dispatch, a.x.shape[1] = 12, ARG,
           "ep_ll_dispatch: x.shape[1] (hidden) is 12; it must be a positive multiple of 8");
    LL_BAD(dispatch, a.x.stride[1] = 2, ARG, "ep_ll_dispatch: x.stride[1] is 2; it must be 1");
    LL_BAD(dispatch, a.x.stride[0] = 63, ARG,
           "ep_ll_dispatch: x.stride[0] is 63; it must be at least 64");
    LL_BAD(dispatch, a.x.data = NULL, ARG, "ep_ll_dispatch: x.data is NULL");
    LL_BAD(dispatch, a.max_tokens = 0, ARG,
           "ep_ll_dispatch: max_tokens is 0; it must be 1..1048576");
    LL_BAD(dispatch, a.max_tokens = 1048577, ARG,
           "ep_ll_dispatch: max_tokens is 1048577; it must be 1..1048576");
    LL_BAD(dispatch, a.max_tokens = 2, ARG,
           "ep_ll_dispatch: x.shape[0] is 3; it must be 0..2 (max_tokens)");
}

static void dispatch_routing(ll_bench *ll)
{
    int32_t table[ARGS_EXPERTS] = {0, 1, 9, 1};
    LL_BAD(dispatch, a.topk_idx = (ep_tensor)EP_TENSOR_NONE, ARG,
           "ep_ll_dispatch: topk_idx is not given");
    LL_BAD(dispatch, a.topk_idx.dtype = EP_F32, ARG,
           "ep_ll_dispatch: topk_idx.dtype is F32 (3); it must be I32 or I64");
    LL_BAD(dispatch, a.topk_idx.shape[0] = 2, ARG,
           "ep_ll_dispatch: topk_idx.shape[0] is 2; it must be 3");
    LL_BAD(dispatch, a.topk_idx.stride[0] = 1, ARG,
           "ep_ll_dispatch: topk_idx.stride[0] is 1; it must be at least 2");
    LL_BAD(dispatch, a.topk_idx.data = NULL, ARG, "ep_ll_dispatch: topk_idx.data is NULL");
    LL_BAD(dispatch, a.num_experts = 0, ARG,
           "ep_ll_dispatch: num_experts is 0; it must be 1..1024 (max_experts of the buffer)");
    LL_BAD(dispatch, a.num_experts = 1026, ARG,
           "ep_ll_dispatch: num_experts is 1026; it must be 1..1024 (max_experts of the buffer)");
    LL_BAD(dispatch, a.num_experts = 5, ARG,
           "ep_ll_dispatch: num_experts is 5; without expert_rank it must be a multiple of the 2 "
           "ranks");
    LL_BAD(dispatch, a.topk_idx.shape[1] = 0, ARG,
           "ep_ll_dispatch: topk_idx.shape[1] (top-k) is 0; it must be 1..4 (num_experts)");
    LL_BAD(dispatch, a.expert_rank = table, ARG,
           "ep_ll_dispatch: expert_rank[2] is 9; it must be 0..1");
}

/* Found only when the ids are read for sending. */
static void dispatch_ids(ll_bench *ll)
{
    int64_t wrong[ARGS_TOKENS * ARGS_TOPK] = {0, 1, 2, 4, 0, 1};
    int32_t narrow[ARGS_TOKENS * ARGS_TOPK] = {0, 1, 2, 3, -2, 0};
    for (int i = 0; i < 2; i++) { /* each rank in turn */
        LL_BAD(dispatch, a.topk_idx.data = wrong, ARG,
               "ep_ll_dispatch: topk_idx[1][1] is 4; it must be -1..3");
        LL_BAD(dispatch, a.topk_idx = ep_tensor_2d(narrow, EP_I32, ARGS_TOKENS, ARGS_TOPK), ARG,
               "ep_ll_dispatch: topk_idx[2][0] is -2; it must be -1..3");
        LL_BAD(dispatch, a.x.shape[1] = 0, ARG,
               "ep_ll_dispatch: x.shape[1] (hidden) is 0; it must be a positive multiple of 8");
    }
}

static void dispatch_choices(ll_bench *ll)
{
    int64_t cost[3] = {0};
    LL_BAD(dispatch, a.max_expert_rows = -1, ARG,
           "ep_ll_dispatch: max_expert_rows is -1; it must be 0..6 (ranks * max_tokens)");
    LL_BAD(dispatch, a.max_expert_rows = ROOM + 1, ARG,
           "ep_ll_dispatch: max_expert_rows is 7; it must be 0..6 (ranks * max_tokens)");
    LL_BAD(dispatch, a.overflow = (ep_overflow)2, ARG,
           "ep_ll_dispatch: overflow is 2; it must be 0 or 1 (ep_overflow)");
    LL_BAD(dispatch, a.wire = EP_F32, ARG,
           "ep_ll_dispatch: wire is F32 (3); it must be BF16 or E4M3");
    LL_BAD(dispatch, a.scale = (ep_scale)3, ARG,
           "ep_ll_dispatch: scale is 3; it must be 0..2 (ep_scale)");
    LL_BAD(dispatch, a.scales_by_column = 2, ARG,
           "ep_ll_dispatch: scales_by_column is 2; it must be 0 or 1");
    if (!test_device_wanted())
        LL_BAD(dispatch, a.stream = (void *)1, ARG,
               "ep_ll_dispatch: stream is 0x1; it must be NULL on the CPU");
    LL_BAD(dispatch, a.completion = (ep_completion)2, ARG,
           "ep_ll_dispatch: completion is 2; it must be 0 or 1 (ep_completion)");
    LL_BAD(dispatch, a.expert_tokens.dtype = EP_I64, ARG,
           "ep_ll_dispatch: expert_tokens.dtype is I64 (6); it must be I32");
    LL_BAD(dispatch, a.expert_tokens.shape[0] = 3, ARG,
           "ep_ll_dispatch: expert_tokens.shape[0] is 3; it must be 2");
    LL_BAD(dispatch, a.wait_cost = ep_tensor_1d(cost, EP_I64, 3), ARG,
           "ep_ll_dispatch: wait_cost.shape[0] is 3; it must be 2");
    LL_BAD(dispatch, a.wait_cost = ep_tensor_1d(cost, EP_I32, 2), ARG,
           "ep_ll_dispatch: wait_cost.dtype is I32 (5); it must be I64");
}

static void combine_handles(ll_bench *ll)
{
    char text[200];
    snprintf(text, sizeof text,
             "ep_ll_combine: args->size is 4; it must be sizeof the struct (%zu here): start from "
             "its _INIT macro",
             sizeof(ep_ll_combine_args));
    LL_BAD(combine, a.size = 4, ARG, text);
    args_next(ll->base);
    ep_ll_combine_args good = ll->combine;
    ep_status status = args_ll_combine(ll, ll->base->victim ? NULL : &good);
    args_check(ll->base, "args = NULL", status, ARG, "ep_ll_combine: args is NULL");
    LL_BAD(combine, a.handle = NULL, ARG, "ep_ll_combine: handle is NULL");
    LL_BAD(combine, a.handle = ll->other_recv.handle, ARG,
           "ep_ll_combine: handle was made by another buffer");
    LL_BAD(combine, a.handle = ll->base->recv.handle, ARG,
           "ep_ll_combine: handle is of ep_dispatch; it must be of ep_ll_dispatch");
}

static void combine_outputs(ll_bench *ll)
{
    LL_BAD(combine, a.y = (ep_tensor)EP_TENSOR_NONE, ARG, "ep_ll_combine: y is not given");
    LL_BAD(combine, a.y.ndim = 2, ARG, "ep_ll_combine: y.ndim is 2; it must be 3");
    LL_BAD(combine, a.y.dtype = EP_F32, ARG, "ep_ll_combine: y.dtype is F32 (3); it must be BF16");
    LL_BAD_DEVICES(combine, y, "ep_ll_combine: y");
    LL_BAD_DEVICES(combine, topk_idx, "ep_ll_combine: topk_idx");
    LL_BAD_DEVICES(combine, topk_weights, "ep_ll_combine: topk_weights");
    LL_BAD_DEVICES(combine, out, "ep_ll_combine: out");
    LL_BAD(combine, a.y.shape[0] = 3, ARG, "ep_ll_combine: y.shape[0] is 3; it must be 2");
    LL_BAD(combine, a.y.shape[1] = 5, ARG, "ep_ll_combine: y.shape[1] is 5; it must be 6");
    LL_BAD(combine, a.y.shape[2] = 56, ARG, "ep_ll_combine: y.shape[2] is 56; it must be 64");
    LL_BAD(combine, a.y.stride[2] = 2, ARG, "ep_ll_combine: y.stride[2] is 2; it must be 1");
    LL_BAD(combine, a.y.stride[1] = 63, ARG,
           "ep_ll_combine: y.stride[1] is 63; it must be at least 64");
    LL_BAD(combine, a.y.stride[0] = 383, ARG,
           "ep_ll_combine: y.stride[0] is 383; it must be at least 384");
    LL_BAD(combine, a.y.data = NULL, ARG, "ep_ll_combine: y.data is NULL");
}

static void combine_rest(ll_bench *ll)
{
    int64_t cost[3] = {0};
    LL_BAD(combine, a.topk_idx = (ep_tensor)EP_TENSOR_NONE, ARG,
           "ep_ll_combine: topk_idx is not given");
    LL_BAD(combine, a.topk_idx.shape[0] = 2, ARG,
           "ep_ll_combine: topk_idx.shape[0] is 2; it must be 3");
    LL_BAD(combine, a.topk_idx.dtype = EP_F32, ARG,
           "ep_ll_combine: topk_idx.dtype is F32 (3); it must be I32 or I64");
    LL_BAD(combine, a.topk_weights = (ep_tensor)EP_TENSOR_NONE, ARG,
           "ep_ll_combine: topk_weights is not given");
    LL_BAD(combine, a.topk_weights.dtype = EP_BF16, ARG,
           "ep_ll_combine: topk_weights.dtype is BF16 (1); it must be F32");
    LL_BAD(combine, a.topk_weights.shape[1] = 1, ARG,
           "ep_ll_combine: topk_weights.shape[1] is 1; it must be 2");
    LL_BAD(combine, a.out = (ep_tensor)EP_TENSOR_NONE, ARG, "ep_ll_combine: out is not given");
    LL_BAD(combine, a.out.dtype = EP_F16, ARG,
           "ep_ll_combine: out.dtype is F16 (2); it must be BF16");
    LL_BAD(combine, a.out.shape[0] = 2, ARG, "ep_ll_combine: out.shape[0] is 2; it must be 3");
    LL_BAD(combine, a.out.shape[1] = 56, ARG, "ep_ll_combine: out.shape[1] is 56; it must be 64");
    LL_BAD(combine, a.out.stride[0] = 63, ARG,
           "ep_ll_combine: out.stride[0] is 63; it must be at least 64");
    LL_BAD(combine, a.wire = (ep_combine_wire)2, ARG,
           "ep_ll_combine: wire is 2; it must be 0 or 1 (ep_combine_wire)");
    if (!test_device_wanted())
        LL_BAD(combine, a.stream = (void *)1, ARG,
               "ep_ll_combine: stream is 0x1; it must be NULL on the CPU");
    LL_BAD(combine, a.completion = (ep_completion)2, ARG,
           "ep_ll_combine: completion is 2; it must be 0 or 1 (ep_completion)");
    LL_BAD(combine, a.wait_cost = ep_tensor_1d(cost, EP_I64, 3), ARG,
           "ep_ll_combine: wait_cost.shape[0] is 3; it must be 2");
}

/* ------------------------------------------------------------- ranks that disagree */

/* Both fail with `message`: by their own look, or told by the other. */
static void check_both(ll_bench *ll, const char *change, ep_status status, const char *message)
{
    const char *text = ep_last_error(), *found = strstr(text, message);
    bool told = status == EP_ERR_ABORTED && strstr(text, "gave up: ");
    if (!found || strlen(found) != strlen(message) ||
        !(told || (status == EP_ERR_MISMATCH && found == text)))
        report(ll, change);
    if (!is_poison(ll->base->out, sizeof ll->base->out))
        report(ll, "out was written");
}

#define LL_BOTH(kind, change, message)                            \
    do {                                                          \
        args_next(ll->base);                                      \
        ep_ll_##kind##_args a = ll->kind;                         \
        if (ll->base->rank == 1) {                                \
            change;                                               \
        }                                                         \
        check_both(ll, #change, args_ll_##kind(ll, &a), message); \
    } while (0)

static void disagreement(ll_bench *ll)
{
    LL_BOTH(dispatch, a.x.shape[1] = 56,
            "ep_ll_dispatch: hidden differs: 64 on rank 0, 56 on rank 1");
    LL_BOTH(dispatch, a.wire = EP_E4M3,
            "ep_ll_dispatch: dtype (ep_dtype) differs: 1 on rank 0, 4 on rank 1");
    LL_BOTH(dispatch, a.topk_idx.shape[1] = 1,
            "ep_ll_dispatch: topk differs: 2 on rank 0, 1 on rank 1");
    LL_BOTH(dispatch, a.num_experts = 6;
            a.expert_tokens = (ep_tensor)EP_TENSOR_NONE,
            "ep_ll_dispatch: num_experts differs: 4 on rank 0, 6 on rank 1");
    LL_BOTH(dispatch, a.max_tokens = 4,
            "ep_ll_dispatch: max_tokens differs: 3 on rank 0, 4 on rank 1");
    LL_BOTH(dispatch, a.max_expert_rows = 5,
            "ep_ll_dispatch: max_expert_rows differs: 6 on rank 0, 5 on rank 1");
    LL_BOTH(dispatch, a.overflow = EP_OVERFLOW_DROP,
            "ep_ll_dispatch: overflow (ep_overflow) differs: 0 on rank 0, 1 on rank 1");
}

/* ------------------------------------------------------------- local calls */

static void expect(ll_bench *ll, ep_status status, ep_status want, const char *message)
{
    if (status != want || strcmp(ep_last_error(), message) != 0)
        report(ll, message);
}

static void local_buffer(ll_bench *ll)
{
    ep_tensor y;
    ep_buffer *buffer = ll->base->buffer;
    memset(&y, POISON, sizeof y);
    expect(ll, ep_ll_dispatch(NULL, &ll->dispatch, &ll->recv, NULL), ARG,
           "ep_ll_dispatch: buffer is NULL");
    expect(ll, ep_ll_combine(NULL, &ll->combine, NULL), ARG, "ep_ll_combine: buffer is NULL");
    expect(ll, ep_ll_combine_buffer(NULL, ll->recv.handle, &y), ARG,
           "ep_ll_combine_buffer: buffer is NULL");
    expect(ll, ep_ll_combine_buffer(buffer, ll->recv.handle, NULL), ARG,
           "ep_ll_combine_buffer: y is NULL");
    expect(ll, ep_ll_combine_buffer(buffer, NULL, &y), ARG, "ep_ll_combine_buffer: handle is NULL");
    expect(ll, ep_ll_combine_buffer(buffer, ll->other_recv.handle, &y), ARG,
           "ep_ll_combine_buffer: handle was made by another buffer");
    expect(ll, ep_ll_combine_buffer(buffer, ll->base->recv.handle, &y), ARG,
           "ep_ll_combine_buffer: handle is of ep_dispatch; it must be of ep_ll_dispatch");
    if (!is_poison(&y, sizeof y))
        report(ll, "y was written");
}

static void size_query(ll_bench *ll)
{
    static const struct {
        ep_ll_shape shape;
        const char *message;
    } cases[] = {
        {{sizeof(ep_ll_shape), 0, 1, 8, 1, 1, 0, EP_BF16, EP_SCALE_F32},
         "num_ranks is 0; it must be 1..65536"},
        {{sizeof(ep_ll_shape), 65537, 1, 8, 1, 1, 0, EP_BF16, EP_SCALE_F32},
         "num_ranks is 65537; it must be 1..65536"},
        {{sizeof(ep_ll_shape), 2, 0, 8, 1, 1, 0, EP_BF16, EP_SCALE_F32},
         "max_tokens is 0; it must be 1..1048576"},
        {{sizeof(ep_ll_shape), 4096, 524288, 8, 1, 1, 0, EP_BF16, EP_SCALE_F32},
         "max_tokens is 524288; it must be 1..524287"},
        {{sizeof(ep_ll_shape), 2, 1, 0, 1, 1, 0, EP_BF16, EP_SCALE_F32},
         "hidden is 0; it must be a multiple of 8, 8..16777216"},
        {{sizeof(ep_ll_shape), 2, 1, 12, 1, 1, 0, EP_BF16, EP_SCALE_F32},
         "hidden is 12; it must be a multiple of 8, 8..16777216"},
        {{sizeof(ep_ll_shape), 2, 1, 8, 1, 0, 0, EP_BF16, EP_SCALE_F32},
         "num_experts is 0; it must be 1..65536"},
        {{sizeof(ep_ll_shape), 2, 1, 8, 3, 2, 0, EP_BF16, EP_SCALE_F32},
         "topk is 3; it must be 1..2 (num_experts)"},
        {{sizeof(ep_ll_shape), 2, 1, 8, 1, 2, 0, EP_F16, EP_SCALE_F32},
         "wire is 2; it must be BF16 or E4M3"},
        {{sizeof(ep_ll_shape), 2, 1, 8, 1, 2, 0, EP_E4M3, (ep_scale)3},
         "scale is 3; it must be 0..2 (ep_scale)"},
        {{sizeof(ep_ll_shape), 2, 5, 8, 1, 2, 11, EP_BF16, EP_SCALE_F32},
         "max_expert_rows is 11; it must be 0..10 (num_ranks * max_tokens)"},
    };
    ep_ll_size size;
    char text[200];
    memset(&size, POISON, sizeof size);
    size.size = sizeof size;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        snprintf(text, sizeof text, "ep_ll_size_query: %s", cases[i].message);
        expect(ll, ep_ll_size_query(&cases[i].shape, &size), ARG, text);
    }
    expect(ll, ep_ll_size_query(NULL, &size), ARG, "ep_ll_size_query: shape is NULL");
    ep_ll_shape good = EP_LL_SHAPE_INIT;
    good.hidden = 8;
    expect(ll, ep_ll_size_query(&good, NULL), ARG, "ep_ll_size_query: size is NULL");
    if (!is_poison((uint8_t *)&size + sizeof size.size, sizeof size - sizeof size.size))
        report(ll, "size was written");
    size.size = 4;
    snprintf(text, sizeof text,
             "ep_ll_size_query: size->size is 4; it must be sizeof the struct (%zu here)",
             sizeof size);
    expect(ll, ep_ll_size_query(&good, &size), ARG, text);
}

static void masks(ll_bench *ll)
{
    ep_group *group = ll->base->group;
    uint8_t masked[ARGS_RANKS];
    char text[200];
    const int32_t ranks[] = {-1, 2, ll->base->rank};
    for (int i = 0; i < 3; i++) {
        snprintf(text, sizeof text,
                 "ep_group_mask: rank is %d; it can be 0..1, but not this rank, %d", (int)ranks[i],
                 ll->base->rank);
        expect(ll, ep_group_mask(group, ranks[i], 1), ARG, text);
    }
    expect(ll, ep_group_mask(NULL, 0, 1), ARG, "ep_group_mask: group is NULL");
    expect(ll, ep_group_mask(group, !ll->base->rank, 2), ARG,
           "ep_group_mask: masked is 2; it can be 0 or 1");
    expect(ll, ep_group_clear_masks(NULL), ARG, "ep_group_clear_masks: group is NULL");
    expect(ll, ep_group_query_masks(NULL, masked), ARG, "ep_group_query_masks: group is NULL");
    expect(ll, ep_group_query_masks(group, NULL), ARG, "ep_group_query_masks: masked is NULL");
    expect(ll, ep_group_query_late(NULL, masked), ARG, "ep_group_query_late: group is NULL");
    expect(ll, ep_group_query_late(group, NULL), ARG, "ep_group_query_late: late is NULL");
    expect(ll, ep_group_recover(NULL), ARG, "ep_group_recover: group is NULL");
    expect(ll, ep_group_readmit(NULL, 0), ARG, "ep_group_readmit: group is NULL");
    expect(ll, ep_group_readmit(group, 2), ARG, "ep_group_readmit: rank is 2; it can be 0..1");
    expect(ll, ep_group_readmit(group, -1), ARG, "ep_group_readmit: rank is -1; it can be 0..1");
    expect(ll, ep_group_readmit(group, !ll->base->rank), EP_ERR_STATE,
           ll->base->rank ? "ep_group_readmit: rank 0 is not masked"
                          : "ep_group_readmit: rank 1 is not masked");
    if (ep_group_query_masks(group, masked) != EP_OK || masked[0] || masked[1])
        report(ll, "a refused call changed the masks");
}

static void diagnosis(ll_bench *ll)
{
    ep_buffer *buffer = ll->base->buffer;
    int64_t ns[ARGS_RANKS * ARGS_RANKS];
    memset(ns, POISON, sizeof ns);
    expect(ll, ep_buffer_wait_cost(NULL, ns, 0), ARG, "ep_buffer_wait_cost: buffer is NULL");
    expect(ll, ep_buffer_wait_cost(buffer, NULL, 0), ARG, "ep_buffer_wait_cost: ns is NULL");
    expect(ll, ep_buffer_wait_matrix(NULL, ns, 0), ARG, "ep_buffer_wait_matrix: buffer is NULL");
    expect(ll, ep_buffer_wait_matrix(buffer, NULL, 0), ARG, "ep_buffer_wait_matrix: ns is NULL");
    expect(ll, ep_buffer_set_trace(NULL, NULL, NULL), ARG, "ep_buffer_set_trace: buffer is NULL");
    if (!is_poison(ns, sizeof ns))
        report(ll, "ns was written");
}

/* ------------------------------------------------------------- the run */

static void fill(ll_bench *ll)
{
    struct args_bench *base = ll->base;
    ll->recv = ll->other_recv = (ep_ll_recv)EP_LL_RECV_INIT;
    ll->dispatch = (ep_ll_dispatch_args)EP_LL_DISPATCH_ARGS_INIT;
    ll->dispatch.x = base->dispatch.x;
    ll->dispatch.topk_idx = base->dispatch.topk_idx;
    ll->dispatch.max_tokens = ARGS_TOKENS;
    ll->dispatch.num_experts = ARGS_EXPERTS;
    ll->dispatch.expert_tokens = ep_tensor_1d(ll->expert_tokens, EP_I32, LOCAL);
    ll->combine = (ep_ll_combine_args)EP_LL_COMBINE_ARGS_INIT;
    ll->combine.y = ep_tensor_2d(ll->y, EP_BF16, LOCAL, ROOM);
    ll->combine.y.ndim = 3;
    ll->combine.y.shape[2] = ARGS_HIDDEN;
    ll->combine.y.stride[0] = ROOM * ARGS_HIDDEN;
    ll->combine.y.stride[1] = ARGS_HIDDEN;
    ll->combine.y.stride[2] = 1;
    ll->combine.topk_idx = base->dispatch.topk_idx;
    ll->combine.topk_weights = base->dispatch.topk_weights;
    ll->combine.out = ep_tensor_2d(base->out, EP_BF16, ARGS_TOKENS, ARGS_HIDDEN);
}

/* The good calls work, after the bad ones too, on a new result and on the one from before. */
static int good_calls(ll_bench *ll)
{
    ep_ll_recv recv = EP_LL_RECV_INIT;
    ep_ll_combine_args combine = ll->combine;
    TEST_OK(ep_ll_dispatch(ll->base->buffer, &ll->dispatch, &recv, NULL));
    TEST_OK(ep_ll_combine(ll->base->buffer, &combine, NULL));
    combine.handle = recv.handle;
    TEST_OK(ep_ll_combine(ll->base->buffer, &combine, NULL));
    ep_ll_recv_release(&recv);
    return 0;
}

/* On devices ranks that have memory for different shapes find out only by their timeout, and the
   call after the next wants the memory of a result: disagreements come first, results later. */
static int checks(ll_bench *ll)
{
    bool device = test_device_wanted();
    if (device)
        disagreement(ll);
    TEST_OK(ep_ll_dispatch(ll->base->buffer, &ll->dispatch, &ll->recv, NULL));
    TEST_OK(ep_ll_dispatch(ll->base->other, &ll->dispatch, &ll->other_recv, NULL));
    if (device)
        ep_ll_recv_release(&ll->recv);
    dispatch_sizes(ll);
    dispatch_rows(ll);
    dispatch_routing(ll);
    dispatch_ids(ll);
    dispatch_choices(ll);
    if (device)
        TEST_OK(ep_ll_dispatch(ll->base->buffer, &ll->dispatch, &ll->recv, NULL));
    ll->combine.handle = ll->recv.handle;
    combine_handles(ll);
    combine_outputs(ll);
    combine_rest(ll);
    local_buffer(ll);
    size_query(ll);
    masks(ll);
    diagnosis(ll);
    TEST_CHECK(good_calls(ll) == 0);
    ep_ll_recv_release(&ll->recv); /* whose memory the next call uses */
    TEST_OK(ep_ll_dispatch(ll->base->buffer, &ll->dispatch, &ll->recv, NULL));
    ll->combine.handle = ll->recv.handle;
    if (!device)
        disagreement(ll);
    return good_calls(ll);
}

static void all(struct args_bench *bench)
{
    ll_bench *ll = calloc(1, sizeof *ll);
    if (!ll) {
        bench->failed++;
        return;
    }
    ll->base = bench;
    fill(ll);
    bench->failed += checks(ll);
    ep_ll_recv_release(&ll->recv);
    ep_ll_recv_release(&ll->other_recv);
    free(ll);
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
