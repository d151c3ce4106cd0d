/* SPDX-License-Identifier: MIT */
/*
 * What each rank of `bench ep --backend cuda` does. Calls of one kind are put
 * into the stream one behind the other after a barrier, each between two marks:
 * a call's time is the time between them, with everything it waits for.
 */
#include "bench_rank.h"
#include "check.h"
#include "gpu.h"

#include <stdlib.h>
#include <string.h>

typedef struct cuda_rank {
    bench_rank base;
    gpu gpu;
    int32_t *ids;
    float *weights;
    uint16_t *x, *out, *out_ordinary;
    uint8_t *codes; /* x quantised beforehand, with its scales */
    float *scales;
    ep_handle *handle;
    uint16_t *y, *y_ordinary; /* expert outputs in the window, and elsewhere */
    int64_t num_rows;
} cuda_rank;

typedef ep_status (*call_fn)(cuda_rank *c, ep_recv *recv);

static ep_dispatch_args dispatch_args(const cuda_rank *c)
{
    const bench_options *o = c->base.o;
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = gpu_tensor(&c->gpu, c->x, EP_BF16, o->tokens, o->hidden);
    args.wire = o->wire == BENCH_WIRE_FP8 ? EP_WIRE_FP8 : EP_WIRE_INPUT;
    args.topk_idx = gpu_tensor(&c->gpu, c->ids, EP_I32, o->tokens, o->topk);
    args.topk_weights = gpu_tensor(&c->gpu, c->weights, EP_F32, o->tokens, o->topk);
    args.num_experts = c->base.c->load.num_experts;
    args.stream = c->gpu.stream;
    args.num_sms = (int32_t)o->sms;
    return args;
}

static ep_status dispatch(cuda_rank *c, ep_recv *recv)
{
    ep_dispatch_args args = dispatch_args(c);
    return ep_dispatch(c->base.buffer, &args, recv, NULL);
}

static ep_status dispatch_given(cuda_rank *c, ep_recv *recv)
{
    const bench_options *o = c->base.o;
    ep_dispatch_args args = dispatch_args(c);
    args.wire = EP_WIRE_INPUT;
    args.x = gpu_tensor(&c->gpu, c->codes, EP_E4M3, o->tokens, o->hidden);
    args.scales = gpu_tensor(&c->gpu, c->scales, EP_F32, o->tokens, (o->hidden + 127) / 128);
    return ep_dispatch(c->base.buffer, &args, recv, NULL);
}

static ep_status dispatch_cached(cuda_rank *c, ep_recv *recv)
{
    ep_dispatch_args args = dispatch_args(c);
    ep_tensor none = EP_TENSOR_NONE;
    args.topk_idx = args.topk_weights = none;
    args.num_experts = 0;
    args.handle = c->handle;
    return ep_dispatch(c->base.buffer, &args, recv, NULL);
}

static ep_status combine_rows(cuda_rank *c, uint16_t *y, uint16_t *out)
{
    const bench_options *o = c->base.o;
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = gpu_tensor(&c->gpu, y, EP_BF16, c->num_rows, o->hidden);
    args.handle = c->handle;
    args.out = gpu_tensor(&c->gpu, out, EP_BF16, o->tokens, o->hidden);
    args.stream = c->gpu.stream;
    args.num_sms = (int32_t)o->sms;
    return ep_combine(c->base.buffer, &args, NULL);
}

static ep_status combine(cuda_rank *c, ep_recv *recv)
{
    (void)recv;
    return combine_rows(c, c->y, c->out);
}

static ep_status combine_ordinary(cuda_rank *c, ep_recv *recv)
{
    (void)recv;
    return combine_rows(c, c->y_ordinary, c->out_ordinary);
}

/* ---------------------------------------------------------------- measurement */

static void drop(ep_recv *recv)
{
    ep_handle *handle = recv->handle;
    ep_recv_release(recv);
    ep_handle_release(handle);
    recv->handle = NULL;
}

static ep_status queue_calls(cuda_rank *c, call_fn call, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        ep_recv recv = EP_RECV_INIT;
        BENCH_TRY(gpu_mark(&c->gpu, (int)i));
        BENCH_TRY(call(c, &recv));
        drop(&recv); /* its memory serves the next call, which comes behind it in the stream */
    }
    return gpu_mark(&c->gpu, (int)count);
}

static ep_status time_calls(cuda_rank *c, bench_phase phase, call_fn call)
{
    bench_rank *b = &c->base;
    const bench_options *o = b->o;
    BENCH_TRY(queue_calls(c, call, o->warmup));
    BENCH_TRY(gpu_wait(&c->gpu));
    BENCH_TRY(ep_group_barrier(b->self->group));
    BENCH_TRY(queue_calls(c, call, o->iters));
    BENCH_TRY(gpu_wait(&c->gpu));
    for (b->iteration = 0; b->iteration < o->iters; b->iteration++) {
        double us;
        BENCH_TRY(gpu_between(&c->gpu, (int)b->iteration, (int)b->iteration + 1, &us));
        bench_rank_note(b, phase, (span){0, (int64_t)(us * 1e3)});
    }
    return ep_group_barrier(b->self->group);
}

/* ---------------------------------------------------------------- set-up */

static ep_status upload_inputs(cuda_rank *c)
{
    const bench_rank *b = &c->base;
    const bench_options *o = b->o;
    size_t entries = (size_t)(o->tokens * o->topk), blocks = (size_t)((o->hidden + 127) / 128);
    uint8_t *codes = malloc((size_t)(o->tokens * o->hidden) + 1);
    float *scales = malloc((size_t)o->tokens * blocks * sizeof *scales + 1);
    if (!codes || !scales) {
        free(codes);
        free(scales);
        return rank_fail(b->self, EP_ERR_MEMORY, "no memory for the inputs");
    }
    for (int64_t t = 0; t < o->tokens && o->wire == BENCH_WIRE_FP8; t++)
        check_quantise(b->x + t * o->hidden, o->hidden, codes + t * o->hidden,
                       scales + t * (int64_t)blocks);
    ep_status status = gpu_new(&c->gpu, b->x, bench_out_bytes(o), (void **)&c->x);
    if (status == EP_OK)
        status = gpu_new(&c->gpu, b->ids, entries * 4, (void **)&c->ids);
    if (status == EP_OK)
        status = gpu_new(&c->gpu, b->weights, entries * 4, (void **)&c->weights);
    if (status == EP_OK)
        status = gpu_new(&c->gpu, codes, (size_t)(o->tokens * o->hidden), (void **)&c->codes);
    if (status == EP_OK)
        status = gpu_new(&c->gpu, scales, (size_t)o->tokens * blocks * 4, (void **)&c->scales);
    if (status == EP_OK)
        status = gpu_new(&c->gpu, NULL, bench_out_bytes(o), (void **)&c->out);
    if (status == EP_OK)
        status = gpu_new(&c->gpu, NULL, bench_out_bytes(o), (void **)&c->out_ordinary);
    free(codes);
    free(scales);
    return status;
}

/* The window that the calls need, so that none of them has to wait for it to grow. */
static size_t window_bytes(const bench_context *c)
{
    const bench_options *o = c->options;
    ep_normal_shape shape = EP_NORMAL_SHAPE_INIT;
    ep_normal_size size = {.size = sizeof size};
    shape.num_ranks = (int32_t)o->ranks;
    shape.num_tokens = o->tokens;
    shape.hidden = o->hidden;
    shape.topk = (int32_t)o->topk;
    shape.num_experts = c->load.num_experts;
    if (ep_normal_size_query(&shape, &size) != EP_OK)
        return 0;
    /* a live result, expert outputs, and a copy of outputs that peers can't reach */
    return 7 * size.expected_bytes / 2 + ((size_t)64 << 20);
}

/* The first dispatch: its rows tell what the experts give. */
static ep_status first_round(cuda_rank *c)
{
    bench_rank *b = &c->base;
    const bench_options *o = b->o;
    ep_recv recv = EP_RECV_INIT, host;
    BENCH_TRY(dispatch(c, &recv));
    c->handle = recv.handle;
    c->num_rows = b->result->recv_tokens = recv.num_rows;
    size_t bytes = (size_t)(c->num_rows * o->hidden) * sizeof *c->y;
    BENCH_TRY(ep_buffer_alloc(b->buffer, bytes ? bytes : 1, (void **)&c->y));
    host = recv;
    uint16_t *y = malloc(bytes + 1);
    ep_tensor *tensors[] = {&host.x, &host.scales, &host.topk_idx, &host.topk_weights,
                            &host.source_token};
    bool read = y != NULL;
    for (int i = 0; i < 5; i++)
        read = gpu_to_host(&c->gpu, tensors[i]) && read;
    if (read && o->check)
        check_dispatch(&b->c->load, b->self->rank, o->wire == BENCH_WIRE_FP8, &host,
                       b->result->wrong);
    if (read)
        bench_expert_rows(o, &host, c->num_rows, y);
    for (int i = 0; i < 5; i++)
        free(tensors[i]->data);
    ep_status status = read ? gpu_write(&c->gpu, c->y, y, bytes)
                            : rank_fail(b->self, EP_ERR_MEMORY, "no memory for expert outputs");
    if (status == EP_OK)
        status = gpu_new(&c->gpu, y, bytes, (void **)&c->y_ordinary);
    free(y);
    recv.handle = NULL;
    ep_recv_release(&recv);
    return status;
}

static void check(cuda_rank *c)
{
    bench_rank *b = &c->base;
    uint16_t *out = gpu_read(&c->gpu, c->out, bench_out_bytes(b->o));
    uint16_t *ordinary = gpu_read(&c->gpu, c->out_ordinary, bench_out_bytes(b->o));
    if (!out || !ordinary)
        strcpy(b->result->wrong, "combine: its outputs could not be read");
    else if (!b->result->wrong[0] &&
             check_combine(&b->c->load, b->self->rank, b->o->wire == BENCH_WIRE_FP8, out,
                           b->result->wrong) &&
             memcmp(out, ordinary, bench_out_bytes(b->o)) != 0)
        strcpy(b->result->wrong, "combine: differs when expert outputs lie in ordinary memory");
    free(out);
    free(ordinary);
}

static ep_status measure(cuda_rank *c)
{
    bench_rank *b = &c->base;
    BENCH_TRY(first_round(c));
    BENCH_TRY(bench_rank_note_memory(b, 0));
    BENCH_TRY(time_calls(c, BENCH_DISPATCH, dispatch));
    if (b->o->wire == BENCH_WIRE_FP8)
        BENCH_TRY(time_calls(c, BENCH_DISPATCH_GIVEN, dispatch_given));
    BENCH_TRY(time_calls(c, BENCH_DISPATCH_CACHED, dispatch_cached));
    BENCH_TRY(time_calls(c, BENCH_COMBINE, combine));
    BENCH_TRY(time_calls(c, BENCH_COMBINE_ORDINARY, combine_ordinary));
    if (b->o->check)
        check(c);
    return gpu_copy_limit(&c->gpu, b->self, b->c->copies, c->y_ordinary, c->y,
                          (size_t)(c->num_rows * b->o->hidden) * sizeof *c->y);
}

ep_status bench_cuda_rank(rank_self *self)
{
    cuda_rank *c = calloc(1, sizeof *c);
    if (!c)
        return rank_fail(self, EP_ERR_MEMORY, "no memory");
    const bench_context *context = self->context;
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.device = EP_DEVICE_CUDA;
    config.window_bytes = window_bytes(context);
    ep_status status = gpu_open(&c->gpu, self->rank);
    config.device_index = c->gpu.index;
    if (status == EP_OK)
        status = bench_rank_open_on(self, &config, &c->base);
    if (status == EP_OK)
        status = upload_inputs(c);
    if (status == EP_OK)
        status = measure(c);
    ep_handle_release(c->handle);
    if (c->base.buffer)
        ep_buffer_free(c->base.buffer, c->y);
    bench_rank_close(&c->base);
    void *memory[] = {c->x,      c->ids, c->weights,      c->codes,
                      c->scales, c->out, c->out_ordinary, c->y_ordinary};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        gpu_free(&c->gpu, memory[i]);
    gpu_close(&c->gpu);
    free(c);
    return status;
}
