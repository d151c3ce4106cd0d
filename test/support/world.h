/* SPDX-License-Identifier: MIT */
/* Runs scenarios over the transports. */
#ifndef EP_TEST_WORLD_H
#define EP_TEST_WORLD_H

#include "support/scenario.h"

/* Transports that every conformance test runs over; NULL at the end. Under TSan only those whose
   ranks are threads, since it sees nothing of what other processes do. */
extern const char *const world_transports[];

/*
 * Runs a list of scenarios over a transport, or over all of them where it is
 * NULL. Neighbours with the same number of ranks share a group, and with the same
 * number of threads a buffer too, so that shapes change from call to call as they
 * do in use. Returns how many ranks failed; the checks have then printed why.
 */
int world_run(const char *transport, const struct scenario *list, int count, int calls);

/* The same with the buffer's other settings given; num_threads comes from the scenarios, the device
   from the test's ranks. */
int world_run_with(const char *transport, const ep_buffer_config *config,
                   const struct scenario *list, int count, int calls);

#endif
