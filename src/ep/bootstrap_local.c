/* SPDX-License-Identifier: MIT */
/* Ranks of one host that find each other by the name of their job: rank 0 is the hub. */
#include "ep/bootstrap.h"

#include "base/error.h"
#include "ep/client.h"
#include "ep/hub.h"

#include <stdlib.h>
#include <string.h>

static ep_status alone_allgather(epi_bootstrap *base, const void *send, void *recv, size_t bytes)
{
    (void)base;
    memcpy(recv, send, bytes);
    return EP_OK;
}

static void alone_close(epi_bootstrap *base)
{
    free(base->scratch);
    free(base);
}

static ep_status open_alone(epi_bootstrap **bootstrap)
{
    epi_bootstrap *base = malloc(sizeof *base);
    uint8_t *scratch = malloc(EPI_BOOTSTRAP_MAX);
    if (base == NULL || scratch == NULL) {
        free(base);
        free(scratch);
        return epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of 1 rank");
    }
    *base = (epi_bootstrap){alone_allgather, alone_close, 0, 1, scratch};
    *bootstrap = base;
    return EP_OK;
}

ep_status epi_bootstrap_local(uint64_t job, const char *name, int rank, int num_ranks,
                              int64_t timeout_ms, epi_bootstrap **bootstrap)
{
    if (num_ranks == 1)
        return open_alone(bootstrap);
    epi_rendezvous_name rendezvous = epi_rendezvous(job, name);
    return rank == 0 ? epi_hub_open(&rendezvous, num_ranks, timeout_ms, bootstrap)
                     : epi_client_open(&rendezvous, rank, num_ranks, timeout_ms, bootstrap);
}
