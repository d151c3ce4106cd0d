/* SPDX-License-Identifier: MIT */
/*
 * Events: completion of a call that went on after it returned.
 *
 * An event belongs to the buffer whose call made it and must be released before
 * the buffer is destroyed. It completes in the order of the rank's calls.
 */
#ifndef ENTREPOT_EVENT_H
#define ENTREPOT_EVENT_H

#include "entrepot/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ep_event ep_event;

/**
 * Waits until the call has completed and returns its status; on failure the
 * waiting thread's last error is the call's message. On a buffer without
 * threads the caller's thread does the call's work here. May be called again,
 * and by several threads when the buffer has threads of its own.
 */
EP_API ep_status ep_event_wait(ep_event *event);

/** EP_IN_PROGRESS, or what ep_event_wait would return; never waits for a peer. On a buffer without
    threads it does the work that can be done now. */
EP_API ep_status ep_event_query(ep_event *event);

/**
 * Of ep_dispatch and ep_combine_backward: waits until it is known what comes. Then `recv` of the
 * call is as it will be, to make tensors of and to pass on, but its rows come only with the event;
 * that has to be waited for, and `recv` to be released, also should the call fail after all. Of
 * other calls, and on a buffer without threads, it is ep_event_wait. On failure the call's error.
 */
EP_API ep_status ep_event_wait_counts(ep_event *event);

/** Makes work put into a device's `stream` from now on wait for the call, without waiting itself;
    of a call with a hook, receives in that stream. On a CPU buffer it is ep_event_wait. */
EP_API ep_status ep_event_stream_wait(ep_event *event, void *stream);

/** Waits for the call, then frees the event. A device's call that ep_event_stream_wait has put a
    stream behind is not waited for; should it fail, the next call on the buffer says so. NULL is
    allowed. */
EP_API void ep_event_release(ep_event *event);

#ifdef __cplusplus
}
#endif
#endif
