/* SPDX-License-Identifier: MIT */
/* The group's own collectives, over its control window. */
#ifndef EPI_EP_COLLECTIVE_H
#define EPI_EP_COLLECTIVE_H

#include "ep/group.h"

#define EPI_ALLGATHER_MAX ((size_t)1 << 20) /* bytes per rank */

/* Collective: makes group->control. */
ep_status epi_collective_open(ep_group *group);

/* All-gather of up to EPI_ALLGATHER_MAX bytes per rank, named `call` in errors; masked ranks give
   zeros. With no bytes it is a barrier. */
ep_status epi_collective_gather(ep_group *group, const char *call, const void *send, void *recv,
                                size_t bytes);

#endif
