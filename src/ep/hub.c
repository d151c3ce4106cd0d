/* SPDX-License-Identifier: MIT */
#include "ep/hub.h"

#include "base/clock.h"
#include "base/error.h"
#include "ep/bootstrap.h"
#include "ep/rank_list.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define FAIL_SEND_NS (100 * EPI_NS_PER_MS) /* for one rank to take the bad news */

static epi_hub *self(epi_bootstrap *base)
{
    return (epi_hub *)base;
}

epi_frame epi_hub_frame(const epi_hub *hub, epi_frame_kind kind, size_t bytes)
{
    return (epi_frame){.magic = EPI_WIRE_MAGIC,
                       .kind = kind,
                       .num_ranks = hub->base.num_ranks,
                       .round = hub->round,
                       .bytes = (uint32_t)bytes,
                       .deadline_ns = hub->deadline_ns};
}

int64_t epi_hub_verdict_ns(const epi_hub *hub)
{
    int64_t margin = hub->timeout_ms * EPI_NS_PER_MS / 8;
    int64_t earliest = hub->deadline_ns;
    for (int rank = 1; rank < hub->base.num_ranks; rank++)
        if (hub->ranks[rank].fd >= 0 && hub->ranks[rank].deadline_ns < earliest)
            earliest = hub->ranks[rank].deadline_ns;
    return earliest - (margin < 200 * EPI_NS_PER_MS ? margin : 200 * EPI_NS_PER_MS);
}

static void leave(hub_rank *rank)
{
    if (rank->fd >= 0)
        close(rank->fd);
    rank->fd = -1;
}

ep_status epi_hub_fail(epi_hub *hub, ep_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    epi_vfail(status, format, args);
    va_end(args);
    size_t length = strnlen(ep_last_error(), EPI_WIRE_MESSAGE_MAX);
    epi_frame frame = epi_hub_frame(hub, EPI_FRAME_FAIL, length);
    frame.status = (int32_t)status;
    for (int rank = 1; rank < hub->base.num_ranks; rank++) {
        if (hub->ranks[rank].fd >= 0)
            epi_send_frame(hub->ranks[rank].fd, &frame, ep_last_error(),
                           epi_clock_ns() + FAIL_SEND_NS);
        leave(&hub->ranks[rank]);
    }
    return status;
}

ep_status epi_hub_fail_gone(epi_hub *hub, int rank)
{
    leave(&hub->ranks[rank]);
    return epi_hub_fail(hub, EP_ERR_RANK_DEAD, EPI_HUB_GONE_FORMAT, rank,
                        (long long)hub->ranks[rank].pid);
}

ep_status epi_hub_fail_missing(epi_hub *hub, bool (*missing)(void *hub, int rank))
{
    char ranks[128];
    epi_rank_list(hub->base.num_ranks, missing, hub, ranks, sizeof ranks);
    return epi_hub_fail(hub, EP_ERR_TIMEOUT, "group creation: no word from %s within %lld ms",
                        ranks, (long long)hub->timeout_ms);
}

static bool has_spoken(const hub_rank *rank)
{
    return rank->have >= sizeof rank->inbox.head &&
           rank->have == sizeof rank->inbox.head + rank->inbox.head.bytes;
}

static bool is_silent(void *context, int rank)
{
    return rank > 0 && !has_spoken(&((epi_hub *)context)->ranks[rank]);
}

/* Takes in what has come of a rank's GATHER. */
static ep_status hear(epi_hub *hub, int index, size_t bytes)
{
    hub_rank *rank = &hub->ranks[index];
    const size_t head = sizeof rank->inbox.head;
    const epi_frame_expect expect = {EPI_FRAME_GATHER, index, hub->base.num_ranks, hub->round,
                                     EPI_BOOTSTRAP_MAX};
    epi_io io = EPI_IO_DONE;
    if (rank->have < head) {
        io = epi_receive_some(rank->fd, &rank->inbox, head, &rank->have);
        if (io == EPI_IO_DONE &&
            epi_frame_parse(&rank->inbox, head, &expect, &rank->inbox.head) != EP_OK)
            return epi_hub_fail(hub, EP_ERR_FORMAT, "rank %d: %s", index, ep_last_error());
        if (io == EPI_IO_DONE && rank->inbox.head.bytes != bytes)
            return epi_hub_fail(hub, EP_ERR_MISMATCH,
                                "group creation: %zu bytes on rank 0 but %u on rank %d", bytes,
                                rank->inbox.head.bytes, index);
    }
    if (io == EPI_IO_DONE) {
        rank->deadline_ns = rank->inbox.head.deadline_ns;
        io = epi_receive_some(rank->fd, &rank->inbox, head + bytes, &rank->have);
    }
    return io == EPI_IO_GONE ? epi_hub_fail_gone(hub, index) : EP_OK;
}

/* Waits for one or more of the ranks that have not spoken; EP_IN_PROGRESS while some have not. */
static ep_status hear_some(epi_hub *hub, size_t bytes)
{
    nfds_t waiting = 0;
    for (int rank = 1; rank < hub->base.num_ranks; rank++)
        if (is_silent(hub, rank))
            hub->polls[waiting++] = (struct pollfd){.fd = hub->ranks[rank].fd, .events = POLLIN};
    if (waiting == 0)
        return EP_OK;
    int ms = epi_poll_ms(epi_hub_verdict_ns(hub));
    int ready = poll(hub->polls, waiting, ms);
    if (ready <= 0)
        return ms == 0 ? epi_hub_fail_missing(hub, is_silent) : EP_IN_PROGRESS;
    for (int rank = 1; rank < hub->base.num_ranks; rank++)
        if (is_silent(hub, rank))
            EPI_TRY(hear(hub, rank, bytes));
    return EP_IN_PROGRESS;
}

static ep_status tell_all(epi_hub *hub, const void *data, size_t bytes)
{
    epi_frame frame = epi_hub_frame(hub, EPI_FRAME_RESULT, bytes);
    for (int rank = 1; rank < hub->base.num_ranks; rank++) {
        epi_io io = epi_send_frame(hub->ranks[rank].fd, &frame, data, epi_hub_verdict_ns(hub));
        if (io == EPI_IO_GONE)
            return epi_hub_fail_gone(hub, rank);
        if (io == EPI_IO_AGAIN)
            return epi_hub_fail(hub, EP_ERR_TIMEOUT,
                                "group creation: rank %d takes no word within %lld ms", rank,
                                (long long)hub->timeout_ms);
    }
    return EP_OK;
}

static void begin_round(epi_hub *hub)
{
    hub->round++;
    hub->deadline_ns = epi_clock_ns() + hub->timeout_ms * EPI_NS_PER_MS;
    for (int rank = 1; rank < hub->base.num_ranks; rank++) {
        hub->ranks[rank].have = 0;
        hub->ranks[rank].deadline_ns = INT64_MAX;
    }
}

static ep_status hub_allgather(epi_bootstrap *base, const void *send, void *recv, size_t bytes)
{
    epi_hub *hub = self(base);
    begin_round(hub);
    for (int rank = 1; rank < base->num_ranks; rank++)
        if (hub->ranks[rank].fd < 0) /* an earlier call failed and was not heeded */
            return epi_hub_fail(hub, EP_ERR_STATE, "group creation has failed before");
    ep_status status;
    while ((status = hear_some(hub, bytes)) == EP_IN_PROGRESS)
        ;
    EPI_TRY(status);
    memcpy(recv, send, bytes);
    for (int rank = 1; rank < base->num_ranks; rank++)
        memcpy((uint8_t *)recv + (size_t)rank * bytes, hub->ranks[rank].inbox.payload, bytes);
    return tell_all(hub, recv, bytes * (size_t)base->num_ranks);
}

static void hub_close(epi_bootstrap *base)
{
    epi_hub *hub = self(base);
    for (int rank = 0; hub->ranks != NULL && rank < base->num_ranks; rank++)
        leave(&hub->ranks[rank]);
    free(hub->ranks);
    free(hub->polls);
    epi_bootstrap_free(base);
}

ep_status epi_hub_open(const epi_rendezvous_name *name, int num_ranks, int64_t timeout_ms,
                       epi_bootstrap **bootstrap)
{
    size_t ranks = (size_t)num_ranks;
    epi_hub *hub = calloc(1, sizeof *hub);
    if (hub == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of %d ranks", num_ranks);
    hub->timeout_ms = timeout_ms;
    hub->ranks = calloc(ranks, sizeof *hub->ranks);
    hub->polls = calloc(ranks + EPI_HUB_PENDING + 1, sizeof *hub->polls);
    ep_status status = epi_bootstrap_init(&hub->base, hub_allgather, hub_close, 0, num_ranks);
    for (int rank = 0; hub->ranks != NULL && rank < num_ranks; rank++)
        hub->ranks[rank].fd = -1;
    if (status == EP_OK && (hub->ranks == NULL || hub->polls == NULL))
        status = epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of %d ranks", num_ranks);
    if (status == EP_OK)
        status = epi_hub_join(hub, name);
    if (status == EP_OK) /* round 0: all are here */
        status = tell_all(hub, NULL, 0);
    if (status == EP_OK)
        *bootstrap = &hub->base;
    else
        hub_close(&hub->base);
    return status;
}
