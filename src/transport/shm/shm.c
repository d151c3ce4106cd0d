/* SPDX-License-Identifier: MIT */
#include "transport/shm/shm.h"

#include "base/clock.h"
#include "base/error.h"
#include "transport/cores.h"
#include "transport/eventcount.h"
#include "transport/shm/internal.h"

#include <stdlib.h>

static void shm_destroy(epi_transport *transport)
{
    epi_shm_peers_part(shm_self(transport));
    free(transport);
}

static void shm_notify(epi_window *window, int dst, int slot, uint64_t value)
{
    if (window->peer[dst] != NULL)
        epi_control_raise((epi_control *)window->peer[dst], window->transport->rank, slot, value,
                          EPI_FUTEX_SHARED);
}

static uint32_t shm_sleep_begin(epi_window *window)
{
    return epi_control_sleep_begin((epi_control *)window->base);
}

static void shm_sleep(epi_window *window, uint32_t ticket, int64_t timeout_ns)
{
    epi_control_sleep((epi_control *)window->base, ticket, timeout_ns, EPI_FUTEX_SHARED);
}

static void shm_sleep_cancel(epi_window *window)
{
    (void)window; /* the flag left behind costs one spurious wake at most */
}

static int64_t shm_now_ns(epi_transport *transport)
{
    (void)transport;
    return epi_clock_ns();
}

static int shm_ranks_per_core(epi_transport *transport)
{
    return shm_self(transport)->ranks_per_core;
}

/* Round for round what epi_shm_open does on the rank that comes back. */
static ep_status shm_admit(epi_transport *base, int rank, epi_bootstrap *bootstrap)
{
    shm_transport *transport = shm_self(base);
    EPI_TRY(epi_agree(bootstrap, EP_OK));
    EPI_TRY(epi_shm_peers_meet(transport, bootstrap, rank));
    EPI_TRY(epi_shm_peers_try_read(transport, bootstrap));
    return epi_ranks_per_core(bootstrap, &transport->ranks_per_core);
}

static const epi_transport_ops shm_ops = {
    .name = "shm",
    .destroy = shm_destroy,
    .window_create = epi_shm_window_create,
    .window_destroy = epi_shm_window_destroy,
    .window_commit = epi_shm_window_commit,
    .admit = shm_admit,
    .window_admit = epi_shm_window_admit,
    .window_back = epi_shm_window_back,
    .window_drop = epi_shm_window_drop,
    .notify = shm_notify,
    .sleep_begin = shm_sleep_begin,
    .sleep = shm_sleep,
    .sleep_cancel = shm_sleep_cancel,
    .peer_alive = epi_shm_peer_alive,
    .kill_self = epi_shm_kill_self,
    .can_peer_read = epi_shm_can_peer_read,
    .peer_read = epi_shm_peer_read,
    .now_ns = shm_now_ns,
    .ranks_per_core = shm_ranks_per_core,
};

static shm_transport *shm_alloc(int num_ranks)
{
    shm_transport *transport = calloc(1, sizeof *transport);
    if (transport == NULL)
        return NULL;
    transport->peers = calloc((size_t)num_ranks, sizeof *transport->peers);
    if (transport->peers == NULL) {
        free(transport);
        return NULL;
    }
    for (int rank = 0; rank < num_ranks; rank++)
        transport->peers[rank].pidfd = -1;
    return transport;
}

ep_status epi_shm_open(epi_bootstrap *bootstrap, epi_transport **opened)
{
    shm_transport *transport = shm_alloc(bootstrap->num_ranks);
    ep_status status = EP_OK;
    if (transport == NULL)
        status =
            epi_fail(EP_ERR_MEMORY, "no memory for a transport of %d ranks", bootstrap->num_ranks);
    else
        transport->base = (epi_transport){&shm_ops, bootstrap->rank, bootstrap->num_ranks};
    status = epi_agree(bootstrap, status);
    if (status == EP_OK) {
        transport->bootstrap = bootstrap;
        status = epi_shm_peers_meet(transport, bootstrap, -1);
    }
    if (status == EP_OK)
        status = epi_shm_peers_try_read(transport, bootstrap);
    if (status == EP_OK)
        status = epi_ranks_per_core(bootstrap, &transport->ranks_per_core);
    if (status == EP_OK)
        *opened = &transport->base;
    else if (transport != NULL)
        shm_destroy(&transport->base);
    return status;
}
