/* SPDX-License-Identifier: MIT */
/*
 * Joining: rank 0 listens under the job's name until every rank has said HELLO.
 *
 * Anything may connect. What is not a process of this user, or does not say
 * HELLO in our words, is closed and forgotten; it cannot hold up the ranks.
 */
#include "ep/hub.h"

#include "base/clock.h"
#include "base/error.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define RETRY_NS (20 * EPI_NS_PER_MS)
#define GRACE_NS EPI_NS_PER_S /* once it has failed: for the others to come and be told as well */

typedef struct pending {
    int fd;
    pid_t pid;
    size_t have;
    epi_frame head;
} pending;

typedef struct joining {
    epi_hub *hub;
    int listener;
    int num_pending;
    int num_expected;  /* the other ranks, by the highest number that any believes in */
    int num_arrived;   /* ranks that are here or have been */
    ep_status verdict; /* EP_OK while all goes well */
    char reason[160];
    int64_t grace_ns; /* how long to wait for the others once it does not */
    pending pending[EPI_HUB_PENDING];
} joining;

/* Who has the name that we cannot bind. */
typedef struct name_holder {
    pid_t pid; /* 0: not known */
    uid_t uid;
} name_holder;

static void find_holder(const epi_rendezvous_name *name, name_holder *holder)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return;
    if (connect(fd, (const struct sockaddr *)&name->address, name->length) == 0)
        epi_peer_is_ours(fd, &holder->pid, &holder->uid);
    close(fd);
}

static ep_status fail_name_taken(const epi_rendezvous_name *name, const name_holder *holder)
{
    char who[64] = "another process has it";
    if (holder->pid != 0)
        snprintf(who, sizeof who, "process %lld of user %u has it", (long long)holder->pid,
                 (unsigned)holder->uid);
    return epi_fail(EP_ERR_SYSTEM,
                    "rank 0 cannot take the rendezvous name \"%s\": %s; EP_JOB or the group's name "
                    "can tell jobs apart",
                    name->address.sun_path + 1, who);
}

static ep_status listen_at(const epi_rendezvous_name *name, int64_t deadline_ns, int *listener)
{
    name_holder holder = {0, 0};
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return epi_fail_errno(EP_ERR_SYSTEM, "creating a socket");
    while (bind(fd, (const struct sockaddr *)&name->address, name->length) != 0) {
        bool taken = errno == EADDRINUSE;
        if (taken && holder.pid == 0)
            find_holder(name, &holder);
        if (taken && epi_clock_ns() + RETRY_NS < deadline_ns) {
            /* A group of the same name may be about to finish. */
            struct timespec pause = epi_timespec(RETRY_NS);
            nanosleep(&pause, NULL);
            continue;
        }
        ep_status status = taken ? fail_name_taken(name, &holder)
                                 : epi_fail_errno(EP_ERR_SYSTEM, "naming a socket");
        close(fd);
        return status;
    }
    if (listen(fd, SOMAXCONN) != 0) {
        ep_status status = epi_fail_errno(EP_ERR_SYSTEM, "listening on a socket");
        close(fd);
        return status;
    }
    *listener = fd;
    return EP_OK;
}

static void drop(joining *join, int index)
{
    close(join->pending[index].fd);
    join->pending[index] = join->pending[--join->num_pending];
}

/* Tells one connection why it is not wanted. */
static void refuse(const joining *join, int fd, ep_status status, const char *message)
{
    epi_frame frame = epi_hub_frame(join->hub, EPI_FRAME_FAIL, strlen(message));
    frame.status = (int32_t)status;
    epi_send_frame(fd, &frame, message, epi_clock_ns());
}

static void accept_some(joining *join)
{
    for (;;) {
        int fd = accept4(join->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd < 0)
            return;
        pid_t pid;
        uid_t uid;
        if (!epi_peer_is_ours(fd, &pid, &uid)) {
            close(fd);
            continue;
        }
        if (join->num_pending == EPI_HUB_PENDING) /* a rank speaks at once: make room */
            drop(join, 0);
        join->pending[join->num_pending++] = (pending){.fd = fd, .pid = pid};
    }
}

/* The first reason to fail is the one that all are told, also those that come later. */
static void condemn(joining *join, ep_status status, const char *reason)
{
    if (join->verdict != EP_OK)
        return;
    join->verdict = status;
    join->grace_ns = epi_clock_ns() + GRACE_NS;
    snprintf(join->reason, sizeof join->reason, "%s", reason);
}

static void note_mismatch(joining *join, const epi_frame *frame, int fd)
{
    char reason[100];
    snprintf(reason, sizeof reason, "num_ranks is %d on rank 0 but %d on rank %d",
             join->hub->base.num_ranks, frame->num_ranks, frame->rank);
    condemn(join, EP_ERR_MISMATCH, reason);
    refuse(join, fd, join->verdict, join->reason);
    join->num_arrived++;
    if (frame->num_ranks - 1 > join->num_expected)
        join->num_expected = frame->num_ranks - 1;
}

/* A pending connection has said HELLO. Returns whether it is kept as that rank's. */
static bool admit(joining *join, const pending *from)
{
    const epi_frame_expect expect = {EPI_FRAME_HELLO, -1, join->hub->base.num_ranks, 0, 0};
    epi_frame frame;
    ep_status status = epi_frame_parse(&from->head, sizeof from->head, &expect, &frame);
    if (status == EP_ERR_MISMATCH)
        note_mismatch(join, &frame, from->fd);
    /* One whose deadline has passed is left over from a call that failed. */
    if (status != EP_OK || frame.deadline_ns <= epi_clock_ns())
        return false;
    hub_rank *rank = &join->hub->ranks[frame.rank];
    if (frame.rank == 0 || rank->fd >= 0) {
        char message[120];
        snprintf(message, sizeof message,
                 "rank %d is process %lld already; process %lld says so too", frame.rank,
                 (long long)(frame.rank == 0 ? getpid() : rank->pid), (long long)from->pid);
        refuse(join, from->fd, EP_ERR_STATE, message);
        return false;
    }
    *rank = (hub_rank){.fd = from->fd, .pid = from->pid, .deadline_ns = frame.deadline_ns};
    join->num_arrived++;
    return true;
}

static void hear_pending(joining *join)
{
    for (int i = join->num_pending - 1; i >= 0; i--) {
        pending *from = &join->pending[i];
        epi_io io = epi_receive_some(from->fd, &from->head, sizeof from->head, &from->have);
        if (io == EPI_IO_AGAIN)
            continue;
        if (io == EPI_IO_DONE && admit(join, from))
            *from = join->pending[--join->num_pending];
        else
            drop(join, i);
    }
}

/* A rank that is here says nothing until it is told that all are; what can be read is its end. */
static void note_gone(joining *join)
{
    for (int rank = 1; rank < join->hub->base.num_ranks; rank++) {
        hub_rank *here = &join->hub->ranks[rank];
        char byte, reason[100];
        ssize_t got = here->fd >= 0 ? recv(here->fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) : 1;
        if (got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR)))
            continue;
        snprintf(reason, sizeof reason, EPI_HUB_GONE_FORMAT, rank, (long long)here->pid);
        condemn(join, EP_ERR_RANK_DEAD, reason);
        close(here->fd);
        here->fd = -1;
    }
}

static bool is_absent(void *context, int rank)
{
    return rank > 0 && ((epi_hub *)context)->ranks[rank].fd < 0;
}

static nfds_t fill_polls(const joining *join)
{
    struct pollfd *polls = join->hub->polls;
    nfds_t count = 0;
    polls[count++] = (struct pollfd){.fd = join->listener, .events = POLLIN};
    for (int i = 0; i < join->num_pending; i++)
        polls[count++] = (struct pollfd){.fd = join->pending[i].fd, .events = POLLIN};
    for (int rank = 1; rank < join->hub->base.num_ranks; rank++)
        if (join->hub->ranks[rank].fd >= 0)
            polls[count++] = (struct pollfd){.fd = join->hub->ranks[rank].fd, .events = POLLIN};
    return count;
}

static ep_status wait_for_all(joining *join)
{
    epi_hub *hub = join->hub;
    while (join->num_arrived < join->num_expected) {
        int64_t until = epi_hub_verdict_ns(hub);
        if (join->verdict != EP_OK && join->grace_ns < until)
            until = join->grace_ns;
        int ms = epi_poll_ms(until);
        int ready = poll(hub->polls, fill_polls(join), ms);
        if (ready <= 0 && ms == 0)
            break;
        accept_some(join);
        hear_pending(join);
        note_gone(join);
    }
    if (join->verdict != EP_OK)
        return epi_hub_fail(hub, join->verdict, "%s", join->reason);
    if (join->num_arrived < join->num_expected)
        return epi_hub_fail_missing(hub, is_absent);
    return EP_OK;
}

ep_status epi_hub_join(epi_hub *hub, const epi_rendezvous_name *name)
{
    joining join = {.hub = hub, .num_expected = hub->base.num_ranks - 1};
    hub->deadline_ns = epi_clock_ns() + hub->timeout_ms * EPI_NS_PER_MS;
    EPI_TRY(listen_at(name, hub->deadline_ns, &join.listener));
    ep_status status = wait_for_all(&join);
    /* Closed before any rank is told that all are here: one that comes again, for the next group,
       finds the next listener. */
    close(join.listener);
    while (join.num_pending > 0)
        drop(&join, 0);
    return status;
}
