/* SPDX-License-Identifier: MIT */
/*
 * A load of calls in both modes whose results every rank can check by itself: one
 * step is a dispatch, its experts, and a combine. Inputs are small integers that
 * all formats hold exactly, a function of the step's number, so that any rank knows
 * what every other sends.
 */
#ifndef EP_TEST_LOAD_H
#define EP_TEST_LOAD_H

#include "entrepot/low_latency.h"

#include <stdbool.h>

typedef struct load_rank {
    ep_group *group;
    ep_buffer *buffer;
    bool hooks; /* low-latency calls are completed by their hooks, now and then */
} load_rank;

/*
 * Makes step `number`: normal or low-latency mode, shapes and wire vary with it.
 * Returns 0 when the calls failed with *status or all results were exactly what
 * the ranks that are not masked sent, nothing lost and nothing twice; else 1.
 */
int load_step(const load_rank *load, uint64_t number, ep_status *status);

/*
 * Two low-latency batches in flight at once, steps 2 * number and 2 * number + 1:
 * both dispatched, then received, then combined and summed by their hooks, in an
 * order that differs from rank to rank and from number to number. Returns as above.
 */
int load_overlap(const load_rank *load, uint64_t number, ep_status *status);

/* All-gathers a number over the ranks that are not masked; the least and the largest. */
ep_status load_agree(const load_rank *load, uint64_t mine, uint64_t *least, uint64_t *most);

#endif
