/* SPDX-License-Identifier: MIT */
#include "ep/channel.h"

#include "base/clock.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

epi_rendezvous_name epi_rendezvous(uint64_t job, const char *group)
{
    epi_rendezvous_name name = {.address.sun_family = AF_UNIX};
    /* sun_path[0] stays 0, which makes the name abstract */
    int length =
        snprintf(name.address.sun_path + 1, sizeof name.address.sun_path - 1,
                 "entrepot-%u-%016llx-%.63s", (unsigned)geteuid(), (unsigned long long)job, group);
    name.length = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
    return name;
}

bool epi_peer_is_ours(int fd, pid_t *pid, uid_t *uid)
{
    struct ucred peer = {0};
    socklen_t length = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0)
        return false;
    *pid = peer.pid;
    *uid = peer.uid;
    return peer.uid == geteuid();
}

int epi_poll_ms(int64_t deadline_ns)
{
    int64_t left = deadline_ns - epi_clock_ns();
    if (left <= 0)
        return 0;
    int64_t ms = (left + EPI_NS_PER_MS - 1) / EPI_NS_PER_MS;
    return ms < INT_MAX ? (int)ms : INT_MAX;
}

bool epi_poll(int fd, short events, int64_t deadline_ns)
{
    struct pollfd wait = {.fd = fd, .events = events};
    for (;;) {
        int ms = epi_poll_ms(deadline_ns);
        if (poll(&wait, 1, ms) == 1)
            return true;
        if (ms == 0)
            return false;
    }
}

epi_io epi_send_all(int fd, const void *data, size_t bytes, int64_t deadline_ns)
{
    const char *at = data;
    while (bytes > 0) {
        ssize_t sent = send(fd, at, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent >= 0) {
            at += sent;
            bytes -= (size_t)sent;
        } else if (errno == EAGAIN) {
            if (!epi_poll(fd, POLLOUT, deadline_ns))
                return EPI_IO_AGAIN;
        } else if (errno != EINTR) {
            return EPI_IO_GONE;
        }
    }
    return EPI_IO_DONE;
}

epi_io epi_receive_some(int fd, void *data, size_t bytes, size_t *have)
{
    while (*have < bytes) {
        ssize_t got = recv(fd, (char *)data + *have, bytes - *have, MSG_DONTWAIT);
        if (got > 0)
            *have += (size_t)got;
        else if (got == 0 || (errno != EAGAIN && errno != EINTR))
            return EPI_IO_GONE;
        else if (errno == EAGAIN)
            return EPI_IO_AGAIN;
    }
    return EPI_IO_DONE;
}

epi_io epi_receive_all(int fd, void *data, size_t bytes, int64_t deadline_ns)
{
    size_t have = 0;
    for (;;) {
        epi_io io = epi_receive_some(fd, data, bytes, &have);
        if (io != EPI_IO_AGAIN || !epi_poll(fd, POLLIN, deadline_ns))
            return io;
    }
}

epi_io epi_send_frame(int fd, const epi_frame *frame, const void *payload, int64_t deadline_ns)
{
    epi_io io = epi_send_all(fd, frame, sizeof *frame, deadline_ns);
    return io == EPI_IO_DONE && frame->bytes > 0
               ? epi_send_all(fd, payload, frame->bytes, deadline_ns)
               : io;
}
