/* SPDX-License-Identifier: MIT */
/* A group from inside: its transport, its masks and its bounded waits. */
#ifndef EPI_EP_GROUP_H
#define EPI_EP_GROUP_H

#include "entrepot/group.h"
#include "transport/ops.h"

struct ep_group {
    int rank;
    int num_ranks;
    int ranks_per_node;
    int64_t timeout_ms;
    epi_bootstrap *bootstrap; /* over `control` once that exists */
    epi_transport *transport;
    epi_window *control;     /* barrier and all-gather of the group itself */
    uint64_t epoch;          /* of the group's own collectives */
    bool *masked;            /* [num_ranks] ranks that nobody waits for and nobody sends to */
    _Atomic int num_objects; /* buffers and the like alive on the group */
};

#endif
