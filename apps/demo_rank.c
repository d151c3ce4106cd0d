/* SPDX-License-Identifier: MIT */
/* What each rank of the demo does: the layer once per wire, then the exchanges again for time. */
#include "check.h"
#include "demo_state.h"

#include <stdlib.h>
#include <string.h>

/* To the end of what the call put into the rank's stream. */
#define TIMED(phase, iteration, call)                                      \
    do {                                                                   \
        DEMO_TRY(ep_group_barrier(d->self->group));                        \
        span *span_ = demo_span_at(d->c, phase, iteration, d->self->rank); \
        span_->start_ns = clock_ns();                                      \
        DEMO_TRY(call);                                                    \
        DEMO_TRY(demo_wait(&d->memory));                                   \
        span_->end_ns = clock_ns();                                        \
    } while (0)

/* ------------------------------------------------------------------ router */

static ep_status route(demo_state *d)
{
    const workload *w = &d->c->load;
    float *router = demo_router_create(w);
    float *values = malloc((size_t)d->tokens * DEMO_HIDDEN * sizeof *values);
    float *logits = malloc((size_t)(d->tokens * demo_padded_experts(w)) * sizeof *logits);
    ep_status status = router && values && logits ? EP_OK : demo_no_memory(d);
    if (status == EP_OK)
        status = ep_group_barrier(d->self->group);
    span *s = demo_span_at(d->c, DEMO_ROUTER, 0, d->self->rank);
    s->start_ns = clock_ns();
    if (status == EP_OK)
        demo_route(w, router, d->host.x, d->tokens, values, logits, d->host.ids, d->host.weights);
    s->end_ns = clock_ns();
    free(router);
    free(values);
    free(logits);
    return status;
}

/* ---------------------------------------------------------------- exchange */

static ep_status dispatch(demo_state *d, int wire)
{
    const demo_memory *m = &d->memory;
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = demo_tensor(m, d->seen.x, EP_BF16, d->tokens, DEMO_HIDDEN);
    args.topk_idx = demo_tensor(m, d->seen.ids, EP_I32, d->tokens, DEMO_TOPK);
    args.topk_weights = demo_tensor(m, d->seen.weights, EP_F32, d->tokens, DEMO_TOPK);
    args.num_experts = d->c->load.num_experts;
    args.wire = wire == DEMO_WIRE_FP8 ? EP_WIRE_FP8 : EP_WIRE_INPUT;
    args.stream = demo_stream(m);
    return ep_dispatch(d->buffer, &args, &d->recv, NULL);
}

static ep_status combine(demo_state *d)
{
    const demo_memory *m = &d->memory;
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = demo_tensor(m, d->y, EP_BF16, d->num_rows, DEMO_HIDDEN);
    args.handle = d->recv.handle;
    args.out = demo_tensor(m, d->seen.out, EP_BF16, d->tokens, DEMO_HIDDEN);
    args.stream = demo_stream(m);
    return ep_combine(d->buffer, &args, NULL);
}

static void release(demo_state *d)
{
    ep_handle *handle = d->recv.handle;
    ep_recv_release(&d->recv);
    ep_handle_release(handle);
    d->recv.handle = NULL;
}

/* ------------------------------------------------------------------- order */

/* Room for expert outputs, in the window and for the host. */
static ep_status alloc_outputs(demo_state *d)
{
    size_t bytes = (size_t)d->num_rows * DEMO_ROW_BF16 + 1;
    DEMO_TRY(ep_buffer_alloc(d->buffer, bytes, (void **)&d->y));
    d->y_host = d->memory.cuda ? malloc(bytes) : d->y;
    return d->y_host ? EP_OK : demo_no_memory(d);
}

/* The layer, from routed tokens to outputs that the parent checks. */
static ep_status run_layer(demo_state *d, int wire)
{
    demo_rank_result *result = &d->c->results[d->self->rank];
    size_t bytes = (size_t)d->tokens * DEMO_ROW_BF16;
    DEMO_TRY(dispatch(d, wire));
    d->num_rows = d->recv.num_rows;
    if (!d->y)
        DEMO_TRY(alloc_outputs(d));
    DEMO_TRY(demo_run_experts(d, wire));
    const int32_t *offset = d->view.source_offset.data;
    result->rows = d->num_rows;
    result->own_rows = offset[d->self->rank + 1] - offset[d->self->rank];
    demo_recv_view_end(d);
    DEMO_TRY(combine(d));
    DEMO_TRY(demo_mirror_get(&d->memory, d->host.out, d->seen.out, bytes));
    memcpy(d->c->out[wire] + d->self->rank * d->tokens * DEMO_HIDDEN, d->host.out, bytes);
    release(d);
    return EP_OK;
}

/* Rows that are on a GPU go through host memory on the traditional path, there and back. */
static ep_status old_dispatch(demo_state *d, const uint16_t **rows, int64_t *num_rows)
{
    DEMO_TRY(demo_mirror_get(&d->memory, d->host.x, d->seen.x, (size_t)d->tokens * DEMO_ROW_BF16));
    DEMO_TRY(demo_traditional_dispatch(d->old, d->host.x, rows, num_rows));
    return demo_mirror_put(&d->memory, d->old_rows, *rows, (size_t)*num_rows * DEMO_ROW_BF16);
}

static ep_status old_combine(demo_state *d)
{
    DEMO_TRY(demo_mirror_get(&d->memory, d->y_host, d->y, (size_t)d->num_rows * DEMO_ROW_BF16));
    DEMO_TRY(demo_traditional_combine(d->old, d->y_host, d->old_out));
    return demo_mirror_put(&d->memory, d->old_seen, d->old_out, (size_t)d->tokens * DEMO_ROW_BF16);
}

/* The traditional path must do the same to be worth a comparison. */
static ep_status time_traditional(demo_state *d, int iteration)
{
    const uint16_t *rows = NULL;
    int64_t num_rows = 0;
    demo_rank_result *result = &d->c->results[d->self->rank];
    TIMED(DEMO_OLD_DISPATCH, iteration, old_dispatch(d, &rows, &num_rows));
    TIMED(DEMO_OLD_COMBINE, iteration, old_combine(d));
    DEMO_TRY(demo_recv_view(d));
    result->old_agrees = num_rows == d->num_rows &&
                         memcmp(rows, d->view.x.data, (size_t)num_rows * DEMO_ROW_BF16) == 0;
    demo_recv_view_end(d);
    return EP_OK;
}

static ep_status measure_copies(demo_state *d)
{
    size_t bytes = (size_t)d->num_rows * DEMO_ROW_BF16;
    if (!d->memory.cuda) {
        uint16_t *copy = malloc(bytes + 1);
        if (!copy)
            return demo_no_memory(d);
        memcpy(copy, d->y, bytes);
        ep_status status = copy_limit_measure(d->self, d->c->copies, d->y, copy, bytes);
        free(copy);
        return status;
    }
    gpu *g = &d->memory.gpu;
    void *a = NULL, *b = NULL;
    bytes = bytes > DEMO_COPY_BYTES ? bytes : DEMO_COPY_BYTES;
    ep_status status = gpu_new(g, NULL, bytes, &a);
    if (status == EP_OK)
        status = gpu_new(g, NULL, bytes, &b);
    if (status == EP_OK)
        status = gpu_copy_limit(g, d->self, d->c->copies, a, b, bytes);
    gpu_free(g, a);
    gpu_free(g, b);
    return status;
}

static ep_status time_exchanges(demo_state *d)
{
    size_t bytes = (size_t)d->tokens * DEMO_ROW_BF16;
    for (int i = 0; i < DEMO_ITERATIONS; i++) {
        TIMED(DEMO_DISPATCH_FP8, i, dispatch(d, DEMO_WIRE_FP8));
        release(d);
        TIMED(DEMO_DISPATCH, i, dispatch(d, DEMO_WIRE_BF16));
        TIMED(DEMO_COMBINE, i, combine(d));
        DEMO_TRY(time_traditional(d, i));
        release(d);
        atomic_fetch_add_explicit(d->self->done, 1, memory_order_relaxed);
    }
    DEMO_TRY(demo_mirror_get(&d->memory, d->host.out, d->seen.out, bytes));
    memcpy(d->c->out[DEMO_WIRE_BF16] + d->self->rank * d->tokens * DEMO_HIDDEN, d->host.out, bytes);
    d->c->results[d->self->rank].old_agrees &= memcmp(d->host.out, d->old_out, bytes) == 0;
    return measure_copies(d);
}

/* ------------------------------------------------------------------ set-up */

static ep_status alloc_tensors(demo_state *d)
{
    size_t entries = (size_t)d->tokens * DEMO_TOPK * 4, rows = (size_t)d->tokens * DEMO_ROW_BF16;
    demo_memory *m = &d->memory;
    demo_tensors *host = &d->host, *seen = &d->seen;
    host->x = calloc(1, rows);
    host->out = calloc(1, rows);
    host->ids = calloc(1, entries);
    host->weights = calloc(1, entries);
    d->old_out = calloc(1, rows);
    if (!host->x || !host->out || !host->ids || !host->weights || !d->old_out)
        return demo_no_memory(d);
    for (int64_t t = 0; t < d->tokens; t++)
        workload_row(&d->c->load, d->self->rank, t, host->x + t * DEMO_HIDDEN);
    DEMO_TRY(demo_mirror(m, host->x, rows, (void **)&seen->x));
    DEMO_TRY(demo_mirror(m, host->out, rows, (void **)&seen->out));
    DEMO_TRY(demo_mirror(m, host->ids, entries, (void **)&seen->ids));
    DEMO_TRY(demo_mirror(m, host->weights, entries, (void **)&seen->weights));
    return demo_mirror(m, d->old_out, rows, (void **)&d->old_seen);
}

/* On a GPU the window is made large enough at once: to grow it, all ranks would have to wait. */
static ep_status create_buffer(demo_state *d)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    ep_normal_shape shape = EP_NORMAL_SHAPE_INIT;
    ep_normal_size size = {.size = sizeof size};
    config.max_experts = (int32_t)d->c->load.num_experts;
    shape.num_ranks = d->self->num_ranks;
    shape.num_tokens = d->tokens;
    shape.hidden = DEMO_HIDDEN;
    shape.topk = DEMO_TOPK;
    shape.num_experts = d->c->load.num_experts;
    if (d->memory.cuda) {
        DEMO_TRY(ep_normal_size_query(&shape, &size));
        config.device = EP_DEVICE_CUDA;
        config.device_index = d->memory.gpu.index;
        /* a live result, expert outputs, and some that are more than expected */
        config.window_bytes = 7 * size.expected_bytes / 2 + ((size_t)64 << 20);
    }
    return ep_buffer_create(d->self->group, d->memory.cuda ? &config : NULL, &d->buffer);
}

/* Experts are chosen on the host, as if they had been before. */
static ep_status route_tokens(demo_state *d)
{
    size_t entries = (size_t)d->tokens * DEMO_TOPK * 4;
    DEMO_TRY(route(d));
    DEMO_TRY(demo_mirror_put(&d->memory, d->seen.ids, d->host.ids, entries));
    return demo_mirror_put(&d->memory, d->seen.weights, d->host.weights, entries);
}

/* Everything of the traditional path, before anybody is timed. */
static ep_status create_traditional(demo_state *d)
{
    size_t bytes = (size_t)d->num_rows * DEMO_ROW_BF16;
    d->old = demo_traditional_create(d->self, d->host.ids);
    if (!d->old)
        return demo_no_memory(d);
    if (d->memory.cuda)
        DEMO_TRY(gpu_new(&d->memory.gpu, NULL, bytes, (void **)&d->old_rows));
    return ep_group_barrier(d->self->group); /* all counts of the traditional path are there */
}

static ep_status note_gpu(const demo_state *d)
{
    demo_rank_result *result = &d->c->results[d->self->rank];
    ep_device_info info = {.size = sizeof info};
    if (!d->memory.cuda)
        return EP_OK;
    DEMO_TRY(ep_device_query(EP_DEVICE_CUDA, d->memory.gpu.index, &info));
    result->gpu = d->memory.gpu.index;
    memcpy(result->gpu_name, info.name, sizeof result->gpu_name);
    return EP_OK;
}

static ep_status run(demo_state *d)
{
    DEMO_TRY(
        demo_memory_open(&d->memory, d->c->options->backend == DEMO_BACKEND_CUDA, d->self->rank));
    DEMO_TRY(note_gpu(d));
    DEMO_TRY(alloc_tensors(d));
    DEMO_TRY(create_buffer(d));
    DEMO_TRY(route_tokens(d));
    DEMO_TRY(run_layer(d, DEMO_WIRE_FP8));
    DEMO_TRY(run_layer(d, DEMO_WIRE_BF16));
    DEMO_TRY(create_traditional(d));
    return time_exchanges(d);
}

static void end(demo_state *d)
{
    demo_memory *m = &d->memory;
    void *mirrors[] = {d->seen.x,       d->seen.out, d->seen.ids,
                       d->seen.weights, d->old_seen, d->old_rows};
    demo_recv_view_end(d);
    if (d->recv.owner)
        release(d);
    if (m->cuda)
        free(d->y_host);
    if (d->y)
        ep_buffer_free(d->buffer, d->y);
    ep_buffer_destroy(d->buffer);
    demo_traditional_free(d->old);
    for (size_t i = 0; i < sizeof mirrors / sizeof *mirrors; i++)
        demo_mirror_end(m, mirrors[i]);
    demo_memory_close(m);
    void *host[] = {d->host.x, d->host.out, d->host.ids, d->host.weights, d->old_out};
    for (size_t i = 0; i < sizeof host / sizeof *host; i++)
        free(host[i]);
}

ep_status demo_rank(rank_self *self)
{
    const demo_context *c = self->context;
    demo_state *d = calloc(1, sizeof *d);
    if (!d)
        return rank_fail(self, EP_ERR_MEMORY, "out of memory");
    *d = (demo_state){.self = self, .c = c, .recv = EP_RECV_INIT, .tokens = c->options->tokens};
    for (int code = 0; code < 256; code++)
        d->e4m3[code] = (float)check_e4m3_value((uint8_t)code);
    ep_status status = run(d);
    end(d);
    free(d);
    return status;
}
