/* SPDX-License-Identifier: MIT */
#include "transport/ops.h"

#include "base/error.h"
#include "transport/shm/shm.h"
#include "transport/threads/threads.h"

#include <string.h>

typedef ep_status (*open_fn)(epi_bootstrap *bootstrap, epi_transport **transport);

static const struct {
    const char *name;
    open_fn open;
} transports[] = {
    {"shm", epi_shm_open},
    {"threads", epi_threads_open},
};

ep_status epi_transport_open(const char *name, epi_bootstrap *bootstrap, epi_transport **transport)
{
    for (size_t i = 0; i < sizeof transports / sizeof *transports; i++)
        if (strcmp(name, transports[i].name) == 0)
            return transports[i].open(bootstrap, transport);
    return epi_fail(EP_ERR_UNSUPPORTED, "transport \"%.64s\"; there are shm and threads", name);
}
