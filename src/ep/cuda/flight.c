/* SPDX-License-Identifier: MIT */
/* Calls in flight: their order, and what they hold until done. */
#include "ep/cuda/internal.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static epc_report *report_at(const epc_buffer *b, int slot)
{
    return (epc_report *)(b->reports + (size_t)slot * b->report_bytes);
}

static uint32_t done_serial(const epc_report *report)
{
    /* acquire: what the kernel wrote before it is read after */
    return __atomic_load_n(&report->done, __ATOMIC_ACQUIRE);
}

bool epc_is_done(const epc_flight *flight)
{
    return done_serial(flight->report) == flight->serial;
}

bool epc_counts_are_in(const epc_flight *flight)
{
    return __atomic_load_n(&flight->report->counted, __ATOMIC_ACQUIRE) == flight->serial;
}

/* ---------------------------------------------------------------- ends of calls */

ep_status epc_outcome(const epc_flight *flight)
{
    return flight->status == EP_OK ? EP_OK : epi_fail(flight->status, "%s", flight->message);
}

/* A call of two halves fails with the first. */
static ep_status tell_halves(const epc_flight *flight, ep_status status)
{
    epc_buffer *b = flight->owner;
    if (flight->first_half && status != EP_OK) {
        b->half_failed = status;
        snprintf(b->half_failure, sizeof b->half_failure, "%s", ep_last_error());
    }
    if (!flight->second_half || b->half_failed == EP_OK)
        return status;
    status = epi_fail(b->half_failed, "%s", b->half_failure);
    b->half_failed = EP_OK;
    return status;
}

/* Whether a rank that was not heard from can still come to write its rows: it does once it has the
   headers and counts of all. Those of a rank that refuses never come. */
static bool may_be_written(const epc_flight *flight)
{
    const epc_report *report = flight->report;
    switch (report->fail) {
    case EPC_FAIL_TIMEOUT:
        return true;
    case EPC_FAIL_ABORTED: /* of the reason's status: those that come before any row moves */
        switch (report->detail[0] >> 8 & 0xff) {
        case EP_ERR_ARGUMENT:
        case EP_ERR_MEMORY:
        case EP_ERR_STATE:
        case EP_ERR_UNSUPPORTED:
        case EP_ERR_MISMATCH:
        case EP_ERR_CAPACITY:
            return false;
        default:
            return true;
        }
    default: /* the verdict of all, or the rows have come */
        return false;
    }
}

/* Memory that peers write, at the end of a call; `ended` by the device, `status` in all. */
static void hold_or_settle(const epc_flight *flight, ep_status ended, ep_status status)
{
    epc_buffer *b = flight->owner;
    if (ended != EP_OK || may_be_written(flight))
        epc_hold(b, flight->written, flight->written_bytes, flight->serial, flight->ranks);
    else if (flight->normal && (status == EP_OK || flight->report->fail == EPC_FAIL_CAPACITY))
        epc_settle(b, flight->serial, flight->ranks);
}

/* `status`: how the device ended it; when that failed, the report is an earlier call's. */
static void finish(epc_flight *flight, ep_status status)
{
    epc_buffer *b = flight->owner;
    ep_status ended = status;
    if (status == EP_OK)
        status = epc_kernel_error(flight);
    status = tell_halves(flight, status);
    hold_or_settle(flight, ended, status);
    flight->finished = true;
    if (status != EP_OK && flight->status == EP_OK) {
        flight->status = status;
        snprintf(flight->message, sizeof flight->message, "%s", ep_last_error());
    }
    for (int i = 0; i < 4; i++)
        epc_give(b, flight->blocks[i]);
    memset(flight->blocks, 0, sizeof flight->blocks);
    if (flight->delivers && flight->status != EP_OK)
        epc_ll_recv_retire(flight->handle);
    if (flight->handle)
        epc_core.handle_release(flight->handle);
    flight->handle = NULL;
    if (flight->slot < EPC_MAX_FLIGHTS)
        b->free_slots |= 1ull << flight->slot;
    /* Nobody waits for this one: the next call says so. */
    if (!flight->has_event && !flight->claimed && !flight->first_half && flight->status != EP_OK &&
        b->failed == EP_OK) {
        b->failed = flight->status;
        snprintf(b->failure, sizeof b->failure, "%s", flight->message);
    }
}

static void unlink_flight(epc_flight *flight)
{
    for (epc_flight **at = &flight->owner->flights; *at; at = &(*at)->next)
        if (*at == flight) {
            *at = flight->next;
            return;
        }
}

void epc_collect(epc_buffer *b)
{
    for (epc_flight **at = &b->flights; *at;) {
        epc_flight *flight = *at;
        if (flight->unresolved || flight->second || !epc_is_done(flight)) {
            at = &flight->next;
            continue;
        }
        *at = flight->next;
        finish(flight, EP_OK);
        if (flight->has_event)
            continue;
        epi_gpu_event_destroy(flight->done);
        free(flight);
    }
    epc_report *captured = report_at(b, EPC_CAPTURED);
    if (done_serial(captured) == 0 && captured->fail == EPC_OK)
        return;
    epc_flight any = {.owner = b, .call = "a captured call", .report = captured};
    if (epc_kernel_error(&any) != EP_OK && b->failed == EP_OK) {
        b->failed = epc_kernel_error(&any);
        snprintf(b->failure, sizeof b->failure, "%s", ep_last_error());
    }
    captured->fail = EPC_OK;
}

/* A pause that leaves the core to others once the wait is not a short one. */
static void pause_a_little(int spins)
{
    static const struct timespec nap = {0, 20000};
    if (spins > 20000)
        nanosleep(&nap, NULL);
    else if (spins > 200)
        sched_yield();
}

/* A kernel that died (a fault of the device) reports nothing: waits ask for it now and then. */
static bool has_died(const epc_flight *flight, int spins)
{
    return spins % 65536 == 65535 && epi_gpu_event_query(flight->done) != EP_IN_PROGRESS &&
           !epc_is_done(flight);
}

bool epc_await_oldest(epc_buffer *b)
{
    epc_flight *oldest = b->flights;
    if (!oldest || oldest->unresolved || oldest->second)
        return false;
    for (int spins = 0; !epc_is_done(oldest); spins++) {
        if (has_died(oldest, spins))
            return false;
        pause_a_little(spins);
    }
    epc_collect(b);
    return true;
}

epc_block *epc_take_follower(epc_flight *flight, const epc_handle *handle, size_t bytes)
{
    epc_buffer *b = flight->owner;
    epc_block *block = NULL;
    if (handle && (size_t)handle->follower > bytes)
        block = epc_take_shared(b, (size_t)handle->follower);
    if (!block)
        block = epc_take_shared(b, bytes);
    while (!block && flight->slot < EPC_CAPTURED && epc_await_oldest(b))
        block = epc_take_shared(b, bytes);
    return block;
}

bool epc_await_counts(epc_flight *flight)
{
    for (int spins = 0;; spins++) {
        if (epc_counts_are_in(flight))
            return true;
        if (epc_is_done(flight))
            return epc_counts_are_in(flight);
        if (has_died(flight, spins))
            return false;
        pause_a_little(spins);
    }
}

ep_status epc_await_end(epc_flight *flight)
{
    EPI_TRY(epi_gpu_event_wait(flight->done));
    return epc_is_done(flight)
               ? EP_OK
               : epi_fail(EP_ERR_DEVICE, "%s (call %u): the kernel ended without a report",
                          flight->call, flight->serial);
}

void epc_abandon(epc_flight *flight, ep_status status)
{
    if (flight->unresolved)
        epc_resolve(flight);
    if (flight->finished)
        return;
    epi_gpu_event_wait(flight->done); /* what was launched of it: it may write to its memory */
    free(flight->second);
    flight->second = NULL;
    unlink_flight(flight);
    finish(flight, status);
}

/* The receiving half of a low-latency call will not be made. */
static void give_up_second(epc_flight *flight)
{
    flight->status = EP_ERR_ABORTED;
    snprintf(flight->message, sizeof flight->message,
             "%s (call %u): the ranks were brought in step before its rows were received",
             flight->call, flight->serial);
    epc_abandon(flight, EP_ERR_ABORTED);
}

void epc_resolve_all(epc_buffer *b)
{
    for (epc_flight *flight = b->flights; flight; flight = flight->next)
        if (flight->unresolved)
            epc_resolve(flight); /* its own event tells how it went */
}

ep_status epc_end_all(epc_buffer *b)
{
    epc_resolve_all(b);
    if (b->has_last)
        EPI_TRY(epi_gpu_event_wait(b->last_done));
    for (epc_flight *flight = b->flights, *next; flight; flight = next) {
        next = flight->next;
        if (flight->second)
            give_up_second(flight);
    }
    epc_collect(b);
    b->failed = EP_OK;
    return EP_OK;
}

ep_status epc_end_flight(epc_flight *flight)
{
    if (!flight->finished) {
        ep_status status = epc_await_end(flight);
        if (flight->second_half)
            epc_collect(flight->owner); /* the first half, and this one where nothing is wrong */
        if (!flight->finished) {
            unlink_flight(flight);
            finish(flight, status);
        }
    }
    return epc_outcome(flight);
}

ep_status epc_end(epc_flight *flight)
{
    flight->has_event = true; /* we free it */
    ep_status status = epc_end_flight(flight);
    epi_gpu_event_destroy(flight->done);
    free(flight);
    return status;
}

/* ---------------------------------------------------------------- beginnings */

uint32_t epc_mask_word(const epc_buffer *b)
{
    uint64_t masked = 0;
    for (int r = 0; r < b->num_ranks; r++)
        masked |= (uint64_t)b->buffer->group->masked[r] << r;
    return (uint32_t)(masked ^ masked >> 32);
}

uint64_t epc_other_ranks(const epc_buffer *b)
{
    uint64_t others = 0;
    for (int r = 0; r < b->num_ranks; r++)
        if (r != b->rank && !b->buffer->group->masked[r])
            others |= 1ull << r;
    return others;
}

void epc_fill_comm(epc_buffer *b, epc_comm *comm)
{
    *comm = b->comm;
    comm->masked = 0;
    for (int r = 0; r < b->num_ranks; r++)
        comm->masked |= (uint64_t)b->buffer->group->masked[r] << r;
}

/* Earlier calls must be settled: a dispatch whose rows are not known yet holds the free memory. */
static ep_status settle_earlier(epc_buffer *b)
{
    epc_resolve_all(b);
    epc_collect(b);
    if (b->failed == EP_OK)
        return EP_OK;
    ep_status status = b->failed;
    b->failed = EP_OK;
    return epi_fail(status, "an earlier call failed: %s", b->failure);
}

static ep_status order_streams(epc_buffer *b, void *stream, ep_event *previous, bool capturing)
{
    epc_flight *before = previous ? epc_core.event_device(previous) : NULL;
    if (before && before->stream != stream)
        EPI_TRY(epi_gpu_stream_wait_event(stream, before->done));
    if (b->has_last && b->last_stream != stream && !capturing)
        EPI_TRY(epi_gpu_stream_wait_event(stream, b->last_done));
    return EP_OK;
}

/* The first that has nothing left to launch; NULL: there is none. */
static const epc_flight *oldest_complete(const epc_buffer *b)
{
    const epc_flight *flight = b->flights;
    while (flight && (flight->unresolved || flight->second))
        flight = flight->next;
    return flight;
}

/* All slots are taken: waits for a call to end. */
static ep_status await_slot(epc_buffer *b, const char *call)
{
    epc_collect(b);
    for (int spins = 0; !b->free_slots; spins++) {
        const epc_flight *oldest = oldest_complete(b);
        if (!oldest)
            return epi_fail(EP_ERR_STATE,
                            "%s: %d calls are in flight already, whose hooks have yet to run", call,
                            EPC_MAX_FLIGHTS);
        if (has_died(oldest, spins))
            return epi_fail(EP_ERR_DEVICE,
                            "%s: the kernel of %s (call %u) before it ended without a report", call,
                            oldest->call, oldest->serial);
        pause_a_little(spins);
        epc_collect(b);
    }
    return EP_OK;
}

static ep_status take_slot(epc_buffer *b, const char *call, int *slot)
{
    EPI_TRY(await_slot(b, call));
    *slot = __builtin_ctzll(b->free_slots);
    b->free_slots &= ~(1ull << *slot);
    return EP_OK;
}

ep_status epc_begin(epc_buffer *b, const char *call, void *stream, ep_event *previous,
                    epc_flight **out)
{
    bool capturing;
    *out = NULL;
    EPI_TRY(settle_earlier(b));
    EPI_TRY(epi_gpu_is_capturing(stream, &capturing));
    epc_exports_visit(b);
    EPI_TRY(order_streams(b, stream, previous, capturing));
    epc_flight *flight = calloc(1, sizeof *flight);
    if (!flight)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    flight->owner = b;
    flight->call = call;
    flight->stream = stream;
    flight->ranks = epc_other_ranks(b);
    flight->slot = EPC_CAPTURED;
    ep_status status = epi_gpu_event_create(&flight->done);
    if (status == EP_OK && !capturing)
        status = take_slot(b, call, &flight->slot);
    if (status != EP_OK) {
        epi_gpu_event_destroy(flight->done);
        free(flight);
        return status;
    }
    if (++b->serial == 0)
        ++b->serial;
    flight->serial = capturing ? 0 : b->serial;
    flight->report = report_at(b, flight->slot);
    *out = flight;
    return EP_OK;
}

void epc_cancel(epc_flight *flight)
{
    for (int i = 0; i < 4; i++)
        epc_give(flight->owner, flight->blocks[i]);
    if (flight->handle)
        epc_core.handle_release(flight->handle);
    if (flight->slot < EPC_MAX_FLIGHTS)
        flight->owner->free_slots |= 1ull << flight->slot;
    epi_gpu_event_destroy(flight->done);
    free(flight);
}

static void remember(epc_buffer *b, epc_flight *flight)
{
    epc_flight **at = &b->flights;
    while (*at)
        at = &(*at)->next;
    *at = flight;
}

ep_status epc_launched(epc_flight *flight, ep_event **event)
{
    epc_buffer *b = flight->owner;
    if (flight->slot == EPC_CAPTURED) {
        flight->next = b->kept;
        b->kept = flight;
        if (event && flight->second)
            return epc_core.event_new(b->buffer, flight, event);
        if (event)
            return epi_fail(EP_ERR_STATE, "%s: event is given while the stream is being captured",
                            flight->call);
        return EP_OK;
    }
    ep_status status = epi_gpu_event_record(flight->done, flight->stream);
    if (status == EP_OK)
        status = epi_gpu_event_record(b->last_done, flight->stream);
    b->last_stream = flight->stream;
    b->has_last = true;
    remember(b, flight);
    if (status == EP_OK && event) {
        flight->has_event = true;
        status = epc_core.event_new(b->buffer, flight, event);
        flight->has_event = status == EP_OK;
    }
    return status;
}
