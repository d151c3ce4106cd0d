/* SPDX-License-Identifier: MIT */
/* Small calls of both modes on one rank's buffer, for tests of what becomes of calls rather than of
   rows. On a device where EP_TEST_DEVICE says so. */
#ifndef EP_TEST_SMALL_CALLS_H
#define EP_TEST_SMALL_CALLS_H

#include "entrepot/low_latency.h"

#include <stdbool.h>

enum { SMALL_TOKENS = 8, SMALL_HIDDEN = 16, SMALL_EXPERTS = 24, SMALL_MAX_RANKS = 8 };
enum { SMALL_MAX_ROWS = SMALL_MAX_RANKS * SMALL_TOKENS };

struct small_calls {
    ep_buffer *buffer;
    int rank, num_ranks;
    bool hooks;         /* low-latency calls are completed by their event */
    int64_t max_tokens; /* of low latency: another one has memory set up anew */
    int64_t ids[SMALL_TOKENS];
    float weights[SMALL_TOKENS];
    uint16_t x[SMALL_TOKENS * SMALL_HIDDEN], out[SMALL_TOKENS * SMALL_HIDDEN];
    uint16_t y[SMALL_EXPERTS * SMALL_MAX_ROWS * SMALL_HIDDEN];
    ep_recv recv;       /* that the calls after a dispatch are about; the test's to release */
    ep_ll_recv ll_recv; /* likewise */
};

/* Makes the buffer. Token t goes to expert 3 * t: in every call each rank hears from each. */
int small_calls_open(ep_group *group, const ep_buffer_config *config, struct small_calls *b);

ep_status small_dispatch(struct small_calls *b, ep_recv *recv);
ep_status small_combine(struct small_calls *b);
ep_status small_dispatch_backward(struct small_calls *b);
ep_status small_combine_backward(struct small_calls *b, ep_recv *recv);
ep_status small_ll_dispatch(struct small_calls *b, ep_ll_recv *recv);
ep_status small_ll_combine(struct small_calls *b);
/* Releases the results, and begins without. */
void small_calls_drop(struct small_calls *b);

#endif
