/* SPDX-License-Identifier: MIT */
/* How crowded the cores are. */
#ifndef EPI_TRANSPORT_CORES_H
#define EPI_TRANSPORT_CORES_H

#include "transport/ops.h"

/* Collective: how many ranks run per core that this one may use, rounded up, given that every rank
   spreads over the cores of its own affinity mask. */
ep_status epi_ranks_per_core(epi_bootstrap *bootstrap, int *ranks_per_core);

#endif
