/* SPDX-License-Identifier: MIT */
#include "ep/group.h"

#include "base/error.h"
#include "ep/bootstrap.h"
#include "ep/collective.h"
#include "ep/environment.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME_MAX_BYTES 63
#define TRANSPORT_MAX_BYTES 200
#define DEFAULT_TIMEOUT_MS 30000
#define HELLO_MAGIC 0x45504731u /* "EPG1": changes with anything ranks say to each other */

/* The bootstrap that the transport keeps: from outside until the group has its control window. */
typedef struct group_bootstrap {
    epi_bootstrap base;
    epi_bootstrap *outside;
    ep_group *group;
} group_bootstrap;

/* A configuration with every default filled in. */
typedef struct group_settings {
    int rank;
    int num_ranks;
    int ranks_per_node;
    int64_t timeout_ms;
    const char *transport;
    uint64_t job; /* where ranks find each other by the local bootstrap, or a rank that rejoins */
    bool *masked; /* [num_ranks] who is left out already, when this rank rejoins */
    ep_group_config config;
} group_settings;

static ep_status switch_allgather(epi_bootstrap *base, const void *send, void *recv, size_t bytes)
{
    group_bootstrap *self = (group_bootstrap *)base;
    if (self->group->control != NULL)
        return epi_collective_gather(self->group, "all-gather", send, recv, bytes);
    return self->outside->allgather(self->outside, send, recv, bytes);
}

static void switch_close(epi_bootstrap *base)
{
    group_bootstrap *self = (group_bootstrap *)base;
    epi_bootstrap_close(self->outside);
    epi_bootstrap_free(base);
}

static ep_status check_config(const ep_group_config *given, ep_group_config *config)
{
    const ep_group_config defaults = EP_GROUP_CONFIG_INIT;
    *config = defaults;
    if (given == NULL)
        return epi_fail(EP_ERR_ARGUMENT, "config is NULL");
    if (given->size < sizeof given->size || given->size > sizeof *config)
        return epi_fail(EP_ERR_ARGUMENT, "config.size is %zu; it can be %zu..%zu", given->size,
                        sizeof given->size, sizeof *config);
    memcpy(config, given, given->size);
    if (config->rejoin != 0 && config->rejoin != 1)
        return epi_fail(EP_ERR_ARGUMENT, "rejoin is %d; it can be 0 or 1", (int)config->rejoin);
    return EP_OK;
}

/* Rank and number of ranks as given, from the world, or from the environment. */
static ep_status find_ranks(group_settings *settings)
{
    const ep_group_config *config = &settings->config;
    settings->rank = config->rank;
    settings->num_ranks = config->num_ranks;
    if (config->world != NULL) {
        int ranks = epi_thread_world_num_ranks(config->world);
        if (config->num_ranks != -1 && config->num_ranks != ranks)
            return epi_fail(EP_ERR_ARGUMENT, "num_ranks is %d; the world has %d", config->num_ranks,
                            ranks);
        settings->num_ranks = ranks;
    } else if (config->allgather == NULL && (config->rank == -1 || config->num_ranks == -1)) {
        epi_launch launch;
        EPI_TRY(epi_launch_read(epi_getenv, NULL, &launch));
        settings->rank = launch.rank;
        settings->num_ranks = launch.num_ranks;
    }
    settings->job = epi_launch_job(epi_getenv, NULL);
    if (config->world != NULL) /* several worlds of one process are as many jobs */
        settings->job ^= (uint64_t)(uintptr_t)config->world;
    return EP_OK;
}

static ep_status check_ranks(const group_settings *settings)
{
    if (settings->num_ranks < 1 || settings->num_ranks > EPI_MAX_RANKS)
        return epi_fail(EP_ERR_ARGUMENT, "num_ranks is %d; it can be 1..%d", settings->num_ranks,
                        EPI_MAX_RANKS);
    if (settings->config.rejoin && settings->num_ranks == 1)
        return epi_fail(EP_ERR_ARGUMENT,
                        "rejoin is 1; a group of one rank has none to come back to");
    if (settings->rank < 0 || settings->rank >= settings->num_ranks)
        return epi_fail(EP_ERR_ARGUMENT, "rank is %d; it can be 0..%d", settings->rank,
                        settings->num_ranks - 1);
    return EP_OK;
}

static ep_status resolve_timeout(group_settings *settings)
{
    settings->timeout_ms = settings->config.timeout_ms;
    if (settings->timeout_ms == 0) {
        settings->timeout_ms = DEFAULT_TIMEOUT_MS;
        EPI_TRY(epi_environment_timeout(epi_getenv, NULL, &settings->timeout_ms));
    }
    if (settings->timeout_ms < 1 || settings->timeout_ms > EPI_MAX_TIMEOUT_MS)
        return epi_fail(EP_ERR_ARGUMENT, "timeout_ms is %lld; it can be 1..%lld",
                        (long long)settings->timeout_ms, (long long)EPI_MAX_TIMEOUT_MS);
    return EP_OK;
}

static ep_status resolve_name(group_settings *settings)
{
    static const char allowed[] =
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    const char *name = settings->config.name;
    if (name == NULL) {
        settings->config.name = "0";
        return EP_OK;
    }
    size_t length = strnlen(name, NAME_MAX_BYTES + 1);
    if (length == 0 || length > NAME_MAX_BYTES || strspn(name, allowed) != length)
        return epi_fail(EP_ERR_ARGUMENT, "name is \"%.80s\"; it can be 1..%d of [A-Za-z0-9._-]",
                        name, NAME_MAX_BYTES);
    return EP_OK;
}

/* What may be wrong on one rank alone without keeping it from telling the others. */
static ep_status resolve_rest(group_settings *settings)
{
    const ep_group_config *config = &settings->config;
    settings->transport = config->transport;
    if (settings->transport == NULL)
        settings->transport = getenv("EP_TRANSPORT");
    if (settings->transport == NULL)
        settings->transport = config->world != NULL ? "threads" : "shm";
    if (strlen(settings->transport) >= TRANSPORT_MAX_BYTES)
        return epi_fail(EP_ERR_ARGUMENT, "transport has %zu characters; it can have up to %d",
                        strlen(settings->transport), TRANSPORT_MAX_BYTES - 1);
    settings->ranks_per_node = config->ranks_per_node;
    if (settings->ranks_per_node == 0)
        settings->ranks_per_node = settings->num_ranks;
    if (settings->ranks_per_node < 1 || settings->num_ranks % settings->ranks_per_node != 0)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ranks_per_node is %d; it can be a divisor of num_ranks %d",
                        config->ranks_per_node, settings->num_ranks);
    return EP_OK;
}

static ep_status open_outside(const group_settings *settings, epi_bootstrap **outside)
{
    const ep_group_config *config = &settings->config;
    if (config->rejoin)
        return epi_rejoin_open(settings->job, config->name, settings->rank, settings->num_ranks,
                               settings->timeout_ms, outside);
    if (config->world != NULL)
        return epi_bootstrap_threads(settings->rank, config->world, settings->timeout_ms, outside);
    if (config->allgather != NULL)
        return epi_bootstrap_callback(settings->rank, settings->num_ranks, config->allgather,
                                      config->allgather_context, outside);
    return epi_bootstrap_local(settings->job, config->name, settings->rank, settings->num_ranks,
                               settings->timeout_ms, outside);
}

typedef struct hello {
    uint32_t magic; /* 0 of a masked rank */
    int32_t num_ranks;
    int32_t ranks_per_node;
    char transport[TRANSPORT_MAX_BYTES];
} hello;

/* Compares the settings of two ranks. */
static ep_status compare_hellos(const hello *all, int a, int b)
{
    if (all[b].magic != all[a].magic)
        return epi_fail(EP_ERR_MISMATCH, "ranks %d and %d run different library versions", a, b);
    if (all[b].num_ranks != all[a].num_ranks)
        return epi_fail(EP_ERR_MISMATCH, "num_ranks is %d on rank %d but %d on rank %d",
                        all[a].num_ranks, a, all[b].num_ranks, b);
    if (all[b].ranks_per_node != all[a].ranks_per_node)
        return epi_fail(EP_ERR_MISMATCH, "ranks_per_node is %d on rank %d but %d on rank %d",
                        all[a].ranks_per_node, a, all[b].ranks_per_node, b);
    if (memcmp(all[b].transport, all[a].transport, sizeof all[a].transport) != 0)
        return epi_fail(EP_ERR_MISMATCH, "transport is \"%s\" on rank %d but \"%s\" on rank %d",
                        all[a].transport, a, all[b].transport, b);
    return EP_OK;
}

ep_status epi_group_compare(epi_bootstrap *bootstrap, int ranks_per_node, const char *transport,
                            bool *masked)
{
    hello own = {HELLO_MAGIC, bootstrap->num_ranks, ranks_per_node, ""};
    snprintf(own.transport, sizeof own.transport, "%s", transport);
    const void *gathered = NULL;
    EPI_TRY(epi_gather(bootstrap, &own, sizeof own, &gathered));
    const hello *all = gathered;
    int first = 0;
    while (first < bootstrap->rank && all[first].magic == 0)
        first++;
    for (int rank = 0; rank < bootstrap->num_ranks; rank++) {
        if (masked != NULL)
            masked[rank] = all[rank].magic == 0;
        if (all[rank].magic != 0)
            EPI_TRY(compare_hellos(all, first, rank));
    }
    return EP_OK;
}

/* Collective: every rank learns of a bad setting or a difference on any. */
static ep_status agree_settings(group_settings *settings, epi_bootstrap *bootstrap)
{
    ep_status mine = resolve_rest(settings);
    settings->masked = calloc((size_t)settings->num_ranks, sizeof *settings->masked);
    if (mine == EP_OK && settings->masked == NULL)
        mine = epi_fail(EP_ERR_MEMORY, "no memory for a group of %d ranks", settings->num_ranks);
    EPI_TRY(epi_agree(bootstrap, mine));
    return epi_group_compare(bootstrap, settings->ranks_per_node, settings->transport,
                             settings->masked);
}

/* Everything but what needs the other ranks; takes over `outside`. */
static ep_status group_alloc(const group_settings *settings, epi_bootstrap *outside,
                             ep_group **allocated)
{
    ep_group *group = calloc(1, sizeof *group);
    group_bootstrap *bootstrap = calloc(1, sizeof *bootstrap);
    _Atomic bool *late = calloc((size_t)settings->num_ranks, sizeof *late);
    if (group == NULL || bootstrap == NULL || late == NULL) {
        free(group);
        free(bootstrap);
        free((void *)late);
        return epi_fail(EP_ERR_MEMORY, "no memory for a group of %d ranks", settings->num_ranks);
    }
    *allocated = group;
    group->rank = settings->rank;
    group->num_ranks = settings->num_ranks;
    group->ranks_per_node = settings->ranks_per_node;
    group->timeout_ms = settings->timeout_ms;
    group->masked = settings->masked;
    group->late = late;
    epi_group_set_mask(group, group->rank, false); /* works out what tells masks apart */
    group->job = settings->job;
    snprintf(group->name, sizeof group->name, "%s", settings->config.name);
    snprintf(group->transport_name, sizeof group->transport_name, "%s", settings->transport);
    group->bootstrap = &bootstrap->base;
    bootstrap->group = group;
    bootstrap->outside = outside;
    EPI_TRY(epi_bootstrap_init(&bootstrap->base, switch_allgather, switch_close, settings->rank,
                               settings->num_ranks));
    bootstrap->base.rejoining = settings->config.rejoin;
    return EP_OK;
}

static ep_status connect_group(ep_group *group, const char *transport)
{
    EPI_TRY(epi_transport_open(transport, group->bootstrap, &group->transport));
    EPI_TRY(epi_collective_open(group));
    group_bootstrap *bootstrap = (group_bootstrap *)group->bootstrap;
    if (bootstrap->base.rejoining) {
        EPI_TRY(epi_rejoin_align(group, bootstrap->outside));
        epi_collective_announce(group);
        bootstrap->base.rejoining = false;
    }
    /* From here on the window serves, which notices the death of a rank. */
    epi_bootstrap_close(bootstrap->outside);
    bootstrap->outside = NULL;
    return ep_group_barrier(group);
}

static ep_status create(const ep_group_config *given, ep_group **created)
{
    group_settings settings = {0};
    EPI_TRY(check_config(given, &settings.config));
    EPI_TRY(find_ranks(&settings));
    EPI_TRY(check_ranks(&settings));
    EPI_TRY(resolve_timeout(&settings));
    EPI_TRY(resolve_name(&settings));
    epi_bootstrap *outside = NULL;
    EPI_TRY(open_outside(&settings, &outside));
    ep_group *group = NULL;
    ep_status status = agree_settings(&settings, outside);
    if (status == EP_OK)
        status = epi_agree(outside, group_alloc(&settings, outside, &group));
    if (group == NULL) {
        epi_bootstrap_close(outside);
        free(settings.masked);
        return status;
    }
    if (status == EP_OK)
        status = connect_group(group, settings.transport);
    if (status == EP_OK)
        *created = group;
    else
        ep_group_destroy(group);
    return status;
}

void ep_group_destroy(ep_group *group)
{
    if (group == NULL)
        return;
    if (group->control != NULL)
        group->transport->ops->window_destroy(group->control);
    if (group->transport != NULL)
        group->transport->ops->destroy(group->transport);
    epi_bootstrap_close(group->bootstrap);
    free(group->masked);
    free((void *)group->late);
    free(group);
}

ep_status ep_group_create(const ep_group_config *config, ep_group **group)
{
    if (group == NULL)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_create: group is NULL");
    *group = NULL;
    ep_status status = create(config, group);
    /* Reasons come from many places; the call is named in one. */
    return status == EP_OK ? EP_OK : epi_fail(status, "ep_group_create: %s", ep_last_error());
}

int32_t ep_group_rank(const ep_group *group)
{
    return group != NULL ? group->rank : -1;
}

int32_t ep_group_num_ranks(const ep_group *group)
{
    return group != NULL ? group->num_ranks : 0;
}

int32_t ep_group_node(const ep_group *group)
{
    return group != NULL ? group->rank / group->ranks_per_node : -1;
}

int32_t ep_group_num_nodes(const ep_group *group)
{
    return group != NULL ? group->num_ranks / group->ranks_per_node : 0;
}

const char *ep_group_transport(const ep_group *group)
{
    return group != NULL ? group->transport->ops->name : "";
}

int64_t ep_group_timeout_ms(const ep_group *group)
{
    return group != NULL ? group->timeout_ms : 0;
}

ep_status ep_group_set_timeout_ms(ep_group *group, int64_t timeout_ms)
{
    if (group == NULL)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_set_timeout_ms: group is NULL");
    if (timeout_ms < 1 || timeout_ms > EPI_MAX_TIMEOUT_MS)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_group_set_timeout_ms: timeout_ms is %lld; it can be 1..%lld",
                        (long long)timeout_ms, (long long)EPI_MAX_TIMEOUT_MS);
    group->timeout_ms = timeout_ms;
    return EP_OK;
}

ep_status ep_group_barrier(ep_group *group)
{
    if (group == NULL)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_barrier: group is NULL");
    return epi_collective_gather(group, "barrier", NULL, NULL, 0);
}

ep_status ep_group_allgather(ep_group *group, const void *send, void *recv, size_t bytes)
{
    if (group == NULL)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_allgather: group is NULL");
    if (bytes > EPI_ALLGATHER_MAX)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_allgather: bytes is %zu; it can be 0..%zu",
                        bytes, EPI_ALLGATHER_MAX);
    if (bytes > 0 && (send == NULL || recv == NULL))
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_allgather: %s is NULL",
                        send == NULL ? "send" : "recv");
    return epi_collective_gather(group, "all-gather", send, recv, bytes);
}
