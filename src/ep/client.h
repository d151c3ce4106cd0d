/* SPDX-License-Identifier: MIT */
/* Ranks other than 0 of the local bootstrap. */
#ifndef EPI_EP_CLIENT_H
#define EPI_EP_CLIENT_H

#include "ep/channel.h"
#include "transport/ops.h"

/* Collective with epi_hub_open() on rank 0. */
ep_status epi_client_open(const epi_rendezvous_name *name, int rank, int num_ranks,
                          int64_t timeout_ms, epi_bootstrap **bootstrap);

#endif
