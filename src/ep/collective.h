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

/* Tells the others the group's epoch, so that they wait for none of before. */
void epi_collective_announce(ep_group *group);

/* Where in a control window the cells of ep_group_recover lie, and what they take. */
size_t epi_collective_recover_offset(const ep_group *group);
size_t epi_recover_bytes(int num_ranks);

/* Sets the epochs of the group and of all its buffers, and tells the others. */
ep_status epi_recover_align(ep_group *group, uint64_t group_epoch, uint64_t buffer_epoch);

#endif
