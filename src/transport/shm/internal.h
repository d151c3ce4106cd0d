/* SPDX-License-Identifier: MIT */
#ifndef EPI_TRANSPORT_SHM_INTERNAL_H
#define EPI_TRANSPORT_SHM_INTERNAL_H

#include "transport/ops.h"

#include <sys/types.h>

/* One rank's process, so that its number being taken by another is noticed. */
typedef struct shm_peer {
    pid_t pid;
    uint64_t start_time; /* clock ticks since boot, field 22 of /proc/PID/stat */
    int pidfd;           /* -1 where the system has none to give */
    _Atomic bool dead;   /* once true stays true */
} shm_peer;

typedef struct shm_transport {
    epi_transport base;
    epi_bootstrap *bootstrap;
    shm_peer *peers; /* [num_ranks] */
    bool can_read;
    int ranks_per_core;
} shm_transport;

static inline shm_transport *shm_self(epi_transport *transport)
{
    return (shm_transport *)transport;
}

/* Collective over `bootstrap`: who is who, on one host and in one PID namespace. Only what is said
   of rank `only` is kept, unless that is -1. */
ep_status epi_shm_peers_meet(shm_transport *transport, epi_bootstrap *bootstrap, int only);
void epi_shm_peers_part(shm_transport *transport);
/* Collective: whether every rank can read every other's memory. */
ep_status epi_shm_peers_try_read(shm_transport *transport, epi_bootstrap *bootstrap);
bool epi_shm_peer_alive(epi_transport *transport, int rank);
void epi_shm_kill_self(epi_transport *transport);
bool epi_shm_can_peer_read(epi_transport *transport);
ep_status epi_shm_peer_read(epi_transport *transport, int rank, const epi_remote_read *reads,
                            size_t count);

ep_status epi_shm_window_create(epi_transport *transport, size_t reserve, size_t committed,
                                epi_window **window);
ep_status epi_shm_window_admit(epi_window *window, int rank, epi_bootstrap *bootstrap);
void epi_shm_window_destroy(epi_window *window);
ep_status epi_shm_window_commit(epi_window *window, size_t bytes);
ep_status epi_shm_window_back(epi_window *window, size_t from, size_t to);
void epi_shm_window_drop(epi_window *window, size_t from, size_t to);

#endif
