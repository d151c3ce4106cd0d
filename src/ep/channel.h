/* SPDX-License-Identifier: MIT */
/* Sockets of the local bootstrap: a name that only one job uses, and frames with a deadline. */
#ifndef EPI_EP_CHANNEL_H
#define EPI_EP_CHANNEL_H

#include "ep/wire.h"

#include <stdbool.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/un.h>

/* How a bounded exchange over a socket ended. */
typedef enum epi_io {
    EPI_IO_DONE,
    EPI_IO_AGAIN, /* nothing more for now, or past the deadline */
    EPI_IO_GONE   /* the other side has closed or reset the connection */
} epi_io;

typedef struct epi_rendezvous_name {
    struct sockaddr_un address; /* abstract: no file, gone with the socket */
    socklen_t length;
} epi_rendezvous_name;

epi_rendezvous_name epi_rendezvous(uint64_t job, const char *group);

/* The process at the other end; false unless it is one of this user. */
bool epi_peer_is_ours(int fd, pid_t *pid, uid_t *uid);

/* Waits for `events` of poll until the deadline. */
bool epi_poll(int fd, short events, int64_t deadline_ns);

/* Sends or receives all of `bytes` over a non-blocking socket. */
epi_io epi_send_all(int fd, const void *data, size_t bytes, int64_t deadline_ns);
epi_io epi_receive_all(int fd, void *data, size_t bytes, int64_t deadline_ns);

/* Goes on receiving what has come of `bytes`; *have counts. */
epi_io epi_receive_some(int fd, void *data, size_t bytes, size_t *have);

epi_io epi_send_frame(int fd, const epi_frame *frame, const void *payload, int64_t deadline_ns);

/* Milliseconds from now, for poll: rounded up, 0 when past. */
int epi_poll_ms(int64_t deadline_ns);

#endif
