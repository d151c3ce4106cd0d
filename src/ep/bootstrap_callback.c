/* SPDX-License-Identifier: MIT */
#include "ep/bootstrap.h"

#include "base/error.h"

#include <stdlib.h>

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

ep_status epi_bootstrap_callback(int rank, int num_ranks, ep_allgather_fn allgather, void *context,
                                 epi_bootstrap **bootstrap)
{
    callback_bootstrap *self = calloc(1, sizeof *self);
    if (self == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of %d ranks", num_ranks);
    self->allgather = allgather;
    self->context = context;
    ep_status status =
        epi_bootstrap_init(&self->base, callback_allgather, epi_bootstrap_free, rank, num_ranks);
    if (status != EP_OK)
        epi_bootstrap_free(&self->base);
    else
        *bootstrap = &self->base;
    return status;
}
