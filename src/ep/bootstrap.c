/* SPDX-License-Identifier: MIT */
#include "ep/bootstrap.h"

#include "base/error.h"

#include <stdlib.h>

ep_status epi_bootstrap_init(epi_bootstrap *bootstrap, epi_bootstrap_allgather allgather,
                             void (*close)(epi_bootstrap *bootstrap), int rank, int num_ranks)
{
    bootstrap->allgather = allgather;
    bootstrap->close = close;
    bootstrap->rank = rank;
    bootstrap->num_ranks = num_ranks;
    bootstrap->scratch = malloc((size_t)num_ranks * EPI_BOOTSTRAP_MAX);
    if (bootstrap->scratch == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of %d ranks", num_ranks);
    return EP_OK;
}

void epi_bootstrap_free(epi_bootstrap *bootstrap)
{
    free(bootstrap->scratch);
    free(bootstrap);
}

void epi_bootstrap_close(epi_bootstrap *bootstrap)
{
    if (bootstrap != NULL)
        bootstrap->close(bootstrap);
}
