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

static ep_status open_alone(epi_bootstrap **bootstrap)
{
    epi_bootstrap *base = calloc(1, sizeof *base);
    if (base == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of 1 rank");
    ep_status status = epi_bootstrap_init(base, alone_allgather, epi_bootstrap_free, 0, 1);
    if (status != EP_OK)
        epi_bootstrap_free(base);
    else
        *bootstrap = base;
    return status;
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
