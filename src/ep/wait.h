/* SPDX-License-Identifier: MIT */
/* Bounded waits: every wait of the protocol for its peers goes through here. */
#ifndef EPI_EP_WAIT_H
#define EPI_EP_WAIT_H

#include "ep/group.h"

/* Whether what is waited for has come. NULL in epi_wait: when no unmasked rank is late. */
typedef bool (*epi_ready_fn)(void *context);
/* Whether `rank` is one we still wait for. */
typedef bool (*epi_late_fn)(void *context, int rank);

/*
 * Waits on this rank's `window` until ready(context). Spins briefly, then sleeps; looks at every
 * notification, and every 50 ms whether the late ranks still run. Masked ranks are not waited for:
 * `ready` must not count on them.
 *
 *   EP_ERR_TIMEOUT    "dispatch (call 17): no word from ranks 3, 5 within 30000 ms"
 *   EP_ERR_RANK_DEAD  "dispatch (call 17): rank 3 has ended"
 *
 * timeout_ms 0 is the group's.
 */
ep_status epi_wait(ep_group *group, epi_window *window, const char *call, uint64_t epoch,
                   epi_ready_fn ready, epi_late_fn late, void *context, int64_t timeout_ms);

/* epi_rank_list() of the unmasked ranks that are late. */
int epi_late_list(const ep_group *group, epi_late_fn late, void *context, char *text, size_t bytes);

#endif
