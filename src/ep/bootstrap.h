/* SPDX-License-Identifier: MIT */
/*
 * How the ranks of a group that is being made exchange their first words. Each
 * kind gives an epi_bootstrap of at most EPI_BOOTSTRAP_MAX bytes per rank.
 */
#ifndef EPI_EP_BOOTSTRAP_H
#define EPI_EP_BOOTSTRAP_H

#include "transport/ops.h"

typedef ep_status (*epi_bootstrap_allgather)(epi_bootstrap *bootstrap, const void *send, void *recv,
                                             size_t bytes);

/* For those that make one: fills it in and allocates its scratch. */
ep_status epi_bootstrap_init(epi_bootstrap *bootstrap, epi_bootstrap_allgather allgather,
                             void (*close)(epi_bootstrap *bootstrap), int rank, int num_ranks);
/* Frees it and its scratch; also a `close` for those that have nothing else. */
void epi_bootstrap_free(epi_bootstrap *bootstrap);

/* Through the callback of the caller's. */
ep_status epi_bootstrap_callback(int rank, int num_ranks, ep_allgather_fn allgather, void *context,
                                 epi_bootstrap **bootstrap);

/* Through memory of a world of threads. */
ep_status epi_bootstrap_threads(int rank, ep_thread_world *world, int64_t timeout_ms,
                                epi_bootstrap **bootstrap);
int epi_thread_world_num_ranks(const ep_thread_world *world);

/* Between processes of one user on one host that know the same job and name. */
ep_status epi_bootstrap_local(uint64_t job, const char *name, int rank, int num_ranks,
                              int64_t timeout_ms, epi_bootstrap **bootstrap);

/* NULL is allowed. */
void epi_bootstrap_close(epi_bootstrap *bootstrap);

#endif
