/* SPDX-License-Identifier: MIT */
#include "ep/op.h"

#include "base/error.h"
#include "ep/buffer.h"
#include "ep/event.h"
#include "ep/ll.h"
#include "ep/op_wait.h"
#include "ep/wait.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------- driving */

static ep_status run_stage(epi_op *op)
{
    const epi_stage *stage = &op->stages[op->stage++];
    if (!op->buffer->trace)
        return stage->run(op);
    int64_t begin = epi_op_now_ns(op);
    ep_status status = stage->run(op);
    epi_op_trace(op, stage->name, begin, epi_op_now_ns(op));
    return status;
}

/* Does what can be done; EP_IN_PROGRESS when a wait is not over. Stops before stage `until`. */
static ep_status advance(epi_op *op, int until)
{
    for (;;) {
        if (op->stage == until)
            return EP_OK;
        if (op->wait.active) {
            EPI_TRY(epi_op_look(op));
            op->wait.active = false;
        }
        if (!op->stages[op->stage].run)
            return EP_OK;
        EPI_TRY(run_stage(op));
    }
}

/* Of calls that hooks complete out of order the later ones count. */
static void add_to_run(epi_aborts *aborts, uint64_t epoch)
{
    uint64_t last = atomic_load(&aborts->last);
    if (epoch <= last)
        return;
    if (epoch != last + 1) {
        atomic_store(&aborts->last, 0);
        atomic_store(&aborts->first, epoch);
    }
    atomic_store(&aborts->last, epoch);
}

/* Why the call is given up: as the rank said that failed first, where another has. A copy, as that
   rank may write over what it said as soon as one of the others has heard of this rank. */
static void find_reason(const epi_op *op, ep_status status, epi_abort *reason)
{
    const ep_buffer *buffer = op->buffer;
    int first = op->aborted_by;
    if (first >= 0) {
        memcpy(reason, epi_buffer_abort(buffer, buffer->rank, first, op->epoch), sizeof *reason);
        if (reason->epoch == op->epoch)
            return;
    }
    reason->epoch = op->epoch;
    reason->status = status;
    reason->origin = buffer->rank;
    /* Ranks that gave calls up in a row and no reason had sent nothing. */
    reason->early = !op->sent || (first >= 0 && epi_op_is_in_run(buffer, first, op->epoch));
    snprintf(reason->text, sizeof reason->text, "%s", ep_last_error());
}

/* Tells the others that this rank gives the call up, and why. */
static void give_up(epi_op *op, ep_status status)
{
    ep_buffer *buffer = op->buffer;
    epi_abort reason;
    find_reason(op, status, &reason);
    op->failed_early = reason.early != 0;
    for (int peer = 0; peer < buffer->num_ranks; peer++) {
        if (buffer->group->masked[peer])
            continue;
        if (op->failed_early)
            add_to_run(epi_buffer_aborts(buffer, peer, buffer->rank), op->epoch);
        /* A peer further behind may still read the reason this would overwrite; it will find the
           call given up for none. */
        if (peer == buffer->rank || epi_buffer_progress(buffer, peer) + EPI_REASONS > op->epoch)
            memcpy(epi_buffer_abort(buffer, peer, buffer->rank, op->epoch), &reason, sizeof reason);
        buffer->window->transport->ops->notify(buffer->window, peer, EPI_SLOT_ABORT, op->epoch);
    }
}

/* Runs a call as far as it goes, or to stage `until`; with `block` it waits for peers. */
static ep_status run(epi_op *op, bool block, int until)
{
    ep_buffer *buffer = op->buffer;
    if (op->previous) {
        ep_status before = block ? ep_event_wait(op->previous) : ep_event_query(op->previous);
        if (before == EP_IN_PROGRESS)
            return before;
        epi_event_drop(op->previous);
        op->previous = NULL;
        if (before != EP_OK && !op->rejected) {
            op->rejected = true;
            op->status = before;
            snprintf(op->message, sizeof op->message, "%s", ep_last_error());
        }
    }
    ep_status status = op->rejected ? epi_fail(op->status, "%s", op->message) : advance(op, until);
    while (status == EP_IN_PROGRESS && block) {
        status = epi_wait(buffer->group, buffer->window, op->name, op->epoch, epi_op_wait_over,
                          epi_op_is_late, op, buffer->group->timeout_ms);
        if (status == EP_OK)
            status = advance(op, until);
    }
    if (status == EP_IN_PROGRESS)
        return status;
    if (status != EP_OK)
        give_up(op, status);
    op->status = status;
    if (status != EP_OK)
        snprintf(op->message, sizeof op->message, "%s", ep_last_error());
    return status;
}

/* ------------------------------------------------------------- beginning and end */

/* Numbers a call. The caller holds the buffer's lock. */
static void begin(epi_op *op)
{
    ep_buffer *buffer = op->buffer;
    op->epoch = ++buffer->epoch;
    op->older = buffer->newest;
    *(buffer->newest ? &buffer->newest->newer : &buffer->oldest) = op;
    buffer->newest = op;
}

/* Tells the peers up to where this rank's calls have ended. Hooks end in any order: the oldest call
   that has not ended counts. */
static void announce_end(ep_buffer *buffer, uint64_t epoch)
{
    for (int i = 1; i <= buffer->num_ranks; i++) {
        int peer = (buffer->rank + i) % buffer->num_ranks;
        if (!buffer->group->masked[peer])
            buffer->window->transport->ops->notify(buffer->window, peer, EPI_SLOT_DONE, epoch);
    }
}

static uint64_t last_ended(const ep_buffer *buffer)
{
    return buffer->oldest ? buffer->oldest->epoch - 1 : buffer->epoch;
}

void epi_op_align(ep_buffer *buffer, uint64_t epoch)
{
    pthread_mutex_lock(&buffer->lock);
    buffer->epoch = epoch;
    uint64_t ended = last_ended(buffer);
    pthread_mutex_unlock(&buffer->lock);
    const epi_transport_ops *ops = buffer->window->transport->ops;
    for (int peer = 0; peer < buffer->num_ranks; peer++)
        if (!buffer->group->masked[peer])
            ops->notify(buffer->window, peer, EPI_SLOT_ENTER, epoch);
    /* The others have ended their calls as well, though what they say here may still be under way:
       the next call must not take them for ranks that are behind. */
    for (int peer = 0; peer < buffer->num_ranks; peer++)
        if (!buffer->group->masked[peer])
            epi_slot_raise(buffer->window, peer, EPI_SLOT_ENTER, epoch);
    announce_end(buffer, ended);
}

/* Ends a call: publishes or undoes what it did, and lets go of it. Its event comes after. */
static void end(epi_op *op, ep_status status)
{
    ep_buffer *buffer = op->buffer;
    op->finish(op, status);
    if (op->crossed) /* as on the ranks whose ep_ll_dispatch failed */
        epi_ll_drop(buffer);
    pthread_mutex_lock(&buffer->lock);
    *(op->older ? &op->older->newer : &buffer->oldest) = op->newer;
    *(op->newer ? &op->newer->older : &buffer->newest) = op->older;
    uint64_t ended = last_ended(buffer);
    pthread_mutex_unlock(&buffer->lock);
    /* A call that failed may have been a low-latency one elsewhere, whose readers are waited for.
     */
    if (op->announces || status != EP_OK)
        announce_end(buffer, ended);
}

static void free_op(epi_op *op)
{
    if (op->seen != op->seen_small)
        free(op->seen);
    free(op);
}

/* ------------------------------------------------------------- queue */

/* Runs queued calls in order until the queue is empty, or without `block` until one must wait, or
   until `last` has completed. The caller holds the lock; it is released while calls run. */
static void run_queue(ep_buffer *buffer, bool block, const ep_event *last)
{
    while (buffer->running) {
        if (!block)
            return;
        pthread_cond_wait(&buffer->done, &buffer->lock);
    }
    while (buffer->head && !(last && epi_event_completed(last))) {
        epi_op *op = buffer->head;
        buffer->running = true;
        pthread_mutex_unlock(&buffer->lock);
        ep_status status = run(op, block, -1);
        if (status != EP_IN_PROGRESS)
            end(op, status);
        pthread_mutex_lock(&buffer->lock);
        buffer->running = false;
        if (status != EP_IN_PROGRESS) {
            buffer->head = op->next;
            if (!buffer->head)
                buffer->tail = NULL;
            if (op->event)
                epi_event_complete(op->event, status, op->message);
            free_op(op);
        }
        pthread_cond_broadcast(&buffer->done);
        if (status == EP_IN_PROGRESS)
            return;
    }
}

void *epi_worker_main(void *argument)
{
    ep_buffer *buffer = argument;
    pthread_mutex_lock(&buffer->lock);
    for (;;) {
        while (!buffer->head && !buffer->stop)
            pthread_cond_wait(&buffer->work, &buffer->lock);
        if (!buffer->head)
            break;
        run_queue(buffer, true, NULL);
    }
    pthread_mutex_unlock(&buffer->lock);
    return NULL;
}

static void wait_for_queue(ep_buffer *buffer)
{
    if (!buffer->has_worker) {
        run_queue(buffer, true, NULL);
        return;
    }
    while (buffer->head || buffer->running)
        pthread_cond_wait(&buffer->done, &buffer->lock);
}

void epi_op_drain(ep_buffer *buffer)
{
    pthread_mutex_lock(&buffer->lock);
    wait_for_queue(buffer);
    pthread_mutex_unlock(&buffer->lock);
}

static void enqueue(epi_op *op)
{
    ep_buffer *buffer = op->buffer;
    op->next = NULL;
    if (buffer->tail)
        buffer->tail->next = op;
    else
        buffer->head = op;
    buffer->tail = op;
    pthread_cond_signal(&buffer->work);
}

/* Ends a call that no queue holds. */
static void complete(epi_op *op, ep_status status)
{
    ep_buffer *buffer = op->buffer;
    end(op, status);
    pthread_mutex_lock(&buffer->lock);
    epi_event_complete(op->event, status, op->message);
    pthread_mutex_unlock(&buffer->lock);
    free_op(op);
}

/* A call completed by its hook: sends now; the event carries the rest. */
static ep_status submit_hook(epi_op *op)
{
    ep_buffer *buffer = op->buffer;
    pthread_mutex_lock(&buffer->lock);
    wait_for_queue(buffer);
    begin(op);
    pthread_mutex_unlock(&buffer->lock);
    ep_status status = run(op, true, op->eager);
    if (status == EP_OK)
        epi_event_defer(op->event, op);
    else
        complete(op, status);
    return EP_OK;
}

ep_status epi_op_run_hook(epi_op *op, bool block)
{
    ep_status status = run(op, block, -1);
    if (status != EP_IN_PROGRESS)
        complete(op, status);
    return status;
}

/* Whatever a call needs beside its own object. */
static ep_status equip(epi_op *op, ep_event **event)
{
    op->aborted_by = -1;
    op->seen = op->seen_small;
    if (op->buffer->num_ranks > EPI_SEEN_SMALL)
        op->seen = calloc((size_t)op->buffer->num_ranks, sizeof *op->seen);
    if (!op->seen)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", op->name);
    return event ? epi_event_create(op, event) : EP_OK;
}

static ep_status submit_queued(epi_op *op)
{
    ep_buffer *buffer = op->buffer;
    pthread_mutex_lock(&buffer->lock);
    begin(op);
    enqueue(op);
    /* Without a worker the peers would otherwise wait for this rank's next look. */
    if (!buffer->has_worker)
        run_queue(buffer, false, NULL);
    pthread_mutex_unlock(&buffer->lock);
    return EP_OK;
}

static ep_status run_now(epi_op *op)
{
    ep_buffer *buffer = op->buffer;
    pthread_mutex_lock(&buffer->lock);
    wait_for_queue(buffer);
    begin(op);
    pthread_mutex_unlock(&buffer->lock);
    ep_status status = run(op, true, -1);
    end(op, status);
    if (status != EP_OK)
        epi_fail(status, "%s", op->message);
    free_op(op);
    return status;
}

ep_status epi_op_submit(epi_op *op, ep_event **event)
{
    if (event)
        *event = NULL;
    ep_status status = equip(op, event);
    if (status != EP_OK) {
        /* Still this rank's part of the collective: it fails in turn. */
        op->rejected = true;
        op->status = status;
        snprintf(op->message, sizeof op->message, "%s", ep_last_error());
        return run_now(op);
    }
    if (!event)
        return run_now(op);
    return op->eager ? submit_hook(op) : submit_queued(op);
}

static void finish_rejected(epi_op *op, ep_status status)
{
    (void)op;
    (void)status;
}

bool epi_op_refusals_only(const ep_buffer *buffer)
{
    const epi_op *op = buffer->head;
    while (op && op->finish == finish_rejected)
        op = op->next;
    return op == NULL;
}

ep_status epi_op_reject(ep_buffer *buffer, const char *name, ep_status status)
{
    static const epi_stage none[] = {{NULL, NULL}};
    epi_op *op = calloc(1, sizeof *op);
    if (!op)
        return status; /* the others find out by their timeout */
    op->buffer = buffer;
    op->name = name;
    op->stages = none;
    op->finish = finish_rejected;
    op->rejected = true;
    op->status = status;
    snprintf(op->message, sizeof op->message, "%s", ep_last_error());
    if (!buffer->has_worker)
        return epi_op_submit(op, NULL);
    pthread_mutex_lock(&buffer->lock);
    begin(op);
    op->aborted_by = -1;
    enqueue(op);
    pthread_mutex_unlock(&buffer->lock);
    return status;
}

/* ------------------------------------------------------------- events */

void epi_op_await_told(ep_buffer *buffer, ep_event *event)
{
    pthread_mutex_lock(&buffer->lock);
    while (!epi_event_is_told(event) && !epi_event_completed(event))
        pthread_cond_wait(&buffer->done, &buffer->lock);
    if (epi_event_is_told(event))
        epi_event_hand_out(event);
    pthread_mutex_unlock(&buffer->lock);
}

ep_status epi_op_run_until(ep_buffer *buffer, ep_event *event, bool block)
{
    pthread_mutex_lock(&buffer->lock);
    if (!buffer->has_worker)
        run_queue(buffer, block, event);
    while (block && !epi_event_completed(event))
        pthread_cond_wait(&buffer->done, &buffer->lock);
    bool completed = epi_event_completed(event);
    pthread_mutex_unlock(&buffer->lock);
    return completed ? EP_OK : EP_IN_PROGRESS;
}
