/* SPDX-License-Identifier: MIT */
/* What the environment says about this rank, parsed strictly. */
#ifndef EPI_EP_ENVIRONMENT_H
#define EPI_EP_ENVIRONMENT_H

#include "entrepot/status.h"

#include <stdint.h>

#define EPI_MAX_RANKS 65536
#define EPI_MAX_TIMEOUT_MS INT64_C(86400000)

/* The value of a variable, or NULL. Given by the caller, so that tests need not touch their own. */
typedef const char *(*epi_getenv_fn)(void *context, const char *name);

/* Where the ranks come from. */
typedef struct epi_launch {
    const char *launcher; /* "Open MPI"; static; NULL when no launcher has left its variables */
    int rank;             /* 0..num_ranks-1; without a launcher 0 */
    int num_ranks;        /* 1..EPI_MAX_RANKS; without a launcher 1 */
    uint64_t job;         /* the same on all ranks of one job, different between jobs */
} epi_launch;

/* EP_ERR_FORMAT names the variable and its value; EP_ERR_UNSUPPORTED when the launcher says that
   the ranks are on several hosts. */
ep_status epi_launch_read(epi_getenv_fn get, void *context, epi_launch *launch);

/* The job alone, for ranks that the caller numbers; what else the environment says is not looked
 * at. */
uint64_t epi_launch_job(epi_getenv_fn get, void *context);

/* EP_TIMEOUT_MS; leaves *timeout_ms alone when it is not set. */
ep_status epi_environment_timeout(epi_getenv_fn get, void *context, int64_t *timeout_ms);

/* The process's own environment, for the `get` above. */
const char *epi_getenv(void *context, const char *name);

#endif
