/* SPDX-License-Identifier: MIT */
/* The low-latency mode of `bench ep --backend cuda`: rounds of dispatch and combine, captured in a
   graph and not. */
#include "bench_rank.h"
#include "check_ll.h"
#include "gpu.h"

#include <stdlib.h>
#include <string.h>

typedef struct cuda_ll {
    bench_rank base;
    gpu gpu;
    int32_t *ids;
    float *weights;
    uint16_t *x, *out, *out_ordinary, *y_ordinary;
    ep_ll_recv recv;
} cuda_ll;

static ep_status dispatch(cuda_ll *c)
{
    const bench_options *o = c->base.o;
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    ep_ll_recv init = EP_LL_RECV_INIT;
    c->recv = init;
    args.x = gpu_tensor(&c->gpu, c->x, EP_BF16, o->tokens, o->hidden);
    args.topk_idx = gpu_tensor(&c->gpu, c->ids, EP_I32, o->tokens, o->topk);
    args.max_tokens = o->tokens > 0 ? o->tokens : 1;
    args.num_experts = c->base.c->load.num_experts;
    args.wire = o->wire == BENCH_WIRE_FP8 ? EP_E4M3 : EP_BF16;
    args.stream = c->gpu.stream;
    args.num_sms = (int32_t)o->sms;
    return ep_ll_dispatch(c->base.buffer, &args, &c->recv, NULL);
}

static ep_status combine(cuda_ll *c, ep_tensor y, uint16_t *out)
{
    const bench_options *o = c->base.o;
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    args.y = y;
    args.topk_idx = gpu_tensor(&c->gpu, c->ids, EP_I32, o->tokens, o->topk);
    args.topk_weights = gpu_tensor(&c->gpu, c->weights, EP_F32, o->tokens, o->topk);
    args.handle = c->recv.handle;
    args.out = gpu_tensor(&c->gpu, out, EP_BF16, o->tokens, o->hidden);
    args.stream = c->gpu.stream;
    args.num_sms = (int32_t)o->sms;
    return ep_ll_combine(c->base.buffer, &args, NULL);
}

static void drop(cuda_ll *c)
{
    ep_ll_recv_release(&c->recv);
}

/* ---------------------------------------------------------------- experts */

/* What the experts give, computed here from rows read back, into this result's send buffer. */
static ep_status run_experts(cuda_ll *c)
{
    const bench_rank *b = &c->base;
    ep_ll_recv host = c->recv;
    ep_tensor y;
    BENCH_TRY(ep_ll_combine_buffer(b->buffer, c->recv.handle, &y));
    size_t bytes = (size_t)(y.shape[0] * y.stride[0]) * 2;
    ep_tensor *tensors[] = {
        &host.x, &host.scales, &host.count, &host.source_token, &host.source_range, &host.dropped};
    uint16_t *outputs = calloc(bytes / 2 + 1, 2);
    bool read = outputs != NULL;
    for (int i = 0; i < 6; i++)
        read = gpu_to_host(&c->gpu, tensors[i]) && read;
    if (read && b->o->check && !b->result->wrong[0])
        check_ll_dispatch(&b->c->load, b->self->rank, b->o->wire == BENCH_WIRE_FP8, &host,
                          b->result->wrong);
    ep_tensor to = y;
    to.data = outputs;
    if (read) {
        const int32_t *counts = host.count.data;
        b->result->recv_tokens = 0;
        for (int64_t e = 0; e < y.shape[0]; e++)
            b->result->recv_tokens += counts[e];
        bench_ll_experts(b, &host, &to);
    }
    for (int i = 0; i < 6; i++)
        free(tensors[i]->data);
    ep_status status = read ? gpu_write(&c->gpu, y.data, outputs, bytes)
                            : rank_fail(b->self, EP_ERR_MEMORY, "no memory for expert outputs");
    if (status == EP_OK && !c->y_ordinary)
        status = gpu_new(&c->gpu, outputs, bytes, (void **)&c->y_ordinary);
    free(outputs);
    return status;
}

/* ---------------------------------------------------------------- measurement */

static ep_status round_in_window(cuda_ll *c, int mark)
{
    ep_tensor y;
    BENCH_TRY(gpu_mark(&c->gpu, mark));
    BENCH_TRY(dispatch(c));
    BENCH_TRY(gpu_mark(&c->gpu, mark + 1));
    BENCH_TRY(ep_ll_combine_buffer(c->base.buffer, c->recv.handle, &y));
    BENCH_TRY(combine(c, y, c->out));
    BENCH_TRY(gpu_mark(&c->gpu, mark + 2));
    drop(c);
    return EP_OK;
}

static ep_status round_ordinary(cuda_ll *c, int mark)
{
    ep_tensor y;
    BENCH_TRY(dispatch(c));
    BENCH_TRY(ep_ll_combine_buffer(c->base.buffer, c->recv.handle, &y));
    y.data = c->y_ordinary;
    BENCH_TRY(gpu_mark(&c->gpu, mark));
    BENCH_TRY(combine(c, y, c->out_ordinary));
    BENCH_TRY(gpu_mark(&c->gpu, mark + 1));
    drop(c);
    return EP_OK;
}

static ep_status note(cuda_ll *c, bench_phase phase, int from, int to)
{
    double us;
    BENCH_TRY(gpu_between(&c->gpu, from, to, &us));
    bench_rank_note(&c->base, phase, (span){0, (int64_t)(us * 1e3)});
    return EP_OK;
}

static ep_status time_rounds(cuda_ll *c)
{
    bench_rank *b = &c->base;
    const bench_options *o = b->o;
    for (int64_t i = 0; i < o->warmup; i++)
        BENCH_TRY(round_in_window(c, 0));
    BENCH_TRY(ep_group_barrier(b->self->group));
    for (int64_t i = 0; i < o->iters; i++)
        BENCH_TRY(round_in_window(c, (int)(3 * i)));
    BENCH_TRY(gpu_wait(&c->gpu));
    for (b->iteration = 0; b->iteration < o->iters; b->iteration++) {
        int at = (int)(3 * b->iteration);
        BENCH_TRY(note(c, BENCH_DISPATCH, at, at + 1));
        BENCH_TRY(note(c, BENCH_COMBINE, at + 1, at + 2));
    }
    for (int64_t i = 0; i < o->warmup + 2; i++)
        BENCH_TRY(round_ordinary(c, 0));
    BENCH_TRY(ep_group_barrier(b->self->group));
    for (int64_t i = 0; i < o->iters; i++)
        BENCH_TRY(round_ordinary(c, (int)(2 * i)));
    BENCH_TRY(gpu_wait(&c->gpu));
    for (b->iteration = 0; b->iteration < o->iters; b->iteration++)
        BENCH_TRY(
            note(c, BENCH_COMBINE_ORDINARY, (int)(2 * b->iteration), (int)(2 * b->iteration) + 1));
    return EP_OK;
}

#define ROUNDS 4 /* in a graph */

/* Whole rounds, launched as graphs: what a decoder that captures its layers sees. */
static ep_status time_graph(cuda_ll *c)
{
    bench_rank *b = &c->base;
    void *graph = NULL;
    int index = c->gpu.index;
    BENCH_TRY(ep_graph_begin(EP_DEVICE_CUDA, index, c->gpu.stream));
    ep_status status = EP_OK;
    for (int i = 0; i < ROUNDS && status == EP_OK; i++) {
        ep_tensor y;
        status = dispatch(c);
        if (status == EP_OK)
            status = ep_ll_combine_buffer(b->buffer, c->recv.handle, &y);
        if (status == EP_OK)
            status = combine(c, y, c->out);
        drop(c);
    }
    ep_status ended = ep_graph_end(EP_DEVICE_CUDA, index, c->gpu.stream, &graph);
    if (status != EP_OK || ended != EP_OK)
        return status != EP_OK ? status : ended;
    BENCH_TRY(ep_graph_launch(EP_DEVICE_CUDA, index, graph, c->gpu.stream));
    BENCH_TRY(gpu_wait(&c->gpu));
    BENCH_TRY(ep_group_barrier(b->self->group));
    for (int64_t i = 0; i < b->o->iters; i++) {
        BENCH_TRY(gpu_mark(&c->gpu, (int)i));
        BENCH_TRY(ep_graph_launch(EP_DEVICE_CUDA, index, graph, c->gpu.stream));
    }
    BENCH_TRY(gpu_mark(&c->gpu, (int)b->o->iters));
    BENCH_TRY(gpu_wait(&c->gpu));
    for (b->iteration = 0; b->iteration < b->o->iters; b->iteration++) {
        double us;
        BENCH_TRY(gpu_between(&c->gpu, (int)b->iteration, (int)b->iteration + 1, &us));
        bench_rank_note(b, BENCH_GRAPH_ROUND, (span){0, (int64_t)(us * 1e3 / ROUNDS)});
    }
    return ep_graph_destroy(EP_DEVICE_CUDA, index, graph);
}

/* Expert outputs must lie in both results' send buffers: rounds use them in turn. */
static ep_status fill_both(cuda_ll *c)
{
    for (int i = 0; i < 2; i++) {
        ep_tensor y;
        BENCH_TRY(dispatch(c));
        BENCH_TRY(gpu_wait(&c->gpu));
        BENCH_TRY(run_experts(c));
        BENCH_TRY(ep_ll_combine_buffer(c->base.buffer, c->recv.handle, &y));
        BENCH_TRY(combine(c, y, c->out));
        BENCH_TRY(gpu_wait(&c->gpu));
        drop(c);
    }
    return EP_OK;
}

static void check(cuda_ll *c)
{
    bench_rank *b = &c->base;
    size_t bytes = bench_out_bytes(b->o);
    uint16_t *out = gpu_read(&c->gpu, c->out, bytes),
             *ordinary = gpu_read(&c->gpu, c->out_ordinary, bytes);
    if (!out || !ordinary)
        strcpy(b->result->wrong, "combine: its outputs could not be read");
    else if (!b->result->wrong[0] &&
             check_ll_combine(&b->c->load, b->self->rank, b->o->wire == BENCH_WIRE_FP8, out,
                              b->result->wrong) &&
             memcmp(out, ordinary, bytes) != 0)
        strcpy(b->result->wrong, "combine: differs when expert outputs lie in ordinary memory");
    free(out);
    free(ordinary);
}

static ep_status upload_inputs(cuda_ll *c)
{
    const bench_rank *b = &c->base;
    size_t entries = (size_t)(b->o->tokens * b->o->topk);
    BENCH_TRY(gpu_new(&c->gpu, b->x, bench_out_bytes(b->o), (void **)&c->x));
    BENCH_TRY(gpu_new(&c->gpu, b->ids, entries * 4, (void **)&c->ids));
    BENCH_TRY(gpu_new(&c->gpu, b->weights, entries * 4, (void **)&c->weights));
    BENCH_TRY(gpu_new(&c->gpu, NULL, bench_out_bytes(b->o), (void **)&c->out));
    return gpu_new(&c->gpu, NULL, bench_out_bytes(b->o), (void **)&c->out_ordinary);
}

static ep_status measure(cuda_ll *c)
{
    BENCH_TRY(upload_inputs(c));
    BENCH_TRY(fill_both(c));
    BENCH_TRY(bench_rank_note_memory(&c->base, 0));
    BENCH_TRY(time_rounds(c));
    if (c->base.o->check)
        check(c);
    return time_graph(c);
}

ep_status bench_cuda_ll_rank(rank_self *self)
{
    cuda_ll *c = calloc(1, sizeof *c);
    if (!c)
        return rank_fail(self, EP_ERR_MEMORY, "no memory");
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.device = EP_DEVICE_CUDA;
    ep_status status = gpu_open(&c->gpu, self->rank);
    config.device_index = c->gpu.index;
    if (status == EP_OK)
        status = bench_rank_open_on(self, &config, &c->base);
    if (status == EP_OK)
        status = measure(c);
    if (c->recv.owner)
        drop(c);
    bench_rank_close(&c->base);
    void *memory[] = {c->x, c->ids, c->weights, c->out, c->out_ordinary, c->y_ordinary};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        gpu_free(&c->gpu, memory[i]);
    gpu_close(&c->gpu);
    free(c);
    return status;
}
