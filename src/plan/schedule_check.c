/* SPDX-License-Identifier: MIT */
/*
 * The checker. First each rank's list on its own: every chunk complete, every
 * operation with what it needs at hand, weight gradients first in first out. Then
 * each lane: the same order at both ends. Then all ranks together: no deadlock.
 */
#include "base/error.h"
#include "plan/schedule.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* What has been done for one (phase, chunk) of the rank under the check. */
enum {
    FORWARD = 1,
    INPUT_GRAD = 2, /* by I or B */
    WEIGHT_GRAD = 4,
    RECEIVED = 8, /* shifted by the payload */
    SENT = 32
};

typedef struct checker {
    const ep_schedule *s;
    int32_t rank;
    size_t position;
    uint8_t *done;      /* [phases][chunks] */
    int32_t *deferred;  /* [phases * chunks] I's in order, as phase * chunks + chunk */
    int32_t head, tail; /* of deferred */
    int32_t live, peak;
    int32_t *order;  /* [lanes][chunks] chunks in the order sent */
    int32_t *number; /* [lanes] messages sent or, in a second pass, received */
} checker;

/* Fails with the place of the operation under the check in front of the message. */
static ep_status illegal(const checker *c, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

static ep_status illegal(const checker *c, const char *format, ...)
{
    char text[EPI_OP_TEXT_MAX], what[EPI_ERROR_MAX / 2];
    va_list args;
    va_start(args, format);
    vsnprintf(what, sizeof what, format, args);
    va_end(args);
    epi_op_text(&c->s->ops[c->s->first[c->rank] + c->position], text);
    return epi_fail(EP_ERR_FORMAT, "schedule: rank %d, position %zu, %s: %s", (int)c->rank,
                    c->position, text, what);
}

static uint8_t *state_of(const checker *c, int32_t phase, int32_t chunk)
{
    return &c->done[(size_t)phase * (size_t)c->s->shape.chunks + (size_t)chunk];
}

/* The input of a forward, or the output gradient of a backward, must be at hand. */
static ep_status needs(const checker *c, int32_t phase, int32_t chunk, int payload)
{
    int32_t phases = c->s->shape.phases;
    int32_t from = epi_schedule_in_place(c->s, c->rank * phases + phase, payload);
    const char *what = payload == EP_PAYLOAD_ACTIVATION ? "activation" : "gradient";
    if (from < 0)
        return EP_OK;
    if (from / phases != c->rank) {
        if (*state_of(c, phase, chunk) & (RECEIVED << payload))
            return EP_OK;
        return illegal(c, "%s %d.%d has not been received from rank %d", what, (int)phase,
                       (int)chunk, (int)(from / phases));
    }
    int made = payload == EP_PAYLOAD_ACTIVATION ? FORWARD : INPUT_GRAD;
    if (*state_of(c, from % phases, chunk) & made)
        return EP_OK;
    return illegal(c, "phase %d of this rank has not made its %s yet", (int)(from % phases), what);
}

static ep_status forward(checker *c, int32_t phase, int32_t chunk)
{
    uint8_t *state = state_of(c, phase, chunk);
    if (*state & FORWARD)
        return illegal(c, "F%d.%d is done twice", (int)phase, (int)chunk);
    EPI_TRY(needs(c, phase, chunk, EP_PAYLOAD_ACTIVATION));
    *state |= FORWARD;
    if (++c->live > c->peak)
        c->peak = c->live;
    return EP_OK;
}

static ep_status backward(checker *c, int32_t phase, int32_t chunk, bool whole)
{
    uint8_t *state = state_of(c, phase, chunk);
    if (!(*state & FORWARD))
        return illegal(c, "F%d.%d has not been done", (int)phase, (int)chunk);
    if (*state & INPUT_GRAD)
        return illegal(c, "the gradient of %d.%d is done twice", (int)phase, (int)chunk);
    EPI_TRY(needs(c, phase, chunk, EP_PAYLOAD_GRADIENT));
    *state |= INPUT_GRAD;
    if (whole) {
        *state |= WEIGHT_GRAD;
        c->live--;
    } else {
        c->deferred[c->tail++] = phase * c->s->shape.chunks + chunk;
    }
    return EP_OK;
}

static ep_status weight_grad(checker *c, int32_t phase, int32_t chunk)
{
    int32_t chunks = c->s->shape.chunks;
    if (c->head == c->tail)
        return illegal(c, "no weight gradient has been deferred");
    int32_t oldest = c->deferred[c->head++];
    if (oldest != phase * chunks + chunk)
        return illegal(c, "the oldest deferred weight gradient is W%d.%d", (int)(oldest / chunks),
                       (int)(oldest % chunks));
    *state_of(c, phase, chunk) |= WEIGHT_GRAD;
    c->live--;
    return EP_OK;
}

static ep_status receive(checker *c, const ep_schedule_op *op)
{
    int32_t phases = c->s->shape.phases;
    int32_t from = epi_schedule_in_place(c->s, c->rank * phases + op->phase, op->payload);
    uint8_t *state = state_of(c, op->phase, op->chunk);
    if (from < 0 || from / phases == c->rank)
        return illegal(c, "this phase receives nothing of the kind");
    if (from / phases != op->peer)
        return illegal(c, "it comes from rank %d", (int)(from / phases));
    if (*state & (RECEIVED << op->payload))
        return illegal(c, "it is received twice");
    *state |= (uint8_t)(RECEIVED << op->payload);
    return EP_OK;
}

static ep_status send(checker *c, const ep_schedule_op *op)
{
    int32_t phases = c->s->shape.phases;
    int32_t lane = epi_schedule_out_lane(c->s, c->rank * phases + op->phase, op->payload);
    int32_t to = lane < 0 ? c->rank : lane / 2 / phases;
    uint8_t *state = state_of(c, op->phase, op->chunk);
    if (to == c->rank)
        return illegal(c, "this phase sends nothing of the kind");
    if (to != op->peer)
        return illegal(c, "it goes to rank %d", (int)to);
    if (!(*state & (op->payload == EP_PAYLOAD_ACTIVATION ? FORWARD : INPUT_GRAD)))
        return illegal(c, "it has not been made yet");
    if (*state & (SENT << op->payload))
        return illegal(c, "it is sent twice");
    *state |= (uint8_t)(SENT << op->payload);
    c->order[(size_t)lane * (size_t)c->s->shape.chunks + (size_t)c->number[lane]++] = op->chunk;
    return EP_OK;
}

static ep_status check_op(checker *c, const ep_schedule_op *op)
{
    switch ((ep_op_kind)op->kind) {
    case EP_OP_FORWARD:
        return forward(c, op->phase, op->chunk);
    case EP_OP_BACKWARD:
    case EP_OP_INPUT_GRAD:
        return backward(c, op->phase, op->chunk, op->kind == EP_OP_BACKWARD);
    case EP_OP_WEIGHT_GRAD:
        return weight_grad(c, op->phase, op->chunk);
    case EP_OP_PAIR:
        /* Both halves start at once: neither may wait for the other, and both are live. */
        if (op->phase == op->back_phase && op->chunk == op->back_chunk)
            return illegal(c, "a chunk is paired with itself");
        EPI_TRY(forward(c, op->phase, op->chunk));
        return backward(c, op->back_phase, op->back_chunk, true);
    case EP_OP_SEND:
        return send(c, op);
    case EP_OP_RECV:
        return receive(c, op);
    }
    return illegal(c, "unknown kind %d", op->kind);
}

/* Everything that must have happened to one (phase, chunk) by the end of the list. */
static ep_status complete(const checker *c, int32_t phase, int32_t chunk)
{
    int32_t phases = c->s->shape.phases;
    uint8_t state = *state_of(c, phase, chunk);
    const char *missing = !(state & FORWARD)       ? "F"
                          : !(state & INPUT_GRAD)  ? "B or I"
                          : !(state & WEIGHT_GRAD) ? "W"
                                                   : NULL;
    if (missing)
        return epi_fail(EP_ERR_FORMAT, "schedule: rank %d: %s of %d.%d is missing", (int)c->rank,
                        missing, (int)phase, (int)chunk);
    for (int payload = 0; payload < 2; payload++) {
        int32_t lane = epi_schedule_out_lane(c->s, c->rank * phases + phase, payload);
        if (lane >= 0 && lane / 2 / phases != c->rank && !(state & (SENT << payload)))
            return epi_fail(EP_ERR_FORMAT,
                            "schedule: rank %d: send of %s %d.%d to rank %d is "
                            "missing",
                            (int)c->rank, payload ? "gradient" : "activation", (int)phase,
                            (int)chunk, (int)(lane / 2 / phases));
    }
    return EP_OK;
}

static ep_status check_rank(checker *c, int32_t rank)
{
    const ep_schedule *s = c->s;
    size_t items = (size_t)s->shape.phases * (size_t)s->shape.chunks;
    memset(c->done, 0, items);
    c->rank = rank;
    c->head = c->tail = c->live = c->peak = 0;
    for (size_t i = s->first[rank]; i < s->first[rank + 1]; i++) {
        c->position = i - s->first[rank];
        EPI_TRY(check_op(c, &s->ops[i]));
    }
    for (size_t i = 0; i < items; i++)
        EPI_TRY(complete(c, (int32_t)(i / (size_t)s->shape.chunks),
                         (int32_t)(i % (size_t)s->shape.chunks)));
    return EP_OK;
}

/* Every message is sent and received once by now; receivers must take them as sent. */
static ep_status check_order(checker *c)
{
    const ep_schedule *s = c->s;
    memset(c->number, 0, 2 * (size_t)epi_schedule_places(s) * sizeof *c->number);
    for (c->rank = 0; c->rank < s->shape.ranks; c->rank++) {
        for (size_t i = s->first[c->rank]; i < s->first[c->rank + 1]; i++) {
            const ep_schedule_op *op = &s->ops[i];
            if (op->kind != EP_OP_RECV)
                continue;
            size_t lane = 2 * (size_t)(c->rank * s->shape.phases + op->phase) + op->payload;
            int32_t next = c->order[lane * (size_t)s->shape.chunks + (size_t)c->number[lane]++];
            c->position = i - s->first[c->rank];
            if (next != op->chunk)
                return illegal(c, "rank %d sends chunk %d before it", (int)op->peer, (int)next);
        }
    }
    return EP_OK;
}

static ep_status finishes(const ep_schedule *s, int32_t slots, bool *finished, checker *stuck)
{
    epi_walk walk;
    int32_t rank, lane, number;
    size_t index;
    EPI_TRY(epi_walk_begin(&walk, s, slots));
    while (epi_walk_next(&walk, &rank, &index, &lane, &number))
        continue;
    *finished = epi_walk_finished(&walk);
    for (rank = 0; !*finished && rank < s->shape.ranks; rank++) {
        if (walk.next[rank] != s->first[rank + 1]) {
            stuck->rank = rank;
            stuck->position = walk.next[rank] - s->first[rank];
            break;
        }
    }
    epi_walk_end(&walk);
    return EP_OK;
}

static ep_status check_deadlock(checker *c)
{
    bool finished;
    EPI_TRY(finishes(c->s, 0, &finished, c));
    return finished ? EP_OK : illegal(c, "deadlock: it waits for ever");
}

/* More slots never hurt and a lane never holds more than its chunks: bisect, with
 * one slot first because it nearly always does. */
static ep_status least_slots(checker *c, int32_t *slots)
{
    int32_t low = 1, high = c->s->shape.chunks, guess = 1;
    bool finished;
    while (low < high) {
        EPI_TRY(finishes(c->s, guess, &finished, c));
        if (finished)
            high = guess;
        else
            low = guess + 1;
        guess = low + (high - low) / 2;
    }
    *slots = low;
    return EP_OK;
}

static ep_status check_all(checker *c, int32_t *peak_activations, int32_t *slots)
{
    for (int32_t rank = 0; rank < c->s->shape.ranks; rank++) {
        EPI_TRY(check_rank(c, rank));
        if (peak_activations)
            peak_activations[rank] = c->peak;
    }
    EPI_TRY(check_order(c));
    EPI_TRY(check_deadlock(c));
    return slots ? least_slots(c, slots) : EP_OK;
}

ep_status ep_schedule_check(const ep_schedule *schedule, int32_t *peak_activations, int32_t *slots)
{
    if (!schedule)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_check: schedule is NULL");
    size_t phases = (size_t)schedule->shape.phases, chunks = (size_t)schedule->shape.chunks;
    size_t lanes = 2 * (size_t)epi_schedule_places(schedule);
    checker c = {.s = schedule};
    c.done = malloc(phases * chunks);
    c.deferred = malloc(phases * chunks * sizeof *c.deferred);
    c.order = malloc(lanes * chunks * sizeof *c.order);
    c.number = calloc(lanes, sizeof *c.number);
    ep_status status;
    if (!c.done || !c.deferred || !c.order || !c.number)
        status = epi_fail(EP_ERR_MEMORY, "ep_schedule_check: no memory for %zu messages",
                          lanes * chunks);
    else
        status = check_all(&c, peak_activations, slots);
    free(c.done);
    free(c.deferred);
    free(c.order);
    free(c.number);
    return status;
}
