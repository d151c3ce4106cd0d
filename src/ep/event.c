/* SPDX-License-Identifier: MIT */
#include "ep/event.h"

#include "base/error.h"
#include "ep/backend.h"
#include "ep/buffer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct ep_event {
    ep_buffer *buffer;
    _Atomic int holders;
    epi_op *deferred;       /* the hook's part of the call; NULL: a queue has it */
    _Atomic bool completed; /* release: the outcome below is final */
    ep_status status;
    char message[512];
    void *device; /* the backend's part; NULL on the CPU */
    /* What a dispatch brings, under the buffer's lock. */
    enum { UNKNOWN, TOLD, TAKEN } known;
    ep_recv recv;
    ep_recv *target;
};

ep_status epi_event_create(epi_op *op, ep_event **out)
{
    ep_event *event = calloc(1, sizeof *event);
    if (!event)
        return epi_fail(EP_ERR_MEMORY, "out of memory for an event");
    event->buffer = op->buffer;
    atomic_init(&event->holders, 2);
    atomic_fetch_add(&op->buffer->num_objects, 1);
    op->event = event;
    *out = event;
    return EP_OK;
}

ep_event *epi_event_hold(ep_event *event)
{
    if (event)
        atomic_fetch_add(&event->holders, 1);
    return event;
}

void epi_event_drop(ep_event *event)
{
    if (!event || atomic_fetch_sub(&event->holders, 1) != 1)
        return;
    if (event->device)
        event->buffer->backend->event_free(event->device);
    atomic_fetch_sub(&event->buffer->num_objects, 1);
    free(event);
}

void epi_event_complete(ep_event *event, ep_status status, const char *message)
{
    event->status = status;
    snprintf(event->message, sizeof event->message, "%s", message);
    /* release: pairs with the acquire in epi_event_completed */
    atomic_store_explicit(&event->completed, true, memory_order_release);
    epi_event_drop(event);
}

void epi_event_defer(ep_event *event, epi_op *op)
{
    event->deferred = op;
}

/* Goes on with the call that the event completes. */
static ep_status go_on(ep_event *event, bool block)
{
    if (event->deferred)
        return epi_op_run_hook(event->deferred, block);
    return epi_op_run_until(event->buffer, event, block);
}

void epi_event_tell(ep_event *event, const ep_recv *recv, ep_recv *target)
{
    ep_buffer *buffer = event->buffer;
    pthread_mutex_lock(&buffer->lock);
    event->recv = *recv;
    event->target = target;
    event->known = TOLD;
    pthread_cond_broadcast(&buffer->done);
    pthread_mutex_unlock(&buffer->lock);
}

bool epi_event_take(ep_event *event)
{
    pthread_mutex_lock(&event->buffer->lock);
    bool first = event->known == TOLD;
    event->known = TAKEN;
    pthread_mutex_unlock(&event->buffer->lock);
    return first;
}

bool epi_event_is_told(const ep_event *event)
{
    return event->known == TOLD;
}

void epi_event_hand_out(ep_event *event)
{
    size_t size = event->target->size;
    event->recv.size = size;
    memcpy(event->target, &event->recv, size < sizeof event->recv ? size : sizeof event->recv);
    event->known = TAKEN;
}

bool epi_event_completed(const ep_event *event)
{
    return atomic_load_explicit(&event->completed, memory_order_acquire);
}

static ep_status outcome(const ep_event *event)
{
    return event->status == EP_OK ? EP_OK : epi_fail(event->status, "%s", event->message);
}

ep_status ep_event_wait(ep_event *event)
{
    if (!event)
        return epi_fail(EP_ERR_ARGUMENT, "ep_event_wait: event is NULL");
    if (event->device)
        return event->buffer->backend->event_wait(event->device);
    if (!epi_event_completed(event))
        go_on(event, true);
    return outcome(event);
}

ep_status ep_event_query(ep_event *event)
{
    if (!event)
        return epi_fail(EP_ERR_ARGUMENT, "ep_event_query: event is NULL");
    if (event->device)
        return event->buffer->backend->event_query(event->device);
    if (!epi_event_completed(event) && go_on(event, false) == EP_IN_PROGRESS)
        return EP_IN_PROGRESS;
    return outcome(event);
}

/* Without a worker nothing goes on by itself: the whole call is done here. */
ep_status ep_event_wait_counts(ep_event *event)
{
    if (!event)
        return epi_fail(EP_ERR_ARGUMENT, "ep_event_wait_counts: event is NULL");
    if (event->device)
        return event->buffer->backend->event_wait_counts(event->device);
    if (event->deferred || !event->buffer->has_worker)
        return ep_event_wait(event);
    epi_op_await_told(event->buffer, event);
    return epi_event_completed(event) ? outcome(event) : EP_OK;
}

ep_status ep_event_stream_wait(ep_event *event, void *stream)
{
    if (!event)
        return epi_fail(EP_ERR_ARGUMENT, "ep_event_stream_wait: event is NULL");
    return event->device ? event->buffer->backend->event_stream_wait(event->device, stream)
                         : ep_event_wait(event);
}

ep_status epi_event_of_device(ep_buffer *buffer, void *device, ep_event **out)
{
    ep_event *event = calloc(1, sizeof *event);
    if (!event)
        return epi_fail(EP_ERR_MEMORY, "out of memory for an event");
    event->buffer = buffer;
    event->device = device;
    atomic_init(&event->holders, 1);
    atomic_fetch_add(&buffer->num_objects, 1);
    *out = event;
    return EP_OK;
}

void *epi_event_device(const ep_event *event)
{
    return event->device;
}

void ep_event_release(ep_event *event)
{
    if (!event)
        return;
    if (!event->device) /* a device's part waits, if it must, when it is freed */
        ep_event_wait(event);
    epi_event_drop(event);
}
