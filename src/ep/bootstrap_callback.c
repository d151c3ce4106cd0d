/* SPDX-License-Identifier: MIT */
#include "ep/bootstrap.h"

#include "base/error.h"

#include <stdlib.h>
#include <string.h>

typedef struct callback_bootstrap {
    epi_bootstrap base;
    ep_allgather_fn allgather;
    void *context;
} callback_bootstrap;

static ep_status callback_allgather(epi_bootstrap *base, const void *send, void *recv, size_t bytes)
{
    callback_bootstrap *self = (callback_bootstrap *)base;
    int result = self->allgather(self->context, send, recv, bytes);
    if (result != 0)
        return epi_fail(EP_ERR_SYSTEM, "the caller's allgather of %zu bytes returned %d", bytes,
                        result);
    return EP_OK;
}

static void callback_close(epi_bootstrap *base)
{
    free(base->scratch);
    free(base);
}

ep_status epi_bootstrap_callback(int rank, int num_ranks, ep_allgather_fn allgather, void *context,
                                 epi_bootstrap **bootstrap)
{
    callback_bootstrap *self = calloc(1, sizeof *self);
    uint8_t *scratch = malloc((size_t)num_ranks * EPI_BOOTSTRAP_MAX);
    if (self == NULL || scratch == NULL) {
        free(self);
        free(scratch);
        return epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of %d ranks", num_ranks);
    }
    self->base = (epi_bootstrap){callback_allgather, callback_close, rank, num_ranks, scratch};
    self->allgather = allgather;
    self->context = context;
    *bootstrap = &self->base;
    return EP_OK;
}

void epi_bootstrap_close(epi_bootstrap *bootstrap)
{
    if (bootstrap != NULL)
        bootstrap->close(bootstrap);
}
