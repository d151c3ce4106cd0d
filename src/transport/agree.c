/* SPDX-License-Identifier: MIT */
#include "transport/ops.h"

#include "base/error.h"

#include <stdio.h>
#include <string.h>

typedef struct report {
    int32_t status;
    char message[EPI_BOOTSTRAP_MAX - sizeof(int32_t)];
} report;

ep_status epi_gather(epi_bootstrap *bootstrap, const void *send, size_t bytes, const void **all)
{
    *all = bootstrap->scratch;
    return bootstrap->allgather(bootstrap, send, bootstrap->scratch, bytes);
}

ep_status epi_agree(epi_bootstrap *bootstrap, ep_status mine)
{
    report own = {.status = (int32_t)mine};
    if (mine != EP_OK)
        snprintf(own.message, sizeof own.message, "%s", ep_last_error());
    const void *all = NULL;
    ep_status status = epi_gather(bootstrap, &own, sizeof own, &all);
    /* One's own failure is the better news, unless it may come from the death of a rank. */
    if (status != EP_OK)
        return mine != EP_OK && status != EP_ERR_RANK_DEAD ? epi_fail(mine, "%s", own.message)
                                                           : status;

    const report *reports = all;
    for (int rank = 0; rank < bootstrap->num_ranks; rank++) {
        const report *theirs = &reports[rank];
        if (theirs->status == EP_OK)
            continue;
        int length = (int)strnlen(theirs->message, sizeof theirs->message);
        if (rank == bootstrap->rank)
            return epi_fail((ep_status)theirs->status, "%s", own.message);
        return epi_fail((ep_status)theirs->status, "rank %d: %.*s", rank, length, theirs->message);
    }
    return EP_OK;
}
