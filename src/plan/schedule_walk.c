/* SPDX-License-Identifier: MIT */
/*
 * One order of all ranks' operations that respects what they wait for. A rank is
 * walked until it waits, then the next that may move; a rank that waits is woken
 * by the message or the room it waits for. Whether everything finishes does not
 * depend on the order chosen: messages are only ever added by the one sender and
 * taken by the one receiver of a lane.
 */
#include "base/error.h"
#include "plan/schedule.h"

#include <stdlib.h>
#include <string.h>

ep_status epi_walk_begin(epi_walk *w, const ep_schedule *s, int32_t slots)
{
    size_t ranks = (size_t)s->shape.ranks, lanes = 2 * (size_t)epi_schedule_places(s);
    *w = (epi_walk){.schedule = s, .slots = slots, .current = -1};
    w->next = malloc(ranks * sizeof *w->next);
    w->sent = calloc(lanes, sizeof *w->sent);
    w->received = calloc(lanes, sizeof *w->received);
    w->ready = malloc(ranks * sizeof *w->ready);
    w->waiting = calloc(ranks, sizeof *w->waiting);
    if (!w->next || !w->sent || !w->received || !w->ready || !w->waiting) {
        epi_walk_end(w);
        return epi_fail(EP_ERR_MEMORY, "schedule: no memory to walk %zu ranks", ranks);
    }
    memcpy(w->next, s->first, ranks * sizeof *w->next);
    for (int32_t rank = s->shape.ranks - 1; rank >= 0; rank--)
        w->ready[w->ready_count++] = rank;
    return EP_OK;
}

void epi_walk_end(epi_walk *w)
{
    free(w->next);
    free(w->sent);
    free(w->received);
    free(w->ready);
    free(w->waiting);
    memset(w, 0, sizeof *w);
}

static void wake(epi_walk *w, int32_t rank)
{
    if (!w->waiting[rank])
        return;
    w->waiting[rank] = false;
    w->ready[w->ready_count++] = rank;
}

/* Moves the message of a send or receive; false when it has to wait. */
static bool transfer(epi_walk *w, int32_t rank, const ep_schedule_op *op, int32_t *lane,
                     int32_t *number)
{
    int32_t place = rank * w->schedule->shape.phases + op->phase;
    if (op->kind == EP_OP_SEND) {
        *lane = epi_schedule_out_lane(w->schedule, place, op->payload);
        if (w->slots && w->sent[*lane] - w->received[*lane] >= w->slots)
            return false;
        *number = w->sent[*lane]++;
    } else {
        *lane = 2 * place + op->payload;
        if (w->sent[*lane] == w->received[*lane])
            return false;
        *number = w->received[*lane]++;
    }
    wake(w, op->peer);
    return true;
}

bool epi_walk_next(epi_walk *w, int32_t *rank, size_t *index, int32_t *lane, int32_t *number)
{
    const ep_schedule *s = w->schedule;
    for (;;) {
        if (w->current < 0) {
            if (w->ready_count == 0)
                return false;
            w->current = w->ready[--w->ready_count];
        }
        *rank = w->current;
        *index = w->next[*rank];
        const ep_schedule_op *op = &s->ops[*index];
        if (*index == s->first[*rank + 1]) {
            w->current = -1;
        } else if ((op->kind == EP_OP_SEND || op->kind == EP_OP_RECV) &&
                   !transfer(w, *rank, op, lane, number)) {
            w->waiting[*rank] = true;
            w->current = -1;
        } else {
            w->next[*rank]++;
            return true;
        }
    }
}

bool epi_walk_finished(const epi_walk *w)
{
    for (int32_t rank = 0; rank < w->schedule->shape.ranks; rank++)
        if (w->next[rank] != w->schedule->first[rank + 1])
            return false;
    return true;
}
