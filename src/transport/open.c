/* SPDX-License-Identifier: MIT */
#include "transport/ops.h"

#include "base/error.h"
#include "transport/fault/fault.h"
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

/* A transport by the first `length` characters of its name. */
static ep_status open_plain(const char *name, size_t length, epi_bootstrap *bootstrap,
                            epi_transport **transport)
{
    for (size_t i = 0; i < sizeof transports / sizeof *transports; i++)
        if (strlen(transports[i].name) == length && memcmp(name, transports[i].name, length) == 0)
            return transports[i].open(bootstrap, transport);
    return epi_fail(EP_ERR_UNSUPPORTED,
                    "transport \"%.*s\"; there are shm, threads and fault(NAME):KEY=VALUE,...",
                    (int)(length < 64 ? length : 64), name);
}

ep_status epi_transport_open(const char *name, epi_bootstrap *bootstrap, epi_transport **transport)
{
    static const char fault[] = "fault(";
    if (strncmp(name, fault, sizeof fault - 1) != 0)
        return open_plain(name, strlen(name), bootstrap, transport);
    const char *inner_name = name + sizeof fault - 1;
    const char *end = strchr(inner_name, ')');
    if (end == NULL || (end[1] != ':' && end[1] != '\0'))
        return epi_fail(EP_ERR_ARGUMENT,
                        "transport \"%.64s\"; it can be fault(NAME) or fault(NAME):KEY=VALUE,...",
                        name);
    epi_transport *inner = NULL;
    EPI_TRY(open_plain(inner_name, (size_t)(end - inner_name), bootstrap, &inner));
    return epi_fault_open(bootstrap, inner, end[1] == ':' ? end + 2 : "", transport);
}
