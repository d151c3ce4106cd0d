/* SPDX-License-Identifier: MIT */
/*
 * The executor. A result goes from its producer to its consumer by way of two
 * tables of buffers: what has been made for another rank waits in `outbox` for
 * its send, what has been received, or made on this rank, waits in `inbox` for
 * the operation that needs it.
 */
#include "entrepot/pipeline.h"

#include "base/error.h"
#include "plan/pipeline.h"
#include "plan/schedule.h"

#include <stdlib.h>
#include <string.h>

/* An unused buffer; its memory holds the link to the next. */
typedef struct spare {
    struct spare *next;
} spare;

typedef struct engine {
    const ep_schedule *s;
    int32_t rank;
    size_t bytes[2]; /* by payload */
    size_t buffer_bytes;
    ep_pipeline_callbacks call;
    ep_pipeline_link link;
    bool called_back;       /* the last operation got as far as its callback */
    void **inbox, **outbox; /* [phases][2][chunks] by (phase, payload, chunk) */
    spare *spares;
} engine;

static void **box(const engine *e, void **boxes, int phase, int payload, int32_t chunk)
{
    return &boxes[(2 * (size_t)phase + (size_t)payload) * (size_t)e->s->shape.chunks +
                  (size_t)chunk];
}

static void *take_buffer(engine *e)
{
    spare *taken = e->spares;
    if (taken)
        e->spares = taken->next;
    else
        taken = malloc(e->buffer_bytes);
    if (!taken)
        epi_fail(EP_ERR_MEMORY, "no memory for a buffer of %zu bytes", e->buffer_bytes);
    return taken;
}

static void give_buffer(engine *e, void *buffer)
{
    spare *returned = buffer;
    if (!returned)
        return;
    returned->next = e->spares;
    e->spares = returned;
}

/* One half of a computation: what goes in, what comes out. */
typedef struct half {
    ep_pipeline_step step;
    int payload; /* of the result: activation of a forward, gradient of a backward */
    void *in, *out;
} half;

/* Takes the input from the inbox and a buffer for the result; NULL at the ends of the pipeline. */
static ep_status begin(engine *e, int payload, int phase, int32_t chunk, half *h)
{
    int32_t place = e->rank * e->s->shape.phases + phase;
    void **in = box(e, e->inbox, phase, payload, chunk);
    *h = (half){.step = {e->s->stage[place], e->s->stream[place], chunk, phase},
                .payload = payload,
                .in = *in};
    *in = NULL;
    if (epi_schedule_out_lane(e->s, place, payload) < 0)
        return EP_OK;
    h->out = take_buffer(e);
    return h->out ? EP_OK : EP_ERR_MEMORY;
}

/* Hands the result on, to this rank's own inbox when its consumer is here. */
static void end(engine *e, half *h)
{
    int32_t phases = e->s->shape.phases;
    give_buffer(e, h->in);
    if (!h->out)
        return;
    int32_t lane = epi_schedule_out_lane(e->s, e->rank * phases + h->step.phase, h->payload);
    if (lane / 2 / phases == e->rank)
        *box(e, e->inbox, lane / 2 % phases, h->payload, h->step.chunk) = h->out;
    else
        *box(e, e->outbox, h->step.phase, h->payload, h->step.chunk) = h->out;
}

static ep_status call_forward(engine *e, const half *f)
{
    return e->call.forward(e->call.context, &f->step, f->in, f->out);
}

static ep_status call_backward(engine *e, const half *b, bool whole)
{
    return (whole ? e->call.backward : e->call.input_grad)(e->call.context, &b->step, b->in,
                                                           b->out);
}

static ep_status call_pair(engine *e, const half *f, const half *b)
{
    if (e->call.overlapped_forward_backward)
        return e->call.overlapped_forward_backward(e->call.context, &f->step, f->in, f->out,
                                                   &b->step, b->in, b->out);
    EPI_TRY(call_forward(e, f));
    return call_backward(e, b, true);
}

static ep_status compute(engine *e, const ep_schedule_op *op)
{
    half f = {0}, b = {0};
    ep_status status = EP_OK;
    if (epi_op_is_forward(op))
        status = begin(e, EP_PAYLOAD_ACTIVATION, op->phase, op->chunk, &f);
    if (status == EP_OK && epi_op_is_backward(op))
        status = begin(e, EP_PAYLOAD_GRADIENT, epi_op_back_phase(op), epi_op_back_chunk(op), &b);
    if (status == EP_OK) {
        e->called_back = true;
        if (op->kind == EP_OP_FORWARD)
            status = call_forward(e, &f);
        else if (op->kind == EP_OP_PAIR)
            status = call_pair(e, &f, &b);
        else
            status = call_backward(e, &b, op->kind == EP_OP_BACKWARD);
    }
    end(e, &f);
    end(e, &b);
    return status;
}

static ep_status weight_grad(engine *e, const ep_schedule_op *op)
{
    int32_t place = e->rank * e->s->shape.phases + op->phase;
    const ep_pipeline_step step = {e->s->stage[place], e->s->stream[place], op->chunk, op->phase};
    e->called_back = true;
    return e->call.weight_grad(e->call.context, &step);
}

static ep_status send(engine *e, const ep_schedule_op *op)
{
    int32_t place = e->rank * e->s->shape.phases + op->phase, phases = e->s->shape.phases;
    int32_t lane = epi_schedule_out_lane(e->s, place, op->payload) % (2 * phases);
    void **from = box(e, e->outbox, op->phase, op->payload, op->chunk);
    ep_status status = e->link.send(e->link.context, op->peer, lane, *from, e->bytes[op->payload]);
    give_buffer(e, *from);
    *from = NULL;
    return status;
}

static ep_status receive(engine *e, const ep_schedule_op *op)
{
    void *buffer = take_buffer(e);
    if (!buffer)
        return EP_ERR_MEMORY;
    *box(e, e->inbox, op->phase, op->payload, op->chunk) = buffer;
    return e->link.recv(e->link.context, op->peer, 2 * op->phase + op->payload, buffer,
                        e->bytes[op->payload]);
}

static ep_status run_op(engine *e, const ep_schedule_op *op)
{
    e->called_back = false;
    switch ((ep_op_kind)op->kind) {
    case EP_OP_SEND:
        return send(e, op);
    case EP_OP_RECV:
        return receive(e, op);
    case EP_OP_WEIGHT_GRAD:
        return weight_grad(e, op);
    default:
        return compute(e, op);
    }
}

static ep_status run_all(engine *e)
{
    const ep_schedule *s = e->s;
    for (size_t i = s->first[e->rank]; i < s->first[e->rank + 1]; i++) {
        ep_status status = run_op(e, &s->ops[i]);
        if (status == EP_OK)
            continue;
        char text[EPI_OP_TEXT_MAX];
        epi_op_text(&s->ops[i], text);
        return epi_fail(status, "pipeline: rank %d, position %zu, %s: %s%s", (int)e->rank,
                        i - s->first[e->rank], text, e->called_back ? "the callback returned " : "",
                        e->called_back ? ep_status_string(status) : ep_last_error());
    }
    return EP_OK;
}

static ep_status missing(const char *member, const ep_schedule_op *op)
{
    char text[EPI_OP_TEXT_MAX];
    epi_op_text(op, text);
    return epi_fail(EP_ERR_ARGUMENT, "ep_pipeline_run: %s is NULL; %s needs it", member, text);
}

static ep_status needs(const engine *e, const ep_schedule_op *op)
{
    bool pair = op->kind == EP_OP_PAIR && !e->call.overlapped_forward_backward;
    if ((op->kind == EP_OP_FORWARD || pair) && !e->call.forward)
        return missing("callbacks.forward", op);
    if ((op->kind == EP_OP_BACKWARD || pair) && !e->call.backward)
        return missing("callbacks.backward", op);
    if (op->kind == EP_OP_INPUT_GRAD && !e->call.input_grad)
        return missing("callbacks.input_grad", op);
    if (op->kind == EP_OP_WEIGHT_GRAD && !e->call.weight_grad)
        return missing("callbacks.weight_grad", op);
    if (op->kind == EP_OP_SEND && !e->link.send)
        return missing("link.send", op);
    if (op->kind == EP_OP_RECV && !e->link.recv)
        return missing("link.recv", op);
    return EP_OK;
}

ep_status epi_pipeline_take_config(const char *call, const ep_pipeline_config *given,
                                   ep_pipeline_config *config)
{
    const int64_t most = INT64_C(1) << 40;
    *config = (ep_pipeline_config)EP_PIPELINE_CONFIG_INIT;
    EPI_TRY(epi_take_config(call, given, config, sizeof *config));
    if (config->activation_bytes < 1 || config->activation_bytes > most)
        return epi_fail(EP_ERR_ARGUMENT, "%s: activation_bytes is %lld; allowed 1 to %lld", call,
                        (long long)config->activation_bytes, (long long)most);
    if (config->gradient_bytes < 0 || config->gradient_bytes > most)
        return epi_fail(EP_ERR_ARGUMENT, "%s: gradient_bytes is %lld; allowed 0 to %lld", call,
                        (long long)config->gradient_bytes, (long long)most);
    if (config->gradient_bytes == 0)
        config->gradient_bytes = config->activation_bytes;
    return EP_OK;
}

static ep_status prepare(engine *e, const ep_pipeline_config *given,
                         const ep_pipeline_callbacks *callbacks, const ep_pipeline_link *link)
{
    const char *call = "ep_pipeline_run";
    ep_pipeline_config config;
    EPI_TRY(epi_pipeline_take_config(call, given, &config));
    EPI_TRY(epi_take_config(call, callbacks, &e->call, sizeof e->call));
    if (link)
        EPI_TRY(epi_take_config(call, link, &e->link, sizeof e->link));
    e->bytes[EP_PAYLOAD_ACTIVATION] = (size_t)config.activation_bytes;
    e->bytes[EP_PAYLOAD_GRADIENT] = (size_t)config.gradient_bytes;
    e->buffer_bytes = sizeof(spare);
    for (int i = 0; i < 2; i++)
        e->buffer_bytes = e->bytes[i] > e->buffer_bytes ? e->bytes[i] : e->buffer_bytes;
    for (size_t i = e->s->first[e->rank]; i < e->s->first[e->rank + 1]; i++)
        EPI_TRY(needs(e, &e->s->ops[i]));
    size_t boxes = 2 * (size_t)e->s->shape.phases * (size_t)e->s->shape.chunks;
    e->inbox = calloc(boxes, sizeof *e->inbox);
    e->outbox = calloc(boxes, sizeof *e->outbox);
    if (!e->inbox || !e->outbox)
        return epi_fail(EP_ERR_MEMORY, "%s: no memory for %zu messages", call, boxes);
    return EP_OK;
}

static void free_boxes(const engine *e, void **boxes)
{
    size_t count = 2 * (size_t)e->s->shape.phases * (size_t)e->s->shape.chunks;
    for (size_t i = 0; boxes && i < count; i++)
        free(boxes[i]); /* left by a run that failed */
    free(boxes);
}

ep_status ep_pipeline_run(const ep_schedule *schedule, int32_t rank,
                          const ep_pipeline_config *config, const ep_pipeline_callbacks *callbacks,
                          const ep_pipeline_link *link)
{
    if (!schedule)
        return epi_fail(EP_ERR_ARGUMENT, "ep_pipeline_run: schedule is NULL");
    if (rank < 0 || rank >= schedule->shape.ranks)
        return epi_fail(EP_ERR_ARGUMENT, "ep_pipeline_run: rank is %d; allowed 0 to %d", (int)rank,
                        (int)schedule->shape.ranks - 1);
    if (!schedule->proven)
        EPI_TRY(ep_schedule_check(schedule, NULL, NULL));
    engine e = {.s = schedule, .rank = rank};
    ep_status status = prepare(&e, config, callbacks, link);
    if (status == EP_OK)
        status = run_all(&e);
    if (status != EP_OK && e.link.give_up)
        e.link.give_up(e.link.context, status);
    free_boxes(&e, e.inbox);
    free_boxes(&e, e.outbox);
    while (e.spares) {
        spare *next = e.spares->next;
        free(e.spares);
        e.spares = next;
    }
    return status;
}
