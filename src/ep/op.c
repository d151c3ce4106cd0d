/* SPDX-License-Identifier: MIT */
#include "ep/op.h"

#include "base/error.h"
#include "ep/buffer.h"
#include "ep/event.h"
#include "ep/wait.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------- waiting */

void epi_op_await(epi_op *op, int slot, uint64_t value, const bool *from)
{
    op->wait = (epi_wait_for){.active = true, .slot = slot, .value = value, .from = from};
}

void epi_op_await_left(epi_op *op, int slot, uint64_t value)
{
    epi_op_await(op, slot, value, NULL);
    op->wait.or_past = true;
}

void epi_op_await_entered(epi_op *op, uint64_t epoch)
{
    op->wait = (epi_wait_for){.active = true, .entered = true, .value = epoch};
}

bool epi_op_gave_up(const ep_buffer *buffer, int source, uint64_t epoch)
{
    /* The abort text names its call: the word alone may already speak of a later one. */
    return epi_slot_load(buffer->window, source, EPI_SLOT_ABORT) >= epoch &&
           epi_buffer_mailbox(buffer, buffer->rank, source, epoch)->abort.epoch == epoch;
}

static bool has_arrived(const epi_op *op, int source)
{
    const epi_wait_for *wait = &op->wait;
    if ((wait->from && !wait->from[source]) || op->buffer->group->masked[source])
        return true;
    uint64_t seen = wait->entered ? epi_buffer_progress(op->buffer, source)
                                  : epi_slot_load(op->buffer->window, source, wait->slot);
    return seen >= wait->value ||
           (wait->or_past && epi_buffer_progress(op->buffer, source) > wait->value);
}

static int64_t now_ns(const epi_op *op)
{
    epi_transport *transport = op->buffer->window->transport;
    return transport->ops->now_ns(transport);
}

/* Books how long `source` was waited for. */
static void arrived(epi_op *op, int source, int64_t now)
{
    op->seen[source] = true;
    op->wait.missing--;
    if (!op->wait.since_ns)
        return;
    atomic_fetch_add_explicit(&op->buffer->wait_ns[source], now - op->wait.since_ns,
                              memory_order_relaxed);
    if (op->wait.cost)
        op->wait.cost[source] += now - op->wait.since_ns;
}

/* Looks who has come. The clock is read only when somebody was waited for. */
static void look(epi_op *op)
{
    epi_wait_for *wait = &op->wait;
    int64_t now = 0;
    if (!wait->begun) {
        memset(op->seen, 0, (size_t)op->buffer->num_ranks * sizeof *op->seen);
        wait->missing = op->buffer->num_ranks;
    }
    for (int source = 0; source < op->buffer->num_ranks; source++) {
        if (op->seen[source] || !has_arrived(op, source))
            continue;
        if (wait->since_ns && !now)
            now = now_ns(op);
        arrived(op, source, now);
    }
    if (!wait->begun && wait->missing)
        wait->since_ns = now_ns(op);
    wait->begun = true;
}

/* True when the wait is over: everybody arrived, or somebody gave the call up. */
static bool wait_over(void *context)
{
    epi_op *op = context;
    look(op);
    if (op->wait.missing == 0)
        return true;
    if (op->wait.entered)
        return false;
    for (int source = 0; source < op->buffer->num_ranks; source++) {
        if (op->seen[source] || !epi_op_gave_up(op->buffer, source, op->epoch))
            continue;
        /* Its last notifications may have come between the two looks. */
        if (has_arrived(op, source))
            continue;
        op->aborted_by = source;
        return true;
    }
    return false;
}

static bool is_late(void *context, int source)
{
    return !has_arrived(context, source);
}

/* ------------------------------------------------------------- driving */

ep_status epi_op_aborted(epi_op *op, int source)
{
    op->aborted_by = source;
    const epi_abort *abort =
        &epi_buffer_mailbox(op->buffer, op->buffer->rank, source, op->epoch)->abort;
    if (abort->epoch != op->epoch) /* it had no room to say why, see give_up */
        return epi_fail(EP_ERR_ABORTED, "%s (call %llu): rank %d gave up", op->name,
                        (unsigned long long)op->epoch, source);
    return epi_fail(EP_ERR_ABORTED, "%s (call %llu): rank %d gave up: %.*s", op->name,
                    (unsigned long long)op->epoch, (int)abort->origin, (int)sizeof abort->text - 1,
                    abort->text);
}

/* Does what can be done; EP_IN_PROGRESS when a wait is not over. Stops before stage `until`. */
static ep_status advance(epi_op *op, int until)
{
    for (;;) {
        if (op->stage == until)
            return EP_OK;
        if (op->wait.active) {
            if (!wait_over(op))
                return EP_IN_PROGRESS;
            if (op->aborted_by >= 0)
                return epi_op_aborted(op, op->aborted_by);
            op->wait.active = false;
        }
        if (!op->stages[op->stage])
            return EP_OK;
        EPI_TRY(op->stages[op->stage++](op));
    }
}

/* Tells the others that this rank gives the call up, and why. */
static void give_up(epi_op *op, ep_status status)
{
    ep_buffer *buffer = op->buffer;
    const epi_abort *cause = NULL;
    if (op->aborted_by >= 0)
        cause = &epi_buffer_mailbox(buffer, buffer->rank, op->aborted_by, op->epoch)->abort;
    if (cause && cause->epoch != op->epoch)
        cause = NULL;
    for (int peer = 0; peer < buffer->num_ranks; peer++) {
        if (buffer->group->masked[peer])
            continue;
        /* A peer further behind may still read the mail this would overwrite; it will find the
           call given up by the word alone, or by its own timeout. */
        if (peer == buffer->rank || epi_buffer_progress(buffer, peer) + 1 >= op->epoch) {
            epi_abort *abort = &epi_buffer_mailbox(buffer, peer, buffer->rank, op->epoch)->abort;
            abort->status = cause ? cause->status : status;
            abort->origin = cause ? cause->origin : buffer->rank;
            snprintf(abort->text, sizeof abort->text, "%s", cause ? cause->text : ep_last_error());
            abort->epoch = op->epoch;
        }
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
        status = epi_wait(buffer->group, buffer->window, op->name, op->epoch, wait_over, is_late,
                          op, buffer->group->timeout_ms);
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

/* ------------------------------------------------------------- queue */

static void free_op(epi_op *op)
{
    free(op->seen);
    free(op);
}

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
            op->finish(op, status);
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
    op->finish(op, status);
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
    op->epoch = ++buffer->epoch;
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
    op->seen = calloc((size_t)op->buffer->num_ranks, sizeof *op->seen);
    if (!op->seen)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", op->name);
    return event ? epi_event_create(op, event) : EP_OK;
}

static ep_status submit_queued(epi_op *op)
{
    ep_buffer *buffer = op->buffer;
    pthread_mutex_lock(&buffer->lock);
    op->epoch = ++buffer->epoch;
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
    op->epoch = ++buffer->epoch;
    pthread_mutex_unlock(&buffer->lock);
    ep_status status = run(op, true, -1);
    op->finish(op, status);
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

ep_status epi_op_reject(ep_buffer *buffer, const char *name, ep_status status)
{
    static const epi_stage none[] = {NULL};
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
    op->epoch = ++buffer->epoch;
    op->aborted_by = -1;
    enqueue(op);
    pthread_mutex_unlock(&buffer->lock);
    return status;
}

/* ------------------------------------------------------------- events */

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
