/* SPDX-License-Identifier: MIT */
/* What each rank of `bench ep --mode ll` does. */
#include "bench_rank.h"
#include "check_ll.h"

#include "entrepot/low_latency.h"

#include <stdlib.h>
#include <string.h>

typedef struct ll_rank {
    bench_rank base;
    ep_ll_recv recv;      /* of the last dispatch */
    uint16_t *y_ordinary; /* [L, S, hidden] expert outputs in ordinary memory */
    void *copy;           /* as many bytes as are received, for the copy limit; twice */
    size_t copied;
} ll_rank;

static int64_t max_tokens(const bench_options *o)
{
    return o->tokens > 0 ? o->tokens : 1;
}

/* Blocks when `event` is NULL; else it only sends, and the event is the hook that receives. */
static ep_status dispatch(ll_rank *l, ep_event **event)
{
    const bench_rank *b = &l->base;
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(b->x, EP_BF16, b->o->tokens, b->o->hidden);
    args.topk_idx = ep_tensor_2d(b->ids, EP_I32, b->o->tokens, b->o->topk);
    args.max_tokens = max_tokens(b->o);
    args.num_experts = b->c->load.num_experts;
    args.wire = b->o->wire == BENCH_WIRE_FP8 ? EP_E4M3 : EP_BF16;
    args.completion = EP_COMPLETE_BY_HOOK;
    return ep_ll_dispatch(b->buffer, &args, &l->recv, event);
}

static ep_status combine(ll_rank *l, ep_tensor y, uint16_t *out, ep_event **event)
{
    const bench_rank *b = &l->base;
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    args.y = y;
    args.topk_idx = ep_tensor_2d(b->ids, EP_I32, b->o->tokens, b->o->topk);
    args.topk_weights = ep_tensor_2d(b->weights, EP_F32, b->o->tokens, b->o->topk);
    args.handle = l->recv.handle;
    args.out = ep_tensor_2d(out, EP_BF16, b->o->tokens, b->o->hidden);
    args.completion = EP_COMPLETE_BY_HOOK;
    return ep_ll_combine(b->buffer, &args, event);
}

static ep_status finish(ep_event **event)
{
    ep_status status = ep_event_wait(*event);
    ep_event_release(*event);
    *event = NULL;
    return status;
}

/* ---------------------------------------------------------------- experts */

/* Outputs where the caller has them: the tensor of the first result, in ordinary memory. */
static ep_tensor ordinary(const ll_rank *l, const ep_tensor *like)
{
    ep_tensor y = *like;
    y.data = l->y_ordinary;
    return y;
}

/* The stand-in for an expert, as check_ll.h describes it. */
static void expert_row(const bench_rank *b, const ep_ll_recv *recv, const float *e4m3,
                       int64_t expert, int64_t row, uint16_t *y)
{
    const bench_options *o = b->o;
    const ep_tensor *x = &recv->x, *scales = &recv->scales;
    int64_t local = b->c->load.num_experts / o->ranks,
            at = expert * x->stride[0] + row * x->stride[1];
    float factor = check_ll_factor(b->self->rank * local + expert);
    for (int64_t h = 0; h < o->hidden; h++) {
        float value;
        if (o->wire == BENCH_WIRE_FP8)
            value =
                e4m3[((const uint8_t *)x->data)[at + h]] *
                ((const float *)scales->data)[expert * scales->stride[0] + row * scales->stride[1] +
                                              h / 128 * scales->stride[2]];
        else
            value = float_from_bf16(((const uint16_t *)x->data)[at + h]);
        y[h] = bf16_from_float(factor * value);
    }
}

void bench_ll_experts(const bench_rank *b, const ep_ll_recv *recv, const ep_tensor *y)
{
    float e4m3[256];
    const int32_t *counts = recv->count.data;
    for (int code = 0; code < 256; code++)
        e4m3[code] = (float)check_e4m3_value((uint8_t)code);
    for (int64_t e = 0; e < y->shape[0]; e++) {
        for (int64_t row = 0; row < counts[e]; row++)
            expert_row(b, recv, e4m3, e, row,
                       (uint16_t *)y->data + e * y->stride[0] + row * y->stride[1]);
    }
}

/* Outputs go to the send buffer of the present result, which is another one every time. Not before
   every rank has what it received: where ranks share cores this would run in their time. */
static ep_status place_outputs(ll_rank *l, ep_tensor *y)
{
    const bench_options *o = l->base.o;
    const int32_t *counts = l->recv.count.data;
    BENCH_TRY(ep_group_barrier(l->base.self->group));
    BENCH_TRY(ep_ll_combine_buffer(l->base.buffer, l->recv.handle, y));
    for (int64_t e = 0; e < y->shape[0]; e++) {
        for (int64_t row = 0; row < counts[e]; row++) {
            int64_t at = e * y->stride[0] + row * y->stride[1];
            memcpy((uint16_t *)y->data + at, l->y_ordinary + at, (size_t)o->hidden * 2);
        }
    }
    return EP_OK;
}

/* ------------------------------------------------------------ measurement */

static int64_t count_rows(const ll_rank *l)
{
    const int32_t *counts = l->recv.count.data;
    int64_t rows = 0;
    for (int64_t e = 0; e < l->recv.count.shape[0]; e++)
        rows += counts[e];
    return rows;
}

/* One untimed round that sets up what later ones reuse. */
static ep_status first_round(ll_rank *l)
{
    bench_rank *b = &l->base;
    const bench_options *o = b->o;
    ep_tensor y;
    BENCH_TRY(dispatch(l, NULL));
    int64_t rows = count_rows(l);
    b->result->recv_tokens = b->result->pairs = rows;
    BENCH_TRY(ep_ll_combine_buffer(b->buffer, l->recv.handle, &y));
    bench_ll_experts(b, &l->recv, &y);
    BENCH_TRY(combine(l, y, b->out, NULL));
    BENCH_TRY(bench_rank_note_memory(b, o->tokens * (o->hidden * 4 + o->topk * 8) +
                                            rows * (bench_row_bytes(o) + o->hidden * 2 + 4)));
    l->copied = (size_t)(rows * bench_row_bytes(o));
    l->copy = bench_alloc(2 * l->copied);
    l->y_ordinary = bench_alloc((size_t)(y.shape[0] * y.stride[0]) * sizeof *l->y_ordinary);
    b->out_ordinary = bench_alloc(bench_out_bytes(o));
    if (!l->copy || !l->y_ordinary || !b->out_ordinary)
        return rank_fail(b->self, EP_ERR_MEMORY, "no memory for expert outputs");
    memset(l->copy, 1, 2 * l->copied);
    bench_rank_spoil_outputs(b);
    y = ordinary(l, &y);
    bench_ll_experts(b, &l->recv, &y);
    ep_ll_recv_release(&l->recv);
    return EP_OK;
}

/* Sending and receiving apart, as a model does that computes in between. */
static ep_status iterate_hooks(ll_rank *l)
{
    bench_rank *b = &l->base;
    ep_event *event = NULL;
    ep_tensor y;
    BENCH_TIMED(BENCH_HOOK_SEND, dispatch(l, &event));
    BENCH_TIMED_ON(BENCH_HOOK_RECV, finish(&event));
    BENCH_TRY(place_outputs(l, &y));
    BENCH_TIMED(BENCH_COMBINE_HOOK_SEND, combine(l, y, b->out, &event));
    BENCH_TIMED_ON(BENCH_COMBINE_HOOK_RECV, finish(&event));
    ep_ll_recv_release(&l->recv);
    return EP_OK;
}

/* The bare notification there and back: nothing but two rounds of every rank telling every other.
 */
static ep_status round_trip(bench_rank *b)
{
    BENCH_TRY(ep_group_barrier(b->self->group));
    return ep_group_barrier(b->self->group);
}

static ep_status iterate(ll_rank *l)
{
    bench_rank *b = &l->base;
    bool last = b->iteration + 1 == b->o->iters;
    ep_tensor y;
    BENCH_TRY(bench_rank_layout(b));
    BENCH_TIMED(BENCH_ROUND_TRIP, round_trip(b));
    BENCH_TRY(iterate_hooks(l));
    if (last)
        bench_rank_spoil_outputs(b);
    BENCH_TIMED(BENCH_DISPATCH, dispatch(l, NULL));
    BENCH_TRY(place_outputs(l, &y));
    BENCH_TIMED(BENCH_COMBINE, combine(l, y, b->out, NULL));
    BENCH_TIMED(BENCH_COMBINE_ORDINARY, combine(l, ordinary(l, &y), b->out_ordinary, NULL));
    if (!last)
        ep_ll_recv_release(&l->recv);
    atomic_fetch_add_explicit(b->self->done, 1, memory_order_relaxed);
    return EP_OK;
}

static void check(ll_rank *l)
{
    bench_rank *b = &l->base;
    bool fp8 = b->o->wire == BENCH_WIRE_FP8;
    if (check_ll_dispatch(&b->c->load, b->self->rank, fp8, &l->recv, b->result->wrong) &&
        check_ll_combine(&b->c->load, b->self->rank, fp8, b->out, b->result->wrong) &&
        memcmp(b->out, b->out_ordinary, bench_out_bytes(b->o)) != 0)
        strcpy(b->result->wrong, "combine: differs when expert outputs lie in ordinary memory");
}

static ep_status measure(ll_rank *l)
{
    bench_rank *b = &l->base;
    copy_round *copies = b->c->copies;
    BENCH_TRY(first_round(l));
    char *other = (char *)l->copy + l->copied;
    BENCH_TRY(copy_limit_measure(b->self, copies, l->copy, other, l->copied));
    for (b->iteration = -b->o->warmup; b->iteration < b->o->iters; b->iteration++)
        BENCH_TRY(iterate(l));
    copies += COPY_ROUNDS * b->self->num_ranks;
    BENCH_TRY(copy_limit_measure(b->self, copies, l->copy, other, l->copied));
    if (b->o->check)
        check(l);
    return EP_OK;
}

ep_status bench_ll_rank(rank_self *self)
{
    ll_rank l = {.recv = EP_LL_RECV_INIT};
    ep_status status = bench_rank_open(self, &l.base);
    if (status == EP_OK)
        status = measure(&l);
    if (l.recv.owner)
        ep_ll_recv_release(&l.recv);
    bench_rank_close(&l.base);
    free(l.y_ordinary);
    free(l.copy);
    return status;
}
