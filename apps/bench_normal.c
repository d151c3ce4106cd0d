/* SPDX-License-Identifier: MIT */
/* What each rank of `bench ep --mode normal` does. */
#include "bench.h"
#include "check.h"
#include "memory.h"

#include <stdlib.h>
#include <string.h>

typedef struct bench_rank {
    rank_self *self;
    const bench_context *c;
    const bench_options *o;
    ep_buffer *buffer;
    ep_handle *handle; /* of the first dispatch, for cached ones */
    ep_recv recv;      /* of the last dispatch */
    int32_t *ids;
    float *weights;
    uint16_t *x, *out, *out_ordinary;
    uint16_t *y;          /* expert outputs in the window */
    uint16_t *y_ordinary; /* a copy of them in ordinary memory */
    int64_t num_rows;
} bench_rank;

#define TRY(call)                   \
    do {                            \
        ep_status status_ = (call); \
        if (status_ != EP_OK)       \
            return status_;         \
    } while (0)

static ep_status alloc_inputs(bench_rank *b)
{
    const bench_options *o = b->o;
    size_t entries = (size_t)(o->tokens * o->topk), elements = (size_t)(o->tokens * o->hidden);
    b->ids = malloc(entries * sizeof *b->ids + 1);
    b->weights = malloc(entries * sizeof *b->weights + 1);
    b->x = aligned_alloc(64, (elements * sizeof *b->x + 64) & ~(size_t)63);
    b->out = aligned_alloc(64, (elements * sizeof *b->out + 64) & ~(size_t)63);
    if (!b->ids || !b->weights || !b->x || !b->out ||
        !workload_routing(&b->c->load, b->self->rank, b->ids, b->weights))
        return rank_fail(b->self, EP_ERR_MEMORY, "no memory for the inputs");
    for (int64_t t = 0; t < o->tokens; t++)
        workload_row(&b->c->load, b->self->rank, t, b->x + t * o->hidden);
    memset(b->out, 0xff, elements * sizeof *b->out); /* warm, and wrong until written */
    return EP_OK;
}

static ep_status dispatch(bench_rank *b, ep_handle *cached)
{
    const bench_options *o = b->o;
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(b->x, EP_BF16, o->tokens, o->hidden);
    args.wire = o->wire == BENCH_WIRE_FP8 ? EP_WIRE_FP8 : EP_WIRE_INPUT;
    args.handle = cached;
    if (!cached) {
        args.topk_idx = ep_tensor_2d(b->ids, EP_I32, o->tokens, o->topk);
        args.topk_weights = ep_tensor_2d(b->weights, EP_F32, o->tokens, o->topk);
        args.num_experts = o->experts;
    }
    return ep_dispatch(b->buffer, &args, &b->recv, NULL);
}

static ep_status combine(bench_rank *b, uint16_t *y, uint16_t *out)
{
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = ep_tensor_2d(y, EP_BF16, b->num_rows, b->o->hidden);
    args.handle = b->handle;
    args.out = ep_tensor_2d(out, EP_BF16, b->o->tokens, b->o->hidden);
    return ep_combine(b->buffer, &args, NULL);
}

static ep_status layout(bench_rank *b, int32_t *counts, uint8_t *member)
{
    ep_tensor ids = ep_tensor_2d(b->ids, EP_I32, b->o->tokens, b->o->topk);
    return ep_layout(&ids, b->o->experts, NULL, b->self->num_ranks, b->self->num_ranks, counts,
                     NULL, counts + b->self->num_ranks, member);
}

/* ---------------------------------------------------------------- experts */

/* The stand-in for an expert, as check.h describes it. */
static void expert_row(const bench_rank *b, int64_t row)
{
    int64_t hidden = b->o->hidden;
    const float *weights = (const float *)b->recv.topk_weights.data + row * b->o->topk;
    const uint16_t *x = (const uint16_t *)b->recv.x.data + row * hidden;
    uint16_t *y = b->y + row * hidden;
    float weight = 0;
    for (int64_t k = 0; k < b->o->topk; k++)
        weight += weights[k];
    for (int64_t h = 0; h < hidden; h++)
        y[h] = bf16_from_float(weight * float_from_bf16(x[h]));
}

static void expert_row_fp8(const bench_rank *b, const float *values, int64_t row)
{
    int64_t hidden = b->o->hidden;
    const float *weights = (const float *)b->recv.topk_weights.data + row * b->o->topk;
    const float *scales = (const float *)b->recv.scales.data + row * b->recv.scales.stride[0];
    const uint8_t *x = (const uint8_t *)b->recv.x.data + row * hidden;
    float weight = 0;
    for (int64_t k = 0; k < b->o->topk; k++)
        weight += weights[k];
    for (int64_t h = 0; h < hidden; h++) {
        float value = values[x[h]] * scales[h / 128 * b->recv.scales.stride[1]];
        b->y[row * hidden + h] = bf16_from_float(weight * value);
    }
}

static void run_experts(const bench_rank *b)
{
    float values[256];
    for (int code = 0; code < 256; code++)
        values[code] = (float)check_e4m3_value((uint8_t)code);
    for (int64_t row = 0; row < b->num_rows; row++) {
        if (b->o->wire == BENCH_WIRE_FP8)
            expert_row_fp8(b, values, row);
        else
            expert_row(b, row);
    }
}

/* ------------------------------------------------------------ measurement */

/* One untimed round that sets up what later ones reuse, and looks at memory before anything
   is allocated that only the measurement needs. */
static ep_status first_round(bench_rank *b)
{
    const bench_options *o = b->o;
    bench_rank_result *result = &b->c->results[b->self->rank];
    TRY(dispatch(b, NULL));
    b->handle = b->recv.handle;
    b->num_rows = b->recv.num_rows;
    size_t bytes = (size_t)(b->num_rows * o->hidden) * sizeof *b->y;
    TRY(ep_buffer_alloc(b->buffer, bytes ? bytes : 1, (void **)&b->y));
    run_experts(b);
    TRY(combine(b, b->y, b->out));
    ep_buffer_info info = {.size = sizeof info};
    TRY(ep_buffer_query(b->buffer, &info));
    int64_t entry = 4 + 4, rows = b->num_rows;
    result->recv_tokens = rows;
    result->window_bytes = (int64_t)info.window_bytes;
    result->inputs_outputs = o->tokens * (o->hidden * 4 + o->topk * entry) +
                             rows * (bench_row_bytes(o) + o->hidden * 2 + o->topk * entry);
    TRY(ep_group_barrier(b->self->group)); /* all memory is in use now */
    bool whole_process = o->ranks_as == BENCH_RANKS_PROCESSES || b->self->rank == 0;
    result->resident_bytes = whole_process ? memory_peak_share() : 0;
    TRY(ep_group_barrier(b->self->group));
    ep_recv_release(&b->recv);
    return EP_OK;
}

/* Memory that only measuring needs: the ordinary copy of y and a second output. */
static ep_status alloc_ordinary(bench_rank *b)
{
    size_t y_bytes = (size_t)(b->num_rows * b->o->hidden) * sizeof *b->y;
    size_t out_bytes = (size_t)(b->o->tokens * b->o->hidden) * sizeof *b->out;
    b->y_ordinary = aligned_alloc(64, (y_bytes + 64) & ~(size_t)63);
    b->out_ordinary = aligned_alloc(64, (out_bytes + 64) & ~(size_t)63);
    if (!b->y_ordinary || !b->out_ordinary)
        return rank_fail(b->self, EP_ERR_MEMORY, "no memory for expert outputs");
    memcpy(b->y_ordinary, b->y, y_bytes);
    memset(b->out_ordinary, 0xff, out_bytes);
    return EP_OK;
}

/* Times one call. `iteration` is negative while warming up. */
#define TIMED(phase, call)                                                 \
    do {                                                                   \
        TRY(ep_group_barrier(b->self->group));                             \
        span span_ = {clock_ns(), 0};                                      \
        TRY(call);                                                         \
        span_.end_ns = clock_ns();                                         \
        if (iteration >= 0)                                                \
            *bench_span_at(b->c, phase, iteration, b->self->rank) = span_; \
    } while (0)

/* Earlier iterations left the right values where the last one writes; --check must not see those.
 */
static void spoil(bench_rank *b)
{
    size_t out_bytes = (size_t)(b->o->tokens * b->o->hidden) * sizeof *b->out;
    if (b->num_rows > 0)
        memset(b->recv.x.data, 0xff,
               (size_t)(b->num_rows * b->o->hidden) * ep_dtype_size(b->recv.x.dtype));
    memset(b->out, 0xff, out_bytes);
    memset(b->out_ordinary, 0xff, out_bytes);
}

static ep_status iterate(bench_rank *b, int64_t iteration, int32_t *counts, uint8_t *member)
{
    TIMED(BENCH_LAYOUT, layout(b, counts, member));
    TIMED(BENCH_DISPATCH_CACHED, dispatch(b, b->handle));
    if (iteration + 1 == b->o->iters)
        spoil(b);
    ep_recv_release(&b->recv);
    TIMED(BENCH_DISPATCH, dispatch(b, NULL));
    ep_handle_release(b->recv.handle);
    b->recv.handle = NULL;
    TIMED(BENCH_COMBINE, combine(b, b->y, b->out));
    TIMED(BENCH_COMBINE_ORDINARY, combine(b, b->y_ordinary, b->out_ordinary));
    if (iteration + 1 < b->o->iters)
        ep_recv_release(&b->recv);
    atomic_fetch_add_explicit(b->self->done, 1, memory_order_relaxed);
    return EP_OK;
}

static ep_status iterate_all(bench_rank *b)
{
    size_t counts_bytes = (size_t)(b->self->num_ranks + b->o->experts) * sizeof(int32_t);
    int32_t *counts = malloc(counts_bytes);
    uint8_t *member = malloc((size_t)(b->o->tokens * b->self->num_ranks) + 1);
    ep_status status = EP_OK;
    if (!counts || !member)
        status = rank_fail(b->self, EP_ERR_MEMORY, "no memory for the layout");
    for (int64_t i = -b->o->warmup; status == EP_OK && i < b->o->iters; i++)
        status = iterate(b, i, counts, member);
    free(counts);
    free(member);
    return status;
}

static void check(bench_rank *b)
{
    bench_rank_result *result = &b->c->results[b->self->rank];
    bool fp8 = b->o->wire == BENCH_WIRE_FP8;
    size_t out_bytes = (size_t)(b->o->tokens * b->o->hidden) * sizeof *b->out;
    result->checked = true;
    if (check_dispatch(&b->c->load, b->self->rank, fp8, &b->recv, result->wrong) &&
        check_combine(&b->c->load, b->self->rank, fp8, b->out, result->wrong) &&
        memcmp(b->out, b->out_ordinary, out_bytes) != 0)
        strcpy(result->wrong, "combine: differs when expert outputs lie in ordinary memory");
}

static ep_status measure(bench_rank *b)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.num_threads = (int32_t)b->o->threads;
    config.max_experts = (int32_t)b->o->experts;
    TRY(alloc_inputs(b));
    TRY(ep_buffer_create(b->self->group, &config, &b->buffer));
    TRY(first_round(b));
    TRY(alloc_ordinary(b));
    size_t copied = (size_t)(b->num_rows * bench_row_bytes(b->o));
    TRY(copy_limit_measure(b->self, b->c->copies, b->y, b->y_ordinary, copied));
    TRY(iterate_all(b));
    TRY(copy_limit_measure(b->self, b->c->copies + COPY_ROUNDS * b->self->num_ranks, b->y,
                           b->y_ordinary, copied));
    if (b->o->check)
        check(b);
    return EP_OK;
}

ep_status bench_normal_rank(rank_self *self)
{
    const bench_context *c = self->context;
    bench_rank b = {.self = self, .c = c, .o = c->options, .recv = EP_RECV_INIT};
    ep_status status = measure(&b);
    if (b.recv.owner)
        ep_recv_release(&b.recv);
    ep_handle_release(b.handle);
    if (b.buffer)
        ep_buffer_free(b.buffer, b.y);
    ep_buffer_destroy(b.buffer);
    free(b.ids);
    free(b.weights);
    free(b.x);
    free(b.out);
    free(b.y_ordinary);
    free(b.out_ordinary);
    return status;
}
