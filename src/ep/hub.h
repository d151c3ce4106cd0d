/* SPDX-License-Identifier: MIT */
/* Rank 0 of the local bootstrap: the others connect to it, and it passes their words around. */
#ifndef EPI_EP_HUB_H
#define EPI_EP_HUB_H

#include "ep/channel.h"
#include "transport/ops.h"

/* One of the other ranks, once it has said who it is. */
typedef struct hub_rank {
    int fd; /* -1: not here */
    pid_t pid;
    int64_t deadline_ns; /* of its call under way */
    size_t have;         /* bytes of `inbox` that have come */
    struct {
        epi_frame head;
        uint8_t payload[EPI_BOOTSTRAP_MAX];
    } inbox;
} hub_rank;

typedef struct epi_hub {
    epi_bootstrap base;
    int64_t timeout_ms;
    int64_t deadline_ns; /* of this rank's call under way */
    uint32_t round;
    hub_rank *ranks;      /* [num_ranks]; the first is this rank itself, without a connection */
    struct pollfd *polls; /* [num_ranks + EPI_HUB_PENDING + 1] */
} epi_hub;

#define EPI_HUB_PENDING 64 /* connections that have not yet said who they are */

/* Collective with epi_client_open() on the other ranks. */
ep_status epi_hub_open(const epi_rendezvous_name *name, int num_ranks, int64_t timeout_ms,
                       epi_bootstrap **bootstrap);

/* Between the hub's two halves: waits until all ranks have joined. */
ep_status epi_hub_join(epi_hub *hub, const epi_rendezvous_name *name);

/* When to give up: early enough for the first of the ranks that wait to hear of it. */
int64_t epi_hub_verdict_ns(const epi_hub *hub);

/* Tells every rank that is here, closes its connection and makes this the last error. */
ep_status epi_hub_fail(epi_hub *hub, ep_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The failure of a rank whose connection closed, told to all others. */
#define EPI_HUB_GONE_FORMAT "group creation: rank %d (process %lld) has ended or given up"
ep_status epi_hub_fail_gone(epi_hub *hub, int rank);
/* The failure of a call that not all ranks entered. */
ep_status epi_hub_fail_missing(epi_hub *hub, bool (*missing)(void *hub, int rank));

epi_frame epi_hub_frame(const epi_hub *hub, epi_frame_kind kind, size_t bytes);

#endif
