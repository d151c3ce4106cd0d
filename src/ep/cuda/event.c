/* SPDX-License-Identifier: MIT */
/* Events of calls, as callers use them. */
#include "ep/cuda/internal.h"

#include <stdlib.h>

ep_status epc_event_wait(void *event)
{
    epc_flight *flight = event;
    int before;
    EPI_TRY(epi_gpu_enter(flight->owner->device, &before));
    ep_status status = EP_OK;
    if (flight->unresolved)
        epc_resolve(flight);
    if (flight->second)
        status = epc_run_second(flight, flight->stream);
    if (status == EP_OK && flight->slot < EPC_CAPTURED) /* a graph's work has no end of its own */
        status = epc_end_flight(flight);
    epi_gpu_leave(before);
    return status;
}

static ep_status await_known(epc_flight *flight)
{
    if (flight->unresolved)
        EPI_TRY(epc_resolve(flight));
    return epc_counts_are_in(flight) && flight->report->fits ? EP_OK : epc_end_flight(flight);
}

ep_status epc_event_wait_counts(void *event)
{
    epc_flight *flight = event;
    int before;
    if (!flight->dispatches)
        return epc_event_wait(event);
    if (flight->finished) /* another call may have its report */
        return epc_outcome(flight);
    if (!flight->by_counts)
        return EP_OK;
    EPI_TRY(epi_gpu_enter(flight->owner->device, &before));
    ep_status status = await_known(flight);
    epi_gpu_leave(before);
    return status;
}

/* A kernel that died never reports: the device is asked as well. */
static bool is_running(const epc_flight *flight)
{
    return !epc_is_done(flight) && epi_gpu_event_query(flight->done) == EP_IN_PROGRESS;
}

static ep_status query_flight(epc_flight *flight)
{
    if (flight->second)
        EPI_TRY(epc_run_second(flight, flight->stream));
    if (flight->unresolved && epc_counts_are_in(flight))
        epc_resolve(flight);
    return is_running(flight) ? EP_IN_PROGRESS : epc_event_wait(flight);
}

/* Each half of a call waits for the one before; a graph's work has no end to wait for. */
static ep_status stream_wait(epc_flight *flight, void *stream)
{
    if (flight->second)
        return epc_run_second(flight, stream);
    if (flight->unresolved)
        EPI_TRY(epc_resolve(flight));
    if (flight->finished || flight->slot == EPC_CAPTURED || flight->stream == stream)
        return EP_OK;
    return epi_gpu_stream_wait_event(stream, flight->done);
}

/* Both may launch kernels: on the buffer's device, whichever is the thread's. */
ep_status epc_event_query(void *event)
{
    epc_flight *flight = event;
    int before;
    if (flight->finished)
        return epc_outcome(flight);
    EPI_TRY(epi_gpu_enter(flight->owner->device, &before));
    ep_status status = query_flight(flight);
    epi_gpu_leave(before);
    return status;
}

ep_status epc_event_stream_wait(void *event, void *stream)
{
    epc_flight *flight = event;
    int before;
    EPI_TRY(epi_gpu_enter(flight->owner->device, &before));
    ep_status status = stream_wait(flight, stream);
    epi_gpu_leave(before);
    flight->followed |= status == EP_OK;
    return status;
}

void epc_event_free(void *event)
{
    epc_flight *flight = event;
    if (flight->slot == EPC_CAPTURED)
        return; /* the buffer keeps it */
    if (!flight->finished && flight->followed) {
        flight->has_event = false; /* it frees itself when it is done */
        return;
    }
    if (!flight->finished) {
        ep_status status = epc_event_wait(event);
        if (!flight->finished) /* its hook could not be launched */
            epc_abandon(flight, status);
    }
    epi_gpu_event_destroy(flight->done);
    free(flight);
}
