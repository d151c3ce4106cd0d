/* SPDX-License-Identifier: MIT */
#include "support/formats.h"
#include "support/ranks.h"
#include "support/scenario.h"
#include "support/tensors.h"

#include <stdlib.h>
#include <string.h>

/* Names the scenario once a check below it has printed what is wrong. */
#define CHECK(data, rank, differs)                                                             \
    do {                                                                                       \
        if (differs) {                                                                         \
            fprintf(stderr, "  in '%s' (seed %llu) on rank %d of %d, %s:%d, last error: %s\n", \
                    (data)->sc.name, (unsigned long long)(data)->sc.seed, rank,                \
                    (data)->sc.num_ranks, __FILE__, __LINE__, ep_last_error());                \
            return 1;                                                                          \
        }                                                                                      \
    } while (0)

/* A call that may still go on, with the memory it uses. */
struct call {
    ep_event *event;
    ep_tensor inputs[6];
    int num_inputs;
    ep_tensor out, out_weights;
    ep_recv recv;
};

static void *take(void *context, size_t bytes)
{
    (void)context;
    return test_memory_new(bytes);
}

static void give(void *context, void *memory)
{
    (void)context;
    test_memory_free(memory);
}

static const ep_allocator heap = {take, give, NULL};

static ep_tensor keep(struct call *call, ep_tensor tensor)
{
    call->inputs[call->num_inputs++] = tensor;
    return tensor;
}

static void end_call(struct call *call)
{
    ep_event_release(call->event);
    for (int i = 0; i < call->num_inputs; i++)
        tensor_free(&call->inputs[i]);
    tensor_free(&call->out);
    tensor_free(&call->out_weights);
    ep_recv_release(&call->recv);
}

/* The event argument: NULL makes the call block. */
static ep_event **event_of(const struct scenario_data *data, struct call *call)
{
    return data->sc.async ? &call->event : NULL;
}

static int64_t gap(const struct scenario_data *data, int64_t elements)
{
    return data->sc.strided ? elements : 0;
}

ep_buffer_config scenario_buffer_config(const struct scenario *scenario)
{
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    config.num_threads = scenario->num_threads;
    config.window_max_bytes = (size_t)4 << 30; /* many ranks as threads share one address space */
    config.device = test_device.type;
    config.device_index = test_device.index;
    return config;
}

/* ---------------------------------------------------------------- layout */

static int check_layout(const struct scenario_data *data, int rank)
{
    const struct scenario *sc = &data->sc;
    const struct ref_tokens *mine = &data->rank[rank].tokens;
    int64_t ranks = sc->num_ranks, cells = mine->num_tokens * ranks;
    ep_tensor ids =
        tensor_new_ids(sc->topk_dtype, mine->num_tokens, sc->topk, gap(data, 3), mine->topk_idx);
    int32_t *got = test_zeros(2 * ranks + sc->num_experts, sizeof *got);
    int32_t *want = test_zeros(2 * ranks + sc->num_experts, sizeof *want);
    uint8_t *got_in = test_zeros(cells, 1), *want_in = test_zeros(cells, 1);
    ref_layout(&data->world, mine, sc->num_ranks, want, want + ranks, want + 2 * ranks, want_in);
    ep_status status =
        ep_layout(&ids, sc->num_experts, sc->table ? data->table : NULL, sc->num_ranks,
                  sc->num_ranks, got, got + ranks, got + 2 * ranks, got_in);
    int differs = status != EP_OK ||
                  memcmp(got, want, (size_t)(2 * ranks + sc->num_experts) * sizeof *got) != 0 ||
                  memcmp(got_in, want_in, (size_t)cells) != 0;
    tensor_free(&ids);
    free(got);
    free(want);
    free(got_in);
    free(want_in);
    CHECK(data, rank, differs);
    return 0;
}

/* -------------------------------------------------------------- dispatch */

static void set_rows(const struct scenario_data *data, const struct ref_tokens *tokens,
                     struct call *call, ep_dispatch_args *args)
{
    const struct scenario *sc = &data->sc;
    int64_t words = format_scale_words(sc->scale, sc->hidden);
    args->wire = sc->wire;
    args->scale = sc->scale;
    args->x =
        keep(call, tensor_new(sc->dtype, tokens->num_tokens, sc->hidden, gap(data, 24), tokens->x));
    if (sc->dtype != EP_E4M3)
        return;
    ep_dtype dtype = format_scale_dtype(sc->scale);
    args->scales = keep(
        call, sc->strided ? tensor_new_transposed(dtype, tokens->num_tokens, words, tokens->scales)
                          : tensor_new(dtype, tokens->num_tokens, words, 0, tokens->scales));
}

static int rows_differ(const struct scenario_data *data, const ep_recv *recv,
                       const struct ref_recv *want)
{
    const struct scenario *sc = &data->sc;
    ep_dtype wire = ref_wire_dtype(&data->world);
    if (tensor_differs("x", &recv->x, wire, want->rows, sc->hidden, want->x, want->row))
        return 1;
    if (wire != EP_E4M3)
        return tensor_given("scales", &recv->scales);
    return tensor_differs("scales", &recv->scales, format_scale_dtype(sc->scale), want->rows,
                          format_scale_words(sc->scale, sc->hidden), want->scales, want->row);
}

static int routing_differs(const struct scenario_data *data, const ep_recv *recv,
                           const struct ref_recv *want)
{
    const struct scenario *sc = &data->sc;
    bool by_expert = sc->layout == EP_ROWS_BY_EXPERT;
    int differs = tensor_ids_differ("topk_idx", &recv->topk_idx, sc->topk_dtype, want->rows,
                                    want->columns, want->topk_idx);
    if (sc->weights)
        differs |= tensor_differs("topk_weights", &recv->topk_weights, EP_F32, want->rows,
                                  want->columns, want->topk_weights, NULL);
    else
        differs |= tensor_given("topk_weights", &recv->topk_weights);
    differs |= tensor_differs("source_token", &recv->source_token, EP_I32, want->rows, -1,
                              want->source_token, NULL);
    differs |= tensor_differs("tokens_per_expert", &recv->tokens_per_expert, EP_I32,
                              want->num_local_experts, -1, want->tokens_per_expert, NULL);
    if (by_expert) {
        differs |= tensor_differs("expert_offset", &recv->expert_offset, EP_I32,
                                  want->num_local_experts + 1, -1, want->expert_offset, NULL);
        differs |= tensor_given("source_offset", &recv->source_offset);
    } else {
        differs |= tensor_differs("source_offset", &recv->source_offset, EP_I32, sc->num_ranks + 1,
                                  -1, want->source_offset, NULL);
        differs |= tensor_given("expert_offset", &recv->expert_offset);
    }
    bool unknown = recv->num_rows == -1 && recv->x.device != EP_DEVICE_CPU; /* nobody waited */
    if (recv->num_rows != want->num_rows && !unknown) {
        fprintf(stderr, "num_rows: is %lld, expected %lld\n", (long long)recv->num_rows,
                (long long)want->num_rows);
        return 1;
    }
    return differs;
}

/* rows_between and where each row went, against every rank's reference. */
static int handle_differs(const struct scenario_data *data, int rank, const ep_handle *handle)
{
    const struct scenario *sc = &data->sc;
    const struct scenario_rank *me = &data->rank[rank];
    ep_handle_info info = {.size = sizeof info};
    int differs = ep_handle_query(handle, &info) != EP_OK;
    if (differs || info.num_ranks != sc->num_ranks || info.topk != sc->topk ||
        info.num_tokens != me->tokens.num_tokens || info.num_rows != me->recv.num_rows ||
        info.hidden != sc->hidden || info.num_experts != sc->num_experts ||
        info.num_local_experts != me->recv.num_local_experts || info.layout != sc->layout)
        return 1;
    int32_t *between = test_zeros((int64_t)sc->num_ranks * sc->num_ranks, sizeof *between);
    for (int r = 0; r < sc->num_ranks; r++)
        for (int64_t i = 0; i < data->rank[r].recv.rows; i++) {
            const struct ref_row *row = data->rank[r].recv.row + i;
            if (row->source >= 0)
                between[row->source * sc->num_ranks + r]++;
            if (row->source != rank)
                continue;
            bool found = false;
            for (int k = 0; k < sc->topk; k++)
                found |= info.send_rank[row->token * sc->topk + k] == r &&
                         info.send_row[row->token * sc->topk + k] == i &&
                         (row->k < 0 || row->k == k);
            differs |= !found;
        }
    differs |= memcmp(between, info.rows_between,
                      (size_t)(sc->num_ranks * sc->num_ranks) * sizeof *between) != 0;
    differs |= memcmp(me->recv.source_token, info.source_token,
                      (size_t)me->recv.rows * sizeof(int32_t)) != 0;
    free(between);
    return differs;
}

int scenario_recheck(const struct scenario_live *live)
{
    const struct scenario_rank *me = &live->data->rank[live->rank];
    CHECK(live->data, live->rank, rows_differ(live->data, &live->recv, &me->recv));
    CHECK(live->data, live->rank, routing_differs(live->data, &live->recv, &me->recv));
    CHECK(live->data, live->rank, handle_differs(live->data, live->rank, live->handle));
    return 0;
}

int scenario_dispatch(const struct scenario_data *data, ep_buffer *buffer,
                      struct scenario_live *live)
{
    const struct scenario *sc = &data->sc;
    int rank = ep_group_rank(ep_buffer_group(buffer));
    const struct ref_tokens *mine = &data->rank[rank].tokens;
    struct call call = {.recv = EP_RECV_INIT};
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    *live =
        (struct scenario_live){.recv = EP_RECV_INIT, .data = data, .buffer = buffer, .rank = rank};
    set_rows(data, mine, &call, &args);
    args.topk_idx = keep(&call, tensor_new_ids(sc->topk_dtype, mine->num_tokens, sc->topk,
                                               gap(data, 1), mine->topk_idx));
    if (sc->weights)
        args.topk_weights = keep(&call, tensor_new(EP_F32, mine->num_tokens, sc->topk, gap(data, 2),
                                                   mine->topk_weights));
    args.num_experts = sc->num_experts;
    args.expert_rank = sc->table ? data->table : NULL;
    args.layout = sc->layout;
    args.expert_alignment = sc->alignment;
    args.num_worst_tokens = data->world.num_worst_tokens;
    args.allocator = sc->allocator ? &heap : NULL;
    args.stream = test_device.stream;
    ep_status status = ep_dispatch(buffer, &args, &live->recv, event_of(data, &call));
    if (status == EP_OK && call.event)
        status = ep_event_wait(call.event);
    live->handle = live->recv.handle;
    end_call(&call);
    CHECK(data, rank, status != EP_OK);
    return scenario_recheck(live);
}

/* --------------------------------------------------- calls that follow it */

/* Puts the expert outputs where the scenario wants them. */
static int place_y(struct scenario_live *live)
{
    const struct scenario_data *data = live->data;
    const struct scenario *sc = &data->sc;
    const struct scenario_rank *me = &data->rank[live->rank];
    size_t bytes = (size_t)me->recv.rows * (size_t)sc->hidden * ep_dtype_size(sc->y_dtype);
    if (sc->y_place == Y_ALLOC) {
        CHECK(data, live->rank, ep_buffer_alloc(live->buffer, bytes, &live->y_window) != EP_OK);
        CHECK(data, live->rank, (uintptr_t)live->y_window % 256 != 0);
        live->y = ep_tensor_2d(live->y_window, sc->y_dtype, me->recv.rows, sc->hidden);
        live->y.device = test_device.type;
        live->y.device_index = test_device.index;
    } else if (sc->y_place == Y_RECV && live->recv.x.dtype == sc->y_dtype) {
        live->y = live->recv.x;
    } else {
        live->y = tensor_new(sc->y_dtype, me->recv.rows, sc->hidden, gap(data, 8), me->y);
        return 0;
    }
    test_memory_write(live->y.data, me->y, bytes);
    return 0;
}

static void free_y(struct scenario_live *live)
{
    if (live->y_window)
        ep_buffer_free(live->buffer, live->y_window);
    else if (live->y.data && live->y.data != live->recv.x.data)
        tensor_free(&live->y);
    live->y_window = NULL;
    live->y = (ep_tensor)EP_TENSOR_NONE;
}

static void set_outputs(const struct scenario_data *data, int rank, bool weights, struct call *call)
{
    const struct scenario *sc = &data->sc;
    int64_t tokens = data->rank[rank].tokens.num_tokens;
    call->out = tensor_new(sc->y_dtype, tokens, sc->hidden, gap(data, 16), NULL);
    if (weights)
        call->out_weights = tensor_new(EP_F32, tokens, sc->topk, gap(data, 1), NULL);
}

static int outputs_differ(const struct scenario_data *data, int rank, const struct call *call,
                          const uint8_t *out, const float *weights)
{
    const struct scenario *sc = &data->sc;
    int64_t tokens = data->rank[rank].tokens.num_tokens;
    if (out && (tensor_differs("out", &call->out, sc->y_dtype, tokens, sc->hidden, out, NULL) ||
                !tensor_gaps_intact(&call->out)))
        return 1;
    return call->out_weights.data && (tensor_differs("out_weights", &call->out_weights, EP_F32,
                                                     tokens, sc->topk, weights, NULL) ||
                                      !tensor_gaps_intact(&call->out_weights));
}

static ep_status start_combine(struct scenario_live *live, ep_event *previous, struct call *call)
{
    const struct scenario_data *data = live->data;
    const struct scenario *sc = &data->sc;
    const struct scenario_rank *me = &data->rank[live->rank];
    bool by_expert = sc->layout == EP_ROWS_BY_EXPERT;
    int64_t tokens = me->tokens.num_tokens;
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    set_outputs(data, live->rank, sc->carry && !by_expert, call);
    args.y = live->y;
    args.handle = live->handle;
    if (sc->carry)
        args.topk_weights = keep(call, tensor_new(EP_F32, by_expert ? tokens : me->recv.rows,
                                                  sc->topk, gap(data, 5), me->carry));
    for (int b = 0; b < sc->num_bias; b++) /* one bias alone goes in the second place */
        args.bias[sc->num_bias == 1 ? 1 : b] =
            keep(call, tensor_new(sc->y_dtype, tokens, sc->hidden, gap(data, 8), me->bias[b]));
    args.out = call->out;
    args.out_weights = call->out_weights;
    args.previous = previous;
    args.stream = test_device.stream;
    return ep_combine(live->buffer, &args, event_of(data, call));
}

static ep_status start_cached(struct scenario_live *live, ep_event *previous, struct call *call)
{
    const struct scenario_data *data = live->data;
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    set_rows(data, &data->rank[live->rank].second, call, &args);
    args.handle = live->handle;
    args.allocator = data->sc.allocator ? &heap : NULL;
    args.previous = previous;
    args.stream = test_device.stream;
    return ep_dispatch(live->buffer, &args, &call->recv, event_of(data, call));
}

static ep_status start_dispatch_backward(struct scenario_live *live, ep_event *previous,
                                         struct call *call)
{
    const struct scenario_data *data = live->data;
    const struct scenario_rank *me = &data->rank[live->rank];
    ep_dispatch_backward_args args = EP_DISPATCH_BACKWARD_ARGS_INIT;
    set_outputs(data, live->rank, data->sc.weights, call);
    args.grad_recv_x = live->y;
    if (data->sc.weights)
        args.grad_recv_weights = keep(
            call, tensor_new(EP_F32, me->recv.rows, me->recv.columns, gap(data, 3), me->row_grads));
    args.handle = live->handle;
    args.grad_x = call->out;
    args.grad_topk_weights = call->out_weights;
    args.previous = previous;
    args.stream = test_device.stream;
    return ep_dispatch_backward(live->buffer, &args, event_of(data, call));
}

static bool wants_dots(const struct scenario_data *data)
{
    return data->sc.layout == EP_ROWS_BY_EXPERT && data->sc.weights;
}

static ep_status start_combine_backward(struct scenario_live *live, ep_event *previous,
                                        struct call *call)
{
    const struct scenario_data *data = live->data;
    const struct scenario *sc = &data->sc;
    const struct scenario_rank *me = &data->rank[live->rank];
    int64_t tokens = me->tokens.num_tokens;
    ep_combine_backward_args args = EP_COMBINE_BACKWARD_ARGS_INIT;
    args.grad_out =
        keep(call, tensor_new(sc->y_dtype, tokens, sc->hidden, gap(data, 8), me->grad_out));
    if (sc->layout == EP_ROWS_BY_EXPERT && sc->carry)
        args.topk_weights =
            keep(call, tensor_new(EP_F32, tokens, sc->topk, gap(data, 1), me->carry));
    if (wants_dots(data)) {
        call->out_weights = tensor_new(EP_F32, tokens, sc->topk, gap(data, 1), NULL);
        args.grad_topk_weights = call->out_weights;
        args.y = live->y;
    }
    args.handle = live->handle;
    args.allocator = sc->allocator ? &heap : NULL;
    args.previous = previous;
    args.stream = test_device.stream;
    return ep_combine_backward(live->buffer, &args, &call->recv, event_of(data, call));
}

static int check_call(const struct scenario_live *live, int which, const struct call *call)
{
    const struct scenario_data *data = live->data;
    const struct scenario_rank *me = &data->rank[live->rank];
    switch (which) {
    case SCENARIO_COMBINE:
        return outputs_differ(data, live->rank, call, me->out, me->out_carry);
    case SCENARIO_CACHED:
        return call->recv.handle != NULL || rows_differ(data, &call->recv, &me->second_recv);
    case SCENARIO_DISPATCH_BACKWARD:
        return outputs_differ(data, live->rank, call, me->grad_x, me->grad_weights);
    default:
        return tensor_differs("grad rows", &call->recv.x, data->sc.y_dtype, me->recv.rows,
                              data->sc.hidden, me->grad_rows, me->recv.row) ||
               outputs_differ(data, live->rank, call, NULL, me->dots);
    }
}

typedef ep_status (*start_fn)(struct scenario_live *, ep_event *, struct call *);
static const start_fn starts[] = {start_combine, start_cached, start_dispatch_backward,
                                  start_combine_backward};

/* Blocking calls one after another, or all queued first and then completed in order. */
int scenario_follow(struct scenario_live *live, int calls)
{
    struct call call[4];
    ep_event *previous = NULL;
    int failed = place_y(live);
    for (int i = 0; i < 4; i++) {
        call[i] = (struct call){.recv = EP_RECV_INIT};
        if (!(calls & 1 << i) || failed)
            continue;
        failed = starts[i](live, previous, &call[i]) != EP_OK;
        if (!failed && !call[i].event)
            failed = check_call(live, 1 << i, &call[i]);
        previous = call[i].event;
    }
    for (int i = 0; i < 4 && !failed; i++) {
        if (!call[i].event)
            continue;
        failed = ep_event_wait(call[i].event) != EP_OK || ep_event_query(call[i].event) != EP_OK ||
                 check_call(live, 1 << i, &call[i]);
    }
    for (int i = 0; i < 4; i++)
        end_call(&call[i]);
    free_y(live);
    CHECK(live->data, live->rank, failed);
    return 0;
}

void scenario_release(struct scenario_live *live)
{
    free_y(live);
    ep_recv_release(&live->recv);
    ep_handle_release(live->handle);
    live->handle = NULL;
}

int scenario_run(const struct scenario_data *data, ep_buffer *buffer, int calls)
{
    struct scenario_live live;
    int rank = ep_group_rank(ep_buffer_group(buffer));
    int failed = test_device.type == EP_DEVICE_CPU ? check_layout(data, rank) : 0;
    if (!failed)
        failed = scenario_dispatch(data, buffer, &live);
    else
        return failed;
    if (!failed && calls)
        failed = scenario_follow(&live, calls);
    scenario_release(&live);
    return failed;
}
