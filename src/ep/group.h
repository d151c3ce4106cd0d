/* SPDX-License-Identifier: MIT */
/* A group from inside: its transport, its masks and its bounded waits. */
#ifndef EPI_EP_GROUP_H
#define EPI_EP_GROUP_H

#include "entrepot/ep.h"
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
    int64_t mask_sum;        /* tells sets of them apart */
    _Atomic bool *late;      /* [num_ranks] named by the last timeout or death */
    _Atomic int num_objects; /* buffers and the like alive on the group */
    ep_buffer *buffers;      /* in the order they were made */
    uint64_t recoveries;     /* rounds of ep_group_recover, see recover.c */
    uint64_t job;            /* where a rank that comes back finds the others */
    char name[64];
    char transport_name[200];
};

/* Words of the control window. */
enum { EPI_GROUP_SLOT_EPOCH, EPI_GROUP_SLOT_ROUND };

/* ---- mask.c */

/* Sets one mask, without a check. */
void epi_group_set_mask(ep_group *group, int rank, bool masked);
/* EP_ERR_STATE when a call of one of the group's buffers is under way. */
ep_status epi_group_check_idle(ep_group *group, const char *call);
/* The lowest rank that is not masked. */
int epi_group_first(const ep_group *group);

/* ---- rejoin.c */

/* This rank's side of ep_group_readmit: a bootstrap that reaches all ranks that are left. */
ep_status epi_rejoin_open(uint64_t job, const char *name, int rank, int num_ranks,
                          int64_t timeout_ms, epi_bootstrap **bootstrap);

/* What both sides settle once the control window is shared. Collective over `bootstrap`. */
ep_status epi_rejoin_align(ep_group *group, epi_bootstrap *bootstrap);

/* ---- group.c */

/* Compares every rank's settings; all find the same difference. masked [num_ranks], where not NULL,
   gets who takes no part. Collective over `bootstrap`. */
ep_status epi_group_compare(epi_bootstrap *bootstrap, int ranks_per_node, const char *transport,
                            bool *masked);

#endif
