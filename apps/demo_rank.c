/* SPDX-License-Identifier: MIT */
/* What each rank of the demo does: the layer once per wire, then the exchanges again for time. */
#include "check.h"
#include "demo.h"

#include <stdlib.h>
#include <string.h>

#define TRY(call)                   \
    do {                            \
        ep_status status_ = (call); \
        if (status_ != EP_OK)       \
            return status_;         \
    } while (0)

typedef struct demo_state {
    rank_self *self;
    const demo_context *c;
    ep_buffer *buffer;
    ep_recv recv;
    int64_t tokens, num_rows;
    uint16_t *x, *out;
    int32_t *ids;
    float *weights;
    uint16_t *y;      /* expert outputs, in the window; set by the first dispatch */
    uint16_t *y_copy; /* the same in ordinary memory */
    demo_traditional *old;
    float e4m3[256]; /* value of each code */
} demo_state;

static ep_status no_memory(demo_state *d)
{
    return rank_fail(d->self, EP_ERR_MEMORY, "out of memory");
}

#define TIMED(phase, iteration, call)                                      \
    do {                                                                   \
        TRY(ep_group_barrier(d->self->group));                             \
        span *span_ = demo_span_at(d->c, phase, iteration, d->self->rank); \
        span_->start_ns = clock_ns();                                      \
        TRY(call);                                                         \
        span_->end_ns = clock_ns();                                        \
    } while (0)

/* ------------------------------------------------------------------ router */

static ep_status route(demo_state *d)
{
    const workload *w = &d->c->load;
    float *router = demo_router_create(w);
    float *values = malloc((size_t)d->tokens * DEMO_HIDDEN * sizeof *values);
    float *logits = malloc((size_t)(d->tokens * demo_padded_experts(w)) * sizeof *logits);
    ep_status status = router && values && logits ? EP_OK : no_memory(d);
    if (status == EP_OK)
        status = ep_group_barrier(d->self->group);
    span *s = demo_span_at(d->c, DEMO_ROUTER, 0, d->self->rank);
    s->start_ns = clock_ns();
    if (status == EP_OK)
        demo_route(w, router, d->x, d->tokens, values, logits, d->ids, d->weights);
    s->end_ns = clock_ns();
    free(router);
    free(values);
    free(logits);
    return status;
}

/* ---------------------------------------------------------------- exchange */

static ep_status dispatch(demo_state *d, int wire)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(d->x, EP_BF16, d->tokens, DEMO_HIDDEN);
    args.topk_idx = ep_tensor_2d(d->ids, EP_I32, d->tokens, DEMO_TOPK);
    args.topk_weights = ep_tensor_2d(d->weights, EP_F32, d->tokens, DEMO_TOPK);
    args.num_experts = d->c->load.num_experts;
    args.wire = wire == DEMO_WIRE_FP8 ? EP_WIRE_FP8 : EP_WIRE_INPUT;
    return ep_dispatch(d->buffer, &args, &d->recv, NULL);
}

static ep_status combine(demo_state *d, uint16_t *out)
{
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = ep_tensor_2d(d->y, EP_BF16, d->num_rows, DEMO_HIDDEN);
    args.handle = d->recv.handle;
    args.out = ep_tensor_2d(out, EP_BF16, d->tokens, DEMO_HIDDEN);
    return ep_combine(d->buffer, &args, NULL);
}

static void release(demo_state *d)
{
    ep_handle *handle = d->recv.handle;
    ep_recv_release(&d->recv);
    ep_handle_release(handle);
    d->recv.handle = NULL;
}

/* ----------------------------------------------------------------- experts */

/* Rows of one expert, gathered, and its outputs. */
typedef struct batch {
    demo_expert expert;
    int64_t n;
    int64_t *row; /* [num_rows] where each came from, and with which weight */
    float *weight;
    float *x, *y, *scratch;
    float *sum; /* [num_rows, DEMO_HIDDEN] of all experts of this rank */
} batch;

static void batch_free(batch *b)
{
    demo_expert_free(&b->expert);
    free(b->row);
    free(b->weight);
    free(b->x);
    free(b->y);
    free(b->scratch);
    free(b->sum);
}

static bool batch_alloc(batch *b, int64_t num_rows, int64_t largest)
{
    size_t rows = (size_t)num_rows + 1, most = (size_t)largest + 1;
    memset(b, 0, sizeof *b);
    b->row = malloc(most * sizeof *b->row);
    b->weight = malloc(most * sizeof *b->weight);
    b->x = malloc(most * DEMO_HIDDEN * sizeof *b->x);
    b->y = malloc(most * DEMO_HIDDEN * sizeof *b->y);
    b->scratch = malloc(most * 2 * DEMO_WIDTH * sizeof *b->scratch);
    b->sum = calloc(rows * DEMO_HIDDEN, sizeof *b->sum);
    return demo_expert_alloc(&b->expert) && b->row && b->weight && b->x && b->y && b->scratch &&
           b->sum;
}

/* One received row as float32. */
static void read_row(const demo_state *d, int64_t row, float *x)
{
    if (d->recv.x.dtype == EP_BF16) {
        const uint16_t *from = (const uint16_t *)d->recv.x.data + row * d->recv.x.stride[0];
        for (int h = 0; h < DEMO_HIDDEN; h++)
            x[h] = float_from_bf16(from[h]);
        return;
    }
    const uint8_t *from = (const uint8_t *)d->recv.x.data + row * d->recv.x.stride[0];
    const float *scales = (const float *)d->recv.scales.data + row * d->recv.scales.stride[0];
    for (int h = 0; h < DEMO_HIDDEN; h++)
        x[h] = d->e4m3[from[h]] * scales[h / 128 * d->recv.scales.stride[1]];
}

static void gather(const demo_state *d, int32_t expert, batch *b)
{
    const int32_t *ids = d->recv.topk_idx.data;
    const float *weights = d->recv.topk_weights.data;
    b->n = 0;
    for (int64_t i = 0; i < d->num_rows * DEMO_TOPK; i++) {
        if (ids[i] != expert)
            continue;
        b->row[b->n] = i / DEMO_TOPK;
        b->weight[b->n] = weights[i];
        read_row(d, b->row[b->n], b->x + b->n * DEMO_HIDDEN);
        b->n++;
    }
}

static void scatter(batch *b)
{
    for (int64_t i = 0; i < b->n; i++) {
        const float *y = b->y + i * DEMO_HIDDEN;
        float *sum = b->sum + b->row[i] * DEMO_HIDDEN;
        for (int h = 0; h < DEMO_HIDDEN; h++)
            sum[h] += b->weight[i] * y[h];
    }
}

/* All experts of this rank on the rows received; outputs go to the window. Making up weights is
   not timed: a model has them. */
static ep_status run_experts(demo_state *d, int wire)
{
    const int32_t *counts = d->recv.tokens_per_expert.data;
    int64_t local = d->c->load.num_experts / d->self->num_ranks, largest = 0, spent = 0;
    demo_rank_result *result = &d->c->results[d->self->rank];
    batch b;
    for (int64_t e = 0; e < local; e++)
        largest = counts[e] > largest ? counts[e] : largest;
    if (!batch_alloc(&b, d->num_rows, largest)) {
        batch_free(&b);
        return no_memory(d);
    }
    result->pairs = 0;
    for (int32_t e = 0; e < local; e++) {
        demo_expert_fill(&d->c->load, d->self->rank * local + e, &b.expert);
        int64_t start = clock_ns();
        gather(d, e, &b);
        demo_expert_apply(&b.expert, b.x, b.n, b.scratch, b.y);
        scatter(&b);
        spent += clock_ns() - start;
        result->pairs += b.n;
        atomic_fetch_add_explicit(d->self->done, 1, memory_order_relaxed);
    }
    int64_t start = clock_ns();
    for (int64_t i = 0; i < d->num_rows * DEMO_HIDDEN; i++)
        d->y[i] = bf16_from_float(b.sum[i]);
    spent += clock_ns() - start;
    *demo_span_at(d->c, DEMO_EXPERTS, wire, d->self->rank) = (span){0, spent};
    batch_free(&b);
    return EP_OK;
}

/* ------------------------------------------------------------------- order */

/* The layer, from routed tokens to outputs that the parent checks. */
static ep_status run_layer(demo_state *d, int wire)
{
    demo_rank_result *result = &d->c->results[d->self->rank];
    TRY(dispatch(d, wire));
    d->num_rows = d->recv.num_rows;
    const int32_t *offset = d->recv.source_offset.data;
    result->rows = d->num_rows;
    result->own_rows = offset[d->self->rank + 1] - offset[d->self->rank];
    size_t bytes = (size_t)d->num_rows * DEMO_ROW_BF16;
    if (!d->y)
        TRY(ep_buffer_alloc(d->buffer, bytes ? bytes : 1, (void **)&d->y));
    TRY(run_experts(d, wire));
    TRY(combine(d, d->out));
    memcpy(d->c->out[wire] + d->self->rank * d->tokens * DEMO_HIDDEN, d->out,
           (size_t)d->tokens * DEMO_ROW_BF16);
    return EP_OK;
}

/* The traditional path must do the same to be worth a comparison. */
static ep_status time_traditional(demo_state *d, int iteration)
{
    const uint16_t *rows = NULL;
    int64_t num_rows = 0;
    demo_rank_result *result = &d->c->results[d->self->rank];
    TIMED(DEMO_OLD_DISPATCH, iteration, demo_traditional_dispatch(d->old, d->x, &rows, &num_rows));
    result->old_agrees = num_rows == d->num_rows &&
                         memcmp(rows, d->recv.x.data, (size_t)num_rows * DEMO_ROW_BF16) == 0;
    TIMED(DEMO_OLD_COMBINE, iteration, demo_traditional_combine(d->old, d->y, d->out));
    return EP_OK;
}

static ep_status time_exchanges(demo_state *d)
{
    size_t bytes = (size_t)d->num_rows * DEMO_ROW_BF16;
    uint16_t *out = d->c->out[DEMO_WIRE_BF16] + d->self->rank * d->tokens * DEMO_HIDDEN;
    for (int i = 0; i < DEMO_ITERATIONS; i++) {
        TIMED(DEMO_DISPATCH_FP8, i, dispatch(d, DEMO_WIRE_FP8));
        release(d);
        TIMED(DEMO_DISPATCH, i, dispatch(d, DEMO_WIRE_BF16));
        TIMED(DEMO_COMBINE, i, combine(d, out));
        TRY(time_traditional(d, i));
        release(d);
        atomic_fetch_add_explicit(d->self->done, 1, memory_order_relaxed);
    }
    d->c->results[d->self->rank].old_agrees &=
        memcmp(out, d->out, (size_t)d->tokens * DEMO_ROW_BF16) == 0;
    memcpy(d->y_copy, d->y, bytes);
    return copy_limit_measure(d->self, d->c->copies, d->y, d->y_copy, bytes);
}

static ep_status run(demo_state *d)
{
    size_t entries = (size_t)d->tokens * DEMO_TOPK;
    d->x = malloc((size_t)d->tokens * DEMO_ROW_BF16);
    d->out = malloc((size_t)d->tokens * DEMO_ROW_BF16);
    d->ids = malloc(entries * sizeof *d->ids);
    d->weights = malloc(entries * sizeof *d->weights);
    if (!d->x || !d->out || !d->ids || !d->weights)
        return no_memory(d);
    for (int64_t t = 0; t < d->tokens; t++)
        workload_row(&d->c->load, d->self->rank, t, d->x + t * DEMO_HIDDEN);
    TRY(ep_buffer_create(d->self->group, NULL, &d->buffer));
    TRY(route(d));
    TRY(run_layer(d, DEMO_WIRE_FP8));
    release(d);
    TRY(run_layer(d, DEMO_WIRE_BF16));
    release(d);
    d->old = demo_traditional_create(d->self, d->ids);
    d->y_copy = malloc((size_t)d->num_rows * DEMO_ROW_BF16 + 1);
    if (!d->old || !d->y_copy)
        return no_memory(d);
    TRY(ep_group_barrier(d->self->group)); /* all counts of the traditional path are there */
    return time_exchanges(d);
}

ep_status demo_rank(rank_self *self)
{
    const demo_context *c = self->context;
    demo_state d = {.self = self, .c = c, .recv = EP_RECV_INIT, .tokens = c->options->tokens};
    for (int code = 0; code < 256; code++)
        d.e4m3[code] = (float)check_e4m3_value((uint8_t)code);
    ep_status status = run(&d);
    if (d.recv.owner)
        release(&d);
    if (d.y)
        ep_buffer_free(d.buffer, d.y);
    ep_buffer_destroy(d.buffer);
    demo_traditional_free(d.old);
    free(d.x);
    free(d.out);
    free(d.ids);
    free(d.weights);
    free(d.y_copy);
    return status;
}
