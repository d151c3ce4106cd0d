/* SPDX-License-Identifier: MIT */
#include "ep/client.h"

#include "base/clock.h"
#include "base/error.h"
#include "base/process.h"
#include "ep/bootstrap.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define RETRY_NS (5 * EPI_NS_PER_MS)

typedef struct client {
    epi_bootstrap base;
    int fd;
    uint32_t round;
    int64_t timeout_ms;
    uid_t foreign; /* a user who held the rendezvous name */
    bool found_foreign;
} client;

static ep_status fail_silent(const client *self)
{
    if (self->found_foreign)
        return epi_fail(EP_ERR_TIMEOUT,
                        "group creation: no word from rank 0 within %lld ms; user %u holds its "
                        "rendezvous name, EP_JOB can change it",
                        (long long)self->timeout_ms, (unsigned)self->foreign);
    return epi_fail(EP_ERR_TIMEOUT, "group creation: no word from rank 0 within %lld ms",
                    (long long)self->timeout_ms);
}

static ep_status fail_gone(void)
{
    return epi_fail(EP_ERR_RANK_DEAD, "group creation: rank 0 has ended or given up");
}

static epi_io speak(const client *self, epi_frame_kind kind, const void *payload, size_t bytes,
                    int64_t deadline_ns)
{
    epi_frame frame = {.magic = EPI_WIRE_MAGIC,
                       .kind = kind,
                       .rank = self->base.rank,
                       .num_ranks = self->base.num_ranks,
                       .round = self->round,
                       .bytes = (uint32_t)bytes,
                       .deadline_ns = deadline_ns};
    return epi_send_frame(self->fd, &frame, payload, deadline_ns);
}

/* Receives `bytes` of RESULT, or the error of a FAIL. *io tells a lost connection from the rest. */
static ep_status hear(const client *self, void *result, size_t bytes, int64_t deadline_ns,
                      epi_io *io)
{
    const epi_frame_expect expect = {EPI_FRAME_RESULT, 0, self->base.num_ranks, self->round,
                                     (uint32_t)bytes};
    epi_frame frame;
    char message[EPI_WIRE_MESSAGE_MAX];
    *io = epi_receive_all(self->fd, &frame, sizeof frame, deadline_ns);
    if (*io == EPI_IO_DONE) {
        EPI_TRY(epi_frame_parse(&frame, sizeof frame, &expect, &frame));
        bool failed = frame.kind == EPI_FRAME_FAIL;
        if (!failed && frame.bytes != bytes)
            return epi_fail(EP_ERR_FORMAT, "bootstrap result of %u bytes; %zu were expected",
                            frame.bytes, bytes);
        *io = epi_receive_all(self->fd, failed ? message : result, frame.bytes, deadline_ns);
        if (*io == EPI_IO_DONE)
            return failed ? epi_frame_fail(&frame, message) : EP_OK;
    }
    return *io == EPI_IO_AGAIN ? fail_silent(self) : fail_gone();
}

static ep_status client_allgather(epi_bootstrap *base, const void *send, void *recv, size_t bytes)
{
    client *self = (client *)base;
    int64_t deadline = epi_clock_ns() + self->timeout_ms * EPI_NS_PER_MS;
    self->round++;
    epi_io io = speak(self, EPI_FRAME_GATHER, send, bytes, deadline);
    if (io == EPI_IO_AGAIN)
        return fail_silent(self);
    /* Where the connection is gone, the reason may still lie in it. */
    return hear(self, recv, bytes * (size_t)base->num_ranks, deadline, &io);
}

static void disconnect(client *self)
{
    if (self->fd >= 0)
        close(self->fd);
    self->fd = -1;
}

static void client_close(epi_bootstrap *base)
{
    disconnect((client *)base);
    epi_bootstrap_free(base);
}

/* Connects to whoever has the name, if that is a process of this user. */
static bool connect_to(client *self, const epi_rendezvous_name *name, pid_t *hub)
{
    uid_t uid = 0;
    self->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (self->fd < 0)
        return false;
    if (connect(self->fd, (const struct sockaddr *)&name->address, name->length) == 0) {
        if (epi_peer_is_ours(self->fd, hub, &uid))
            return true;
        self->foreign = uid;
        self->found_foreign = true;
    }
    disconnect(self);
    return false;
}

/* Connects, says HELLO and waits until all ranks have. The hub may not listen yet; or it is just
   closing the listener of the group before, and the connection is lost without a word. */
static ep_status join(client *self, const epi_rendezvous_name *name)
{
    int64_t deadline = epi_clock_ns() + self->timeout_ms * EPI_NS_PER_MS;
    for (;;) {
        pid_t hub;
        uint64_t start_time;
        epi_io io = EPI_IO_GONE;
        if (connect_to(self, name, &hub)) {
            speak(self, EPI_FRAME_HELLO, NULL, 0, deadline);
            ep_status status = hear(self, NULL, 0, deadline, &io);
            if (io != EPI_IO_GONE)
                return status;
            disconnect(self);
            if (!epi_process_start_time(hub, &start_time))
                return fail_gone();
        }
        if (epi_clock_ns() + RETRY_NS >= deadline)
            return fail_silent(self);
        struct timespec pause = epi_timespec(RETRY_NS);
        nanosleep(&pause, NULL);
    }
}

ep_status epi_client_open(const epi_rendezvous_name *name, int rank, int num_ranks,
                          int64_t timeout_ms, epi_bootstrap **bootstrap)
{
    client *self = calloc(1, sizeof *self);
    if (self == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of %d ranks", num_ranks);
    self->fd = -1;
    self->timeout_ms = timeout_ms;
    ep_status status =
        epi_bootstrap_init(&self->base, client_allgather, client_close, rank, num_ranks);
    if (status == EP_OK)
        status = join(self, name);
    if (status == EP_OK)
        *bootstrap = &self->base;
    else
        client_close(&self->base);
    return status;
}
