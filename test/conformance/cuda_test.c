/* SPDX-License-Identifier: MIT */
/*
 * CUDA buffers against CPU buffers of the same ranks, bit for bit: low latency
 * in its forms, and captured graphs. Then the suites of the CPU transports once
 * more, on the device. Skipped where there is none.
 * ctest-timeout: 600
 */
#include "support/formats.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/tensors.h"
#include "support/test.h"

#include "entrepot/low_latency.h"

#include <stdlib.h>
#include <string.h>

static bool has_device(void)
{
    int32_t count = 0;
    return ep_device_count(EP_DEVICE_CUDA, &count) == EP_OK && count > 0;
}

/* A device must not be touched before ranks are forked, so a child looks. */
static int look(int rank, int num_ranks, void *arg)
{
    (void)rank, (void)num_ranks, (void)arg;
    return has_device() ? 0 : 1;
}

static void need_device(void)
{
    static int missing = -1;
    if (missing < 0)
        missing = test_run_processes(1, look, NULL);
    if (missing)
        skip();
}

/* Both kinds of buffer of one rank. `test_device` says where new tensors go. */
struct pair {
    ep_group *group;
    ep_buffer *buffer[2]; /* CPU, CUDA */
    struct test_device cuda;
};

static int open_pair(ep_group *group, struct pair *pair)
{
    int32_t count = 0;
    pair->group = group;
    TEST_OK(ep_device_count(EP_DEVICE_CUDA, &count));
    pair->cuda.index = ep_group_rank(group) % (count > 0 ? count : 1);
    for (int i = 0; i < 2; i++) {
        ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
        config.device = i ? EP_DEVICE_CUDA : EP_DEVICE_CPU;
        config.device_index = i ? pair->cuda.index : 0;
        config.window_max_bytes = (size_t)8 << 30;
        config.max_experts = 8192;
        TEST_OK(ep_buffer_create(group, &config, &pair->buffer[i]));
    }
    TEST_OK(ep_stream_create(EP_DEVICE_CUDA, pair->cuda.index, &pair->cuda.stream));
    pair->cuda.type = EP_DEVICE_CUDA;
    return 0;
}

static void close_pair(struct pair *pair)
{
    test_device = (struct test_device){0};
    for (int i = 0; i < 2; i++)
        ep_buffer_destroy(pair->buffer[i]);
    ep_stream_destroy(EP_DEVICE_CUDA, pair->cuda.index, pair->cuda.stream);
}

static void go_to(const struct pair *pair, int which)
{
    test_device = which ? pair->cuda : (struct test_device){0};
}

/* Host copy of a whole tensor's memory, at most `rows` of its first dimension. */
static void *host_copy(const ep_tensor *t, int64_t elements)
{
    size_t bytes = (size_t)elements * ep_dtype_size(t->dtype);
    void *copy = test_zeros((int64_t)bytes, 1);
    if (t->device == EP_DEVICE_CPU)
        memcpy(copy, t->data, bytes);
    else if (ep_device_copy(t->device, t->device_index, copy, t->data, bytes, test_device.stream) !=
             EP_OK)
        abort();
    return copy;
}

/* ---------------------------------------------------------------- low latency */

struct ll_case {
    const char *name;
    int num_ranks;
    int64_t max_tokens, hidden;
    int topk;
    int64_t num_experts, max_expert_rows;
    ep_dtype wire, ids;
    ep_scale scale;
    ep_combine_wire combine;
    bool by_column, hook, zero_copy, drop;
};

struct ll_inputs {
    int64_t tokens;
    uint16_t *x;
    int64_t *ids;
    float *weights;
};

/* Values small enough that LogFMT codes most chunks, with some zeros and large ones. */
static struct ll_inputs make_inputs(const struct ll_case *c, struct rng *rng)
{
    struct ll_inputs in = {.tokens = rng_range(rng, 0, c->max_tokens)};
    in.x = test_zeros(in.tokens * c->hidden, 2);
    in.ids = test_zeros(in.tokens * c->topk, 8);
    in.weights = test_zeros(in.tokens * c->topk, 4);
    for (int64_t i = 0; i < in.tokens * c->hidden; i++)
        format_store(EP_BF16, in.x, i, rng_below(rng, 50) ? (rng_unit(rng) - 0.5) : 0);
    for (int64_t t = 0; t < in.tokens; t++) {
        int64_t first = rng_range(rng, 0, c->num_experts - 1); /* experts of a token differ */
        for (int k = 0; k < c->topk; k++) {
            in.ids[t * c->topk + k] = (first + k) % c->num_experts;
            if (rng_below(rng, 9) == 0)
                in.ids[t * c->topk + k] = -1;
            in.weights[t * c->topk + k] = (float)rng_unit(rng);
        }
    }
    return in;
}

/* One dispatch and combine; what came out, in host memory. */
struct ll_outputs {
    int32_t *count, *dropped, *source;
    int64_t *range;
    uint8_t *x;
    uint32_t *scales;
    uint16_t *out;
    int64_t local, room, words;
};

static int finish(ep_event **event)
{
    if (*event)
        TEST_OK(ep_event_wait(*event));
    ep_event_release(*event);
    *event = NULL;
    return 0;
}

static int ll_dispatch(const struct pair *pair, int which, const struct ll_case *c,
                       const struct ll_inputs *in, ep_ll_recv *recv)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    ep_event *event = NULL;
    args.x = tensor_new(EP_BF16, in->tokens, c->hidden, 8, in->x);
    args.topk_idx = tensor_new_ids(c->ids, in->tokens, c->topk, 1, in->ids);
    args.max_tokens = c->max_tokens;
    args.num_experts = c->num_experts;
    args.max_expert_rows = c->max_expert_rows;
    args.overflow = c->drop ? EP_OVERFLOW_DROP : EP_OVERFLOW_ERROR;
    args.wire = c->wire;
    args.scale = c->scale;
    args.scales_by_column = c->by_column;
    args.completion = c->hook ? EP_COMPLETE_BY_HOOK : EP_COMPLETE_IN_BACKGROUND;
    args.stream = test_device.stream;
    TEST_OK(ep_ll_dispatch(pair->buffer[which], &args, recv, &event));
    if (finish(&event))
        return 1;
    tensor_free(&args.x);
    tensor_free(&args.topk_idx);
    return 0;
}

/* Expert outputs are a function of where the row lies, alike on both devices. */
static uint16_t *make_y(const struct ll_outputs *o, int64_t hidden)
{
    uint16_t *y = test_zeros(o->local * o->room * hidden, 2);
    struct rng rng;
    rng_seed(&rng, 99);
    for (int64_t l = 0; l < o->local; l++)
        for (int64_t i = 0; i < o->count[l] * hidden; i++)
            format_store(EP_BF16, y, l * o->room * hidden + i, (rng_unit(&rng) - 0.5) * 1.5);
    return y;
}

static int ll_combine(const struct pair *pair, int which, const struct ll_case *c,
                      const struct ll_inputs *in, const ep_ll_recv *recv, struct ll_outputs *o)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    ep_event *event = NULL;
    uint16_t *y = make_y(o, c->hidden);
    size_t bytes = (size_t)(o->local * o->room * c->hidden) * 2;
    void *ordinary = test_memory_new(bytes + 16);
    args.y = recv->x;
    args.y.dtype = EP_BF16;
    args.y.data = ordinary;
    if (c->zero_copy)
        TEST_OK(ep_ll_combine_buffer(pair->buffer[which], recv->handle, &args.y));
    for (int64_t l = 0; l < o->local; l++)
        test_memory_write((uint16_t *)args.y.data + l * o->room * c->hidden,
                          y + l * o->room * c->hidden, (size_t)(o->count[l] * c->hidden) * 2);
    args.topk_idx = tensor_new_ids(c->ids, in->tokens, c->topk, 0, in->ids);
    args.topk_weights = tensor_new(EP_F32, in->tokens, c->topk, 2, in->weights);
    args.handle = recv->handle;
    args.wire = c->combine;
    args.out = tensor_new(EP_BF16, in->tokens, c->hidden, 0, NULL);
    args.completion = c->hook ? EP_COMPLETE_BY_HOOK : EP_COMPLETE_IN_BACKGROUND;
    args.stream = test_device.stream;
    TEST_OK(ep_ll_combine(pair->buffer[which], &args, &event));
    if (finish(&event))
        return 1;
    o->out = host_copy(&args.out, in->tokens * c->hidden);
    tensor_free(&args.topk_idx);
    tensor_free(&args.topk_weights);
    tensor_free(&args.out);
    test_memory_free(ordinary);
    free(y);
    return 0;
}

static int ll_run(const struct pair *pair, int which, const struct ll_case *c,
                  const struct ll_inputs *in, struct ll_outputs *o)
{
    ep_ll_recv recv = EP_LL_RECV_INIT;
    go_to(pair, which);
    if (ll_dispatch(pair, which, c, in, &recv))
        return 1;
    o->local = recv.x.shape[0];
    o->room = recv.x.shape[1];
    o->words = recv.scales.ndim ? recv.scales.shape[2] : 0;
    int64_t ranks = c->num_ranks;
    o->count = host_copy(&recv.count, o->local);
    o->dropped = host_copy(&recv.dropped, o->local);
    o->source = host_copy(&recv.source_token, o->local * o->room);
    o->range = host_copy(&recv.source_range, o->local * ranks);
    o->x = host_copy(&recv.x, o->local * o->room * c->hidden);
    if (o->words)
        o->scales = host_copy(&recv.scales, o->local * o->room * o->words);
    for (int64_t l = 0; l < o->local; l++) /* rows are made by it */
        TEST_CHECK(o->count[l] >= 0 && o->count[l] <= o->room);
    if (ll_combine(pair, which, c, in, &recv, o))
        return 1;
    ep_ll_recv_release(&recv);
    return 0;
}

static int ll_compare(const struct ll_case *c, const struct ll_inputs *in,
                      const struct ll_outputs *a, const struct ll_outputs *b)
{
    size_t row = (size_t)c->hidden * ep_dtype_size(c->wire);
    TEST_CHECK(a->local == b->local && a->room == b->room && a->words == b->words);
    TEST_CHECK(memcmp(a->count, b->count, (size_t)a->local * 4) == 0);
    TEST_CHECK(memcmp(a->dropped, b->dropped, (size_t)a->local * 4) == 0);
    for (int64_t i = 0; i < a->local * c->num_ranks; i++)
        TEST_CHECK((uint32_t)a->range[i] == (uint32_t)b->range[i] &&
                   ((uint32_t)a->range[i] == 0 || a->range[i] == b->range[i]));
    for (int64_t l = 0; l < a->local; l++)
        for (int64_t i = l * a->room; i < l * a->room + a->count[l]; i++) {
            TEST_CHECK(a->source[i] == b->source[i]);
            TEST_CHECK(memcmp(a->x + (size_t)i * row, b->x + (size_t)i * row, row) == 0);
            for (int64_t w = 0; w < a->words; w++) {
                int64_t at = c->by_column ? (l * a->words + w) * a->room + (i - l * a->room)
                                          : i * a->words + w;
                TEST_CHECK(a->scales[at] == b->scales[at]);
            }
        }
    TEST_CHECK(memcmp(a->out, b->out, (size_t)(in->tokens * c->hidden) * 2) == 0);
    return 0;
}

static void free_outputs(struct ll_outputs *o)
{
    void *memory[] = {o->count, o->dropped, o->source, o->range, o->x, o->scales, o->out};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        free(memory[i]);
}

static int ll_body(ep_group *group, void *argument)
{
    const struct ll_case *c = argument;
    struct pair pair = {0};
    int failed = open_pair(group, &pair);
    struct rng rng;
    rng_seed(&rng, 7 + (uint64_t)ep_group_rank(group));
    for (int round = 0; round < 4 && !failed; round++) {
        struct ll_inputs in = make_inputs(c, &rng);
        struct ll_outputs o[2] = {{0}, {0}};
        failed = ll_run(&pair, 0, c, &in, &o[0]) || ll_run(&pair, 1, c, &in, &o[1]) ||
                 ll_compare(c, &in, &o[0], &o[1]);
        free_outputs(&o[0]);
        free_outputs(&o[1]);
        free(in.x);
        free(in.ids);
        free(in.weights);
    }
    if (failed)
        fprintf(stderr, "  in '%s'\n", c->name);
    close_pair(&pair);
    return failed;
}

static const struct ll_case ll_cases[] = {
    {"bf16", 2, 9, 256, 3, 6, 0, EP_BF16, EP_I64, .scale = EP_SCALE_F32},
    {"fp8", 3, 17, 1024, 4, 9, 0, EP_E4M3, EP_I32, .scale = EP_SCALE_F32},
    {"fp8, powers of two, by column", 2, 33, 640, 2, 8, 0, EP_E4M3, EP_I64, .scale = EP_SCALE_POW2,
     .by_column = true, .hook = true},
    {"fp8, ue8m0, zero copy", 2, 20, 1096, 3, 6, 0, EP_E4M3, EP_I64, .scale = EP_SCALE_UE8M0,
     .zero_copy = true, .hook = true},
    {"logfmt, chunks of 1024", 2, 11, 2048, 3, 6, 0, EP_BF16, EP_I64,
     .combine = EP_COMBINE_LOGFMT10},
    {"logfmt, chunks of 512 and a rest", 2, 8, 1288, 2, 4, 0, EP_BF16, EP_I64,
     .combine = EP_COMBINE_LOGFMT10, .hook = true},
    {"logfmt of the send buffer", 2, 11, 2048, 3, 6, 0, EP_BF16, EP_I64,
     .combine = EP_COMBINE_LOGFMT10, .zero_copy = true},
    {"logfmt of the send buffer, a rest", 3, 8, 5512, 2, 6, 0, EP_E4M3, EP_I64,
     .scale = EP_SCALE_F32, .combine = EP_COMBINE_LOGFMT10, .hook = true, .zero_copy = true},
    {"overflow dropped", 2, 24, 128, 4, 4, 9, EP_BF16, EP_I64, .drop = true},
    {"odd rows", 3, 7, 8, 2, 6, 0, EP_E4M3, EP_I64, .scale = EP_SCALE_F32, .zero_copy = true},
    {"one rank", 1, 40, 512, 2, 4, 0, EP_E4M3, EP_I64, .scale = EP_SCALE_F32, .zero_copy = true},
    {"wide", 2, 130, 7168, 8, 32, 0, EP_E4M3, EP_I64, .scale = EP_SCALE_F32, .zero_copy = true},
    /* bitmaps of all tokens are more than a multiprocessor holds; then the experts' tables too */
    {"most tokens", 2, 8192, 128, 4, 256, 512, EP_E4M3, EP_I64, .scale = EP_SCALE_F32},
    {"most tokens, many experts", 2, 8192, 8, 2, 8192, 64, EP_BF16, EP_I32, .hook = true},
};

static void low_latency(void **state)
{
    (void)state;
    need_device();
    for (size_t i = 0; i < sizeof ll_cases / sizeof *ll_cases; i++)
        assert_int_equal(
            test_run_groups("shm", ll_cases[i].num_ranks, ll_body, (void *)&ll_cases[i]), 0);
}

/* ---------------------------------------------------------------- graphs */

enum { TOKENS = 37, HIDDEN = 256, TOPK = 4, EXPERTS = 8, WORST = 2 * TOKENS };

struct captured {
    ep_tensor x, ids, weights, y, out, out_weights;
    ep_recv recv, cached;
    void *graph;
};

static int record(const struct pair *pair, struct captured *g, bool capture)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_combine_args back = EP_COMBINE_ARGS_INIT;
    ep_recv init = EP_RECV_INIT;
    g->recv = g->cached = init;
    if (capture)
        TEST_OK(ep_graph_begin(EP_DEVICE_CUDA, test_device.index, test_device.stream));
    args.x = g->x;
    args.topk_idx = g->ids;
    args.topk_weights = g->weights;
    args.num_experts = EXPERTS;
    args.num_worst_tokens = WORST;
    args.stream = test_device.stream;
    TEST_OK(ep_dispatch(pair->buffer[1], &args, &g->recv, NULL));
    back.y = g->recv.x; /* the experts of this test change nothing */
    back.topk_weights = g->recv.topk_weights;
    back.handle = g->recv.handle;
    back.out = g->out;
    back.out_weights = g->out_weights;
    back.stream = test_device.stream;
    TEST_OK(ep_combine(pair->buffer[1], &back, NULL));
    ep_dispatch_args again = EP_DISPATCH_ARGS_INIT;
    again.x = g->x;
    again.handle = g->recv.handle;
    again.stream = test_device.stream;
    TEST_OK(ep_dispatch(pair->buffer[1], &again, &g->cached, NULL));
    if (capture)
        TEST_OK(ep_graph_end(EP_DEVICE_CUDA, test_device.index, test_device.stream, &g->graph));
    return 0;
}

static void drop(struct captured *g)
{
    ep_handle *handle = g->recv.handle;
    ep_recv_release(&g->recv);
    ep_recv_release(&g->cached);
    ep_handle_release(handle);
}

/* New inputs before each launch: nothing of the first may have been captured. */
static int replay(const struct pair *pair, struct captured *g, struct rng *rng)
{
    uint16_t *x = test_zeros(TOKENS * HIDDEN, 2);
    int64_t *ids = test_zeros(TOKENS * TOPK, 8);
    float *weights = test_zeros(TOKENS * TOPK, 4);
    int num_ranks = ep_group_num_ranks(pair->group), block = EXPERTS / num_ranks;
    for (int i = 0; i < TOKENS * HIDDEN; i++)
        format_store(EP_BF16, x, i, rng_unit(rng) - 0.5);
    for (int t = 0; t < TOKENS; t++)
        for (int k = 0; k < TOPK; k++) {
            ids[t * TOPK + k] = ((int64_t)rng_below(rng, 2) * TOPK + k) % EXPERTS;
            weights[t * TOPK + k] = (float)rng_unit(rng);
        }
    test_memory_write(g->x.data, x, TOKENS * HIDDEN * 2);
    test_memory_write(g->ids.data, ids, TOKENS * TOPK * 8);
    test_memory_write(g->weights.data, weights, TOKENS * TOPK * 4);
    TEST_OK(ep_graph_launch(EP_DEVICE_CUDA, test_device.index, g->graph, test_device.stream));
    TEST_OK(ep_stream_wait(EP_DEVICE_CUDA, test_device.index, test_device.stream));
    uint16_t *out = host_copy(&g->out, TOKENS * HIDDEN);
    float *sums = host_copy(&g->out_weights, TOKENS * TOPK);
    for (int t = 0; t < TOKENS; t++) {
        uint64_t ranks = 0;
        for (int k = 0; k < TOPK; k++) {
            ranks |= 1ull << ids[t * TOPK + k] / block;
            TEST_CHECK(sums[t * TOPK + k] == weights[t * TOPK + k]);
        }
        for (int h = 0; h < HIDDEN; h++) { /* every rank gave the row back as it was */
            uint16_t want[1];
            double value = format_load(EP_BF16, x, t * HIDDEN + h);
            format_store(EP_BF16, want, 0, value * __builtin_popcountll(ranks));
            TEST_CHECK(out[t * HIDDEN + h] == want[0]);
        }
    }
    free(out);
    free(sums);
    free(x);
    free(ids);
    free(weights);
    return 0;
}

static int graph_body(ep_group *group, void *argument)
{
    (void)argument;
    struct pair pair = {0};
    struct captured g = {.graph = NULL};
    struct rng rng;
    int failed = open_pair(group, &pair);
    go_to(&pair, 1);
    rng_seed(&rng, 5 + (uint64_t)ep_group_rank(group));
    int64_t *none = test_zeros(TOKENS * TOPK, 8);
    g.x = tensor_new(EP_BF16, TOKENS, HIDDEN, 0, NULL);
    g.ids = tensor_new_ids(EP_I64, TOKENS, TOPK, 0, none);
    g.weights = tensor_new(EP_F32, TOKENS, TOPK, 0, NULL);
    g.out = tensor_new(EP_BF16, TOKENS, HIDDEN, 0, NULL);
    g.out_weights = tensor_new(EP_F32, TOKENS, TOPK, 0, NULL);
    free(none);
    if (!failed)
        failed = record(&pair, &g, false); /* once before: tables and scratch are there then */
    drop(&g);
    if (!failed)
        failed = record(&pair, &g, true);
    for (int i = 0; i < 5 && !failed; i++)
        failed = replay(&pair, &g, &rng);
    ep_graph_destroy(EP_DEVICE_CUDA, test_device.index, g.graph);
    drop(&g);
    close_pair(&pair);
    return failed;
}

static void graphs(void **state)
{
    (void)state;
    need_device();
    assert_int_equal(test_run_groups("shm", 2, graph_body, NULL), 0);
}

/* ---------------------------------------------------------------- failures */

/* One rank asks for something else: all are told, in time, and the buffer stays usable. */
static int failure_body(ep_group *group, void *argument)
{
    (void)argument;
    struct pair pair = {0};
    int failed = open_pair(group, &pair), rank = ep_group_rank(group);
    go_to(&pair, 1);
    int64_t ids[2] = {0, 1}, bad[2] = {0, 77};
    uint16_t rows[2 * 64] = {0};
    for (int round = 0; round < 4 && !failed; round++) {
        bool odd = rank == 1;
        ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
        ep_recv recv = EP_RECV_INIT;
        args.x = tensor_new(EP_BF16, 2, round == 0 && odd ? 32 : 64, 0, rows);
        args.topk_idx = tensor_new_ids(EP_I64, 2, 1, 0, round == 1 && odd ? bad : ids);
        args.num_experts = round == 2 && odd ? -1 : 2;
        args.stream = test_device.stream;
        ep_status status = ep_dispatch(pair.buffer[1], &args, &recv, NULL);
        ep_status want = round == 0   ? EP_ERR_MISMATCH
                         : round == 3 ? EP_OK
                         : odd        ? EP_ERR_ARGUMENT
                                      : EP_ERR_ABORTED;
        if (status != want)
            fprintf(stderr, "round %d on rank %d: %s, expected %s (%s)\n", round, rank,
                    ep_status_string(status), ep_status_string(want), ep_last_error());
        failed = status != want;
        ep_handle *handle = recv.handle;
        ep_recv_release(&recv);
        ep_handle_release(handle);
        tensor_free(&args.x);
        tensor_free(&args.topk_idx);
    }
    close_pair(&pair);
    return failed;
}

enum { LATE_RANKS = 4, LATE = 2, FIRST = 1 };

/* A call of either mode; 77 is an expert that there is not. */
static ep_status small_call(ep_buffer *buffer, bool low_latency, int64_t expert)
{
    const int64_t ids[2] = {0, expert};
    const uint16_t rows[2 * 64] = {0};
    ep_tensor x = tensor_new(EP_BF16, 2, 64, 0, rows);
    ep_tensor idx = tensor_new_ids(EP_I64, 2, 1, 0, ids);
    ep_event *event = NULL;
    ep_recv recv = EP_RECV_INIT;
    ep_ll_recv ll_recv = EP_LL_RECV_INIT;
    ep_status status;
    if (low_latency) {
        ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
        args.x = x;
        args.topk_idx = idx;
        args.max_tokens = 2;
        args.num_experts = LATE_RANKS;
        args.stream = test_device.stream;
        status = ep_ll_dispatch(buffer, &args, &ll_recv, &event);
    } else {
        ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
        args.x = x;
        args.topk_idx = idx;
        args.num_experts = LATE_RANKS;
        args.stream = test_device.stream;
        status = ep_dispatch(buffer, &args, &recv, &event);
    }
    if (status == EP_OK)
        status = ep_event_wait(event);
    ep_event_release(event);
    ep_ll_recv_release(&ll_recv);
    ep_handle *handle = recv.handle;
    ep_recv_release(&recv);
    ep_handle_release(handle);
    tensor_free(&x);
    tensor_free(&idx);
    return status;
}

/* A rank does not come. One of the others gives up first, and everybody names it and the rank. */
static int late_body(ep_group *group, void *argument)
{
    bool low_latency = *(const bool *)argument;
    struct pair pair = {0};
    int rank = ep_group_rank(group);
    TEST_CHECK(open_pair(group, &pair) == 0);
    go_to(&pair, 1);
    TEST_OK(small_call(pair.buffer[1], low_latency, 1));
    TEST_OK(ep_group_barrier(group));
    if (rank == FIRST)
        TEST_OK(ep_group_set_timeout_ms(group, 500));
    if (rank != LATE) {
        int64_t since = test_now_ms();
        ep_status status = small_call(pair.buffer[1], low_latency, 1);
        TEST_CHECK(test_now_ms() - since < 6000);
        TEST_CHECK(status == (rank == FIRST ? EP_ERR_TIMEOUT : EP_ERR_ABORTED));
        TEST_CHECK(strstr(ep_last_error(), rank == FIRST
                                               ? "): no word from rank 2 within 500 ms"
                                               : "): rank 1 gave up: no word from rank 2"));
    }
    TEST_OK(ep_group_set_timeout_ms(group, 20000));
    TEST_OK(ep_group_recover(group));
    TEST_OK(small_call(pair.buffer[1], low_latency, 1));
    ep_status status = small_call(pair.buffer[1], low_latency, rank == FIRST ? 77 : 1);
    TEST_CHECK(status == (rank == FIRST ? EP_ERR_ARGUMENT : EP_ERR_ABORTED));
    TEST_CHECK(strstr(ep_last_error(), rank == FIRST ? ": topk_idx[1][0] is 77; it must be -1..3"
                                                     : "): rank 1 gave up: EP_ERR_ARGUMENT"));
    TEST_OK(small_call(pair.buffer[1], low_latency, 1));
    TEST_OK(ep_group_barrier(group));
    close_pair(&pair);
    return 0;
}

static void failures(void **state)
{
    (void)state;
    need_device();
    assert_int_equal(test_run_groups("shm", 2, failure_body, NULL), 0);
    for (int low_latency = 0; low_latency < 2; low_latency++) {
        bool argument = low_latency;
        assert_int_equal(test_run_groups("shm", LATE_RANKS, late_body, &argument), 0);
    }
}

/* ---------------------------------------------------------------- the suites */

/* tools/gpu_test.sh runs these, and longer ones, one by one. */
static void suites(void **state)
{
    (void)state;
    static const char *const programs[] = {"normal_test", "seeded_test", "low_latency_test",
                                           "repeat_test"};
    need_device();
    setenv("EP_TEST_DEVICE", "cuda", 1);
    for (int path = 0; path < 2; path++) {
        setenv("EP_CUDA_PATH", path ? "sm80" : "sm90", 1);
        for (size_t i = 0; i < sizeof programs / sizeof *programs; i++) {
            char line[512];
            snprintf(line, sizeof line, "%s/bin/%s", EP_BINARY_DIR, programs[i]);
            assert_int_equal(system(line), 0);
        }
    }
}

/* The name of a test, as a pattern, may be given: each part takes a device a while. */
int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(low_latency),
        cmocka_unit_test(graphs),
        cmocka_unit_test(failures),
        cmocka_unit_test(suites),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
