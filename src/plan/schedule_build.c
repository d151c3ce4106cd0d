/* SPDX-License-Identifier: MIT */
/* Collecting computations, and deriving sends and receives from them. */
#include "base/error.h"
#include "plan/schedule.h"

#include <stdlib.h>
#include <string.h>

static void append(epi_builder *b, ep_schedule_op op)
{
    if (b->status != EP_OK)
        return;
    if (b->count == b->capacity) {
        size_t capacity = b->capacity ? 2 * b->capacity : 1024;
        ep_schedule_op *ops = realloc(b->ops, capacity * sizeof *ops);
        if (!ops) {
            b->status = epi_fail(EP_ERR_MEMORY, "schedule: no memory for %zu operations", capacity);
            return;
        }
        b->ops = ops;
        b->capacity = capacity;
    }
    b->ops[b->count++] = op;
}

static void append_one(epi_builder *b, ep_op_kind kind, int phase, int32_t chunk)
{
    if (chunk < b->chunks)
        append(b, (ep_schedule_op){.kind = (uint8_t)kind, .phase = (uint8_t)phase, .chunk = chunk});
}

void epi_build_forward(epi_builder *b, int phase)
{
    append_one(b, EP_OP_FORWARD, phase, b->forward[phase]++);
}

void epi_build_backward(epi_builder *b, int phase)
{
    append_one(b, EP_OP_BACKWARD, phase, b->backward[phase]++);
}

void epi_build_input_grad(epi_builder *b, int phase)
{
    append_one(b, EP_OP_INPUT_GRAD, phase, b->backward[phase]++);
}

void epi_build_weight_grad(epi_builder *b)
{
    while (b->deferred < b->count && b->ops[b->deferred].kind != EP_OP_INPUT_GRAD)
        b->deferred++;
    if (b->deferred == b->count)
        return;
    ep_schedule_op op = b->ops[b->deferred++];
    op.kind = EP_OP_WEIGHT_GRAD;
    append(b, op);
}

void epi_build_pair(epi_builder *b, int forward_phase, int backward_phase)
{
    append(b, (ep_schedule_op){.kind = EP_OP_PAIR,
                               .phase = (uint8_t)forward_phase,
                               .chunk = b->forward[forward_phase]++,
                               .back_phase = (uint8_t)backward_phase,
                               .back_chunk = b->backward[backward_phase]++});
}

/* Stage that (place, payload) goes to (step 1) or comes from (step -1); -1 at the end. */
static int32_t neighbour(const ep_schedule *s, int32_t place, int payload, int step)
{
    int32_t stage = s->stage[place] + (payload == EP_PAYLOAD_ACTIVATION ? step : -step);
    if (stage < 0 || stage >= s->shape.stages)
        return -1;
    return s->owner[s->stream[place] * s->shape.stages + stage];
}

int32_t epi_schedule_out_lane(const ep_schedule *s, int32_t place, int payload)
{
    int32_t to = neighbour(s, place, payload, 1);
    return to < 0 ? -1 : 2 * to + payload;
}

int32_t epi_schedule_in_place(const ep_schedule *s, int32_t place, int payload)
{
    return neighbour(s, place, payload, -1);
}

/* Appends the send (step 1) or receive (step -1) of one half of an operation, if
 * its other end is on another rank. */
static void transfer(const ep_schedule *s, epi_builder *b, int32_t rank, int payload, int step,
                     int phase, int32_t chunk)
{
    int32_t place = neighbour(s, rank * s->shape.phases + phase, payload, step);
    if (place < 0 || place / s->shape.phases == rank)
        return;
    append(b, (ep_schedule_op){.kind = step > 0 ? EP_OP_SEND : EP_OP_RECV,
                               .payload = (uint8_t)payload,
                               .phase = (uint8_t)phase,
                               .chunk = chunk,
                               .peer = place / s->shape.phases});
}

static void transfers(const ep_schedule *s, epi_builder *b, int32_t rank, const ep_schedule_op *op,
                      int step)
{
    if (epi_op_is_forward(op))
        transfer(s, b, rank, EP_PAYLOAD_ACTIVATION, step, op->phase, op->chunk);
    if (epi_op_is_backward(op))
        transfer(s, b, rank, EP_PAYLOAD_GRADIENT, step, epi_op_back_phase(op),
                 epi_op_back_chunk(op));
}

ep_status epi_schedule_derive(ep_schedule *s)
{
    epi_builder b = {.status = EP_OK};
    for (int32_t rank = 0; rank < s->shape.ranks; rank++) {
        size_t begin = s->first[rank], end = s->first[rank + 1];
        s->first[rank] = b.count;
        for (size_t i = begin; i < end; i++) {
            transfers(s, &b, rank, &s->ops[i], -1);
            append(&b, s->ops[i]);
            transfers(s, &b, rank, &s->ops[i], 1);
        }
    }
    if (b.status != EP_OK) {
        free(b.ops);
        return b.status;
    }
    s->first[s->shape.ranks] = b.count;
    free(s->ops);
    s->ops = b.ops;
    return EP_OK;
}
