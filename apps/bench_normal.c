/* SPDX-License-Identifier: MIT */
/* What each rank of `bench ep --mode normal` does. */
#include "bench_rank.h"
#include "check.h"

#include <stdlib.h>
#include <string.h>

typedef struct normal_rank {
    bench_rank base;
    ep_handle *handle;    /* of the first dispatch, for cached ones and combine */
    ep_recv recv;         /* of the last dispatch */
    uint16_t *y;          /* expert outputs in the window */
    uint16_t *y_ordinary; /* a copy of them in ordinary memory */
    int64_t num_rows;
} normal_rank;

static ep_status dispatch(normal_rank *n, ep_handle *cached)
{
    const bench_rank *b = &n->base;
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(b->x, EP_BF16, b->o->tokens, b->o->hidden);
    args.wire = b->o->wire == BENCH_WIRE_FP8 ? EP_WIRE_FP8 : EP_WIRE_INPUT;
    args.handle = cached;
    if (!cached) {
        args.topk_idx = ep_tensor_2d(b->ids, EP_I32, b->o->tokens, b->o->topk);
        args.topk_weights = ep_tensor_2d(b->weights, EP_F32, b->o->tokens, b->o->topk);
        args.num_experts = b->c->load.num_experts;
    }
    return ep_dispatch(b->buffer, &args, &n->recv, NULL);
}

static ep_status combine(normal_rank *n, uint16_t *y, uint16_t *out)
{
    const bench_options *o = n->base.o;
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = ep_tensor_2d(y, EP_BF16, n->num_rows, o->hidden);
    args.handle = n->handle;
    args.out = ep_tensor_2d(out, EP_BF16, o->tokens, o->hidden);
    return ep_combine(n->base.buffer, &args, NULL);
}

/* ---------------------------------------------------------------- experts */

static void expert_row(const bench_options *o, const ep_recv *recv, const float *e4m3, int64_t row,
                       uint16_t *y)
{
    const float *weights = (const float *)recv->topk_weights.data + row * o->topk;
    const uint16_t *x = (const uint16_t *)recv->x.data + row * o->hidden;
    const uint8_t *codes = (const uint8_t *)recv->x.data + row * o->hidden;
    const float *scales = (const float *)recv->scales.data + row * recv->scales.stride[0];
    float weight = 0;
    for (int64_t k = 0; k < o->topk; k++)
        weight += weights[k];
    for (int64_t h = 0; h < o->hidden; h++) {
        float value = o->wire == BENCH_WIRE_FP8
                          ? e4m3[codes[h]] * scales[h / 128 * recv->scales.stride[1]]
                          : float_from_bf16(x[h]);
        y[h] = bf16_from_float(weight * value);
    }
}

void bench_expert_rows(const bench_options *o, const ep_recv *recv, int64_t rows, uint16_t *y)
{
    float e4m3[256];
    for (int code = 0; code < 256; code++)
        e4m3[code] = (float)check_e4m3_value((uint8_t)code);
    for (int64_t row = 0; row < rows; row++)
        expert_row(o, recv, e4m3, row, y + row * o->hidden);
}

/* ------------------------------------------------------------ measurement */

/* One untimed round that sets up what later ones reuse. */
static ep_status first_round(normal_rank *n)
{
    bench_rank *b = &n->base;
    const bench_options *o = b->o;
    BENCH_TRY(dispatch(n, NULL));
    n->handle = n->recv.handle;
    n->num_rows = n->recv.num_rows;
    b->result->recv_tokens = n->num_rows;
    const int32_t *counts = n->recv.tokens_per_expert.data;
    for (int64_t e = 0; e < n->recv.tokens_per_expert.shape[0]; e++)
        b->result->pairs += counts[e];
    size_t bytes = (size_t)(n->num_rows * o->hidden) * sizeof *n->y;
    BENCH_TRY(ep_buffer_alloc(b->buffer, bytes ? bytes : 1, (void **)&n->y));
    bench_expert_rows(o, &n->recv, n->num_rows, n->y);
    BENCH_TRY(combine(n, n->y, b->out));
    int64_t routing = o->topk * 8;
    BENCH_TRY(bench_rank_note_memory(b, o->tokens * (o->hidden * 4 + routing) +
                                            n->num_rows *
                                                (bench_row_bytes(o) + o->hidden * 2 + routing)));
    ep_recv_release(&n->recv);
    return EP_OK;
}

/* Memory that only measuring needs: the ordinary copy of y and a second output. */
static ep_status alloc_ordinary(normal_rank *n)
{
    bench_rank *b = &n->base;
    size_t bytes = (size_t)(n->num_rows * b->o->hidden) * sizeof *n->y;
    n->y_ordinary = bench_alloc(bytes);
    b->out_ordinary = bench_alloc(bench_out_bytes(b->o));
    if (!n->y_ordinary || !b->out_ordinary)
        return rank_fail(b->self, EP_ERR_MEMORY, "no memory for expert outputs");
    memcpy(n->y_ordinary, n->y, bytes);
    bench_rank_spoil_outputs(b);
    return EP_OK;
}

static void spoil(normal_rank *n)
{
    size_t row = (size_t)n->base.o->hidden * ep_dtype_size(n->recv.x.dtype);
    if (n->num_rows > 0)
        memset(n->recv.x.data, 0xff, (size_t)n->num_rows * row);
    bench_rank_spoil_outputs(&n->base);
}

static ep_status iterate(normal_rank *n)
{
    bench_rank *b = &n->base;
    bool last = b->iteration + 1 == b->o->iters;
    BENCH_TRY(bench_rank_layout(b));
    BENCH_TIMED(BENCH_DISPATCH_CACHED, dispatch(n, n->handle));
    if (last)
        spoil(n);
    ep_recv_release(&n->recv);
    BENCH_TIMED(BENCH_DISPATCH, dispatch(n, NULL));
    ep_handle_release(n->recv.handle);
    n->recv.handle = NULL;
    BENCH_TIMED(BENCH_COMBINE, combine(n, n->y, b->out));
    BENCH_TIMED(BENCH_COMBINE_ORDINARY, combine(n, n->y_ordinary, b->out_ordinary));
    if (!last)
        ep_recv_release(&n->recv);
    atomic_fetch_add_explicit(b->self->done, 1, memory_order_relaxed);
    return EP_OK;
}

static void check(normal_rank *n)
{
    bench_rank *b = &n->base;
    bool fp8 = b->o->wire == BENCH_WIRE_FP8;
    if (check_dispatch(&b->c->load, b->self->rank, fp8, &n->recv, b->result->wrong) &&
        check_combine(&b->c->load, b->self->rank, fp8, b->out, b->result->wrong) &&
        memcmp(b->out, b->out_ordinary, bench_out_bytes(b->o)) != 0)
        strcpy(b->result->wrong, "combine: differs when expert outputs lie in ordinary memory");
}

static ep_status measure(normal_rank *n)
{
    bench_rank *b = &n->base;
    BENCH_TRY(first_round(n));
    BENCH_TRY(alloc_ordinary(n));
    size_t copied = (size_t)(n->num_rows * bench_row_bytes(b->o));
    copy_round *copies = b->c->copies;
    BENCH_TRY(copy_limit_measure(b->self, copies, n->y, n->y_ordinary, copied));
    for (b->iteration = -b->o->warmup; b->iteration < b->o->iters; b->iteration++)
        BENCH_TRY(iterate(n));
    copies += COPY_ROUNDS * b->self->num_ranks;
    BENCH_TRY(copy_limit_measure(b->self, copies, n->y, n->y_ordinary, copied));
    if (b->o->check)
        check(n);
    return EP_OK;
}

ep_status bench_normal_rank(rank_self *self)
{
    normal_rank n = {.recv = EP_RECV_INIT};
    ep_status status = bench_rank_open(self, &n.base);
    if (status == EP_OK)
        status = measure(&n);
    if (n.recv.owner)
        ep_recv_release(&n.recv);
    ep_handle_release(n.handle);
    if (n.base.buffer)
        ep_buffer_free(n.base.buffer, n.y);
    bench_rank_close(&n.base);
    free(n.y_ordinary);
    return status;
}
