/* SPDX-License-Identifier: MIT */
/* Events from inside: shared by the caller, the call they complete and calls that depend on them.
 */
#ifndef EPI_EP_EVENT_H
#define EPI_EP_EVENT_H

#include "ep/op.h"

/* Makes the event of `op`; the caller and the op hold it. */
ep_status epi_event_create(epi_op *op, ep_event **event);
/* Publishes the outcome and drops the op's hold. Under the buffer's lock. */
void epi_event_complete(ep_event *event, ep_status status, const char *message);
/* The op's remaining stages run where the event is waited for. */
void epi_event_defer(ep_event *event, epi_op *op);
bool epi_event_completed(const ep_event *event);

/* Of a dispatch: `recv` is known before its rows are there. Whoever takes it first, the caller or
   the end of the call, writes it to `target`. */
void epi_event_tell(ep_event *event, const ep_recv *recv, ep_recv *target);
/* Takes it at the end of the call; false: the caller has it already. */
bool epi_event_take(ep_event *event);
/* Under the buffer's lock: whether the caller can have it; and does so. */
bool epi_event_is_told(const ep_event *event);
void epi_event_hand_out(ep_event *event);

/* The event of a call that a backend has; one holder. */
ep_status epi_event_of_device(ep_buffer *buffer, void *device, ep_event **event);
void *epi_event_device(const ep_event *event);

ep_event *epi_event_hold(ep_event *event);
void epi_event_drop(ep_event *event);

/* Completes `event`, doing the calls before it where no worker does; in op.c. */
ep_status epi_op_run_until(ep_buffer *buffer, ep_event *event, bool block);
/* Waits until `event` was told of what comes, or completed; in op.c. */
void epi_op_await_told(ep_buffer *buffer, ep_event *event);
/* Runs the rest of a deferred call; in op.c. */
ep_status epi_op_run_hook(epi_op *op, bool block);

#endif
