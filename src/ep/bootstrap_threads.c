/* SPDX-License-Identifier: MIT */
/* The world that threads of one process meet in, and the bootstrap over it. */
#include "ep/bootstrap.h"

#include "base/clock.h"
#include "base/error.h"
#include "ep/rank_list.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WORLD_MAX 1024

struct ep_thread_world {
    pthread_mutex_t mutex;
    pthread_cond_t complete;
    int num_ranks;
    int num_arrived;
    uint64_t round; /* of the all-gather under way; the last one's data stays until the next ends */
    bool *arrived;  /* [num_ranks] in this round */
    uint8_t *data[2];               /* [num_ranks * EPI_BOOTSTRAP_MAX], by round's parity */
    char verdict[2][EPI_ERROR_MAX]; /* why that round failed, "" if it did not */
    size_t bytes;                   /* of this round, as its first rank says */
};

typedef struct threads_bootstrap {
    epi_bootstrap base;
    ep_thread_world *world;
    int64_t timeout_ms;
} threads_bootstrap;

static ep_status init_sync(ep_thread_world *world)
{
    pthread_condattr_t attributes;
    if (pthread_mutex_init(&world->mutex, NULL) != 0)
        return epi_fail(EP_ERR_SYSTEM, "no mutex");
    if (pthread_condattr_init(&attributes) == 0) {
        pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
        int failed = pthread_cond_init(&world->complete, &attributes);
        pthread_condattr_destroy(&attributes);
        if (!failed)
            return EP_OK;
    }
    pthread_mutex_destroy(&world->mutex);
    return epi_fail(EP_ERR_SYSTEM, "no condition variable");
}

static void free_world(ep_thread_world *world)
{
    free(world->arrived);
    free(world->data[0]);
    free(world->data[1]);
    free(world);
}

ep_status ep_thread_world_create(int32_t num_ranks, ep_thread_world **created)
{
    if (created == NULL)
        return epi_fail(EP_ERR_ARGUMENT, "ep_thread_world_create: world is NULL");
    *created = NULL;
    if (num_ranks < 1 || num_ranks > WORLD_MAX)
        return epi_fail(EP_ERR_ARGUMENT, "ep_thread_world_create: num_ranks is %d; it can be 1..%d",
                        num_ranks, WORLD_MAX);
    ep_thread_world *world = calloc(1, sizeof *world);
    if (world == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for a world of %d threads", num_ranks);
    world->num_ranks = num_ranks;
    world->arrived = calloc((size_t)num_ranks, sizeof *world->arrived);
    for (int i = 0; i < 2; i++)
        world->data[i] = malloc((size_t)num_ranks * EPI_BOOTSTRAP_MAX);
    ep_status status = EP_OK;
    if (world->arrived == NULL || world->data[0] == NULL || world->data[1] == NULL)
        status = epi_fail(EP_ERR_MEMORY, "no memory for a world of %d threads", num_ranks);
    if (status == EP_OK)
        status = init_sync(world);
    if (status != EP_OK)
        free_world(world);
    else
        *created = world;
    return status;
}

void ep_thread_world_destroy(ep_thread_world *world)
{
    if (world == NULL)
        return;
    pthread_cond_destroy(&world->complete);
    pthread_mutex_destroy(&world->mutex);
    free_world(world);
}

int epi_thread_world_num_ranks(const ep_thread_world *world)
{
    return world->num_ranks;
}

static bool is_missing(void *context, int rank)
{
    return !((const ep_thread_world *)context)->arrived[rank];
}

/* Called with the mutex held, as all that follow. */
static void end_round(ep_thread_world *world)
{
    memset(world->arrived, 0, (size_t)world->num_ranks * sizeof *world->arrived);
    world->num_arrived = 0;
    world->round++;
    world->verdict[world->round % 2][0] = '\0';
    pthread_cond_broadcast(&world->complete);
}

static ep_status arrive(ep_thread_world *world, int rank, const void *send, size_t bytes)
{
    if (world->arrived[rank])
        return epi_fail(EP_ERR_STATE, "two threads of one world are both rank %d", rank);
    if (world->num_arrived > 0 && bytes != world->bytes)
        return epi_fail(EP_ERR_STATE, "threads of one world are in different calls");
    world->bytes = bytes;
    memcpy(world->data[world->round % 2] + (size_t)rank * bytes, send, bytes);
    world->arrived[rank] = true;
    if (++world->num_arrived == world->num_ranks)
        end_round(world);
    return EP_OK;
}

static ep_status wait_complete(ep_thread_world *world, uint64_t round, int64_t timeout_ms)
{
    struct timespec deadline = epi_timespec(epi_clock_ns() + timeout_ms * EPI_NS_PER_MS);
    while (world->round == round) {
        if (pthread_cond_timedwait(&world->complete, &world->mutex, &deadline) != ETIMEDOUT ||
            world->round != round)
            continue;
        /* The first to lose patience ends the round for all who wait: they see the same ranks
           missing, and who comes later starts afresh. */
        char ranks[128];
        epi_rank_list(world->num_ranks, is_missing, world, ranks, sizeof ranks);
        snprintf(world->verdict[round % 2], EPI_ERROR_MAX,
                 "group creation: no word from %s within %lld ms", ranks, (long long)timeout_ms);
        end_round(world);
    }
    const char *verdict = world->verdict[round % 2];
    return verdict[0] == '\0' ? EP_OK : epi_fail(EP_ERR_TIMEOUT, "%s", verdict);
}

static ep_status threads_allgather(epi_bootstrap *base, const void *send, void *recv, size_t bytes)
{
    threads_bootstrap *self = (threads_bootstrap *)base;
    ep_thread_world *world = self->world;
    pthread_mutex_lock(&world->mutex);
    uint64_t round = world->round;
    ep_status status = arrive(world, base->rank, send, bytes);
    if (status == EP_OK)
        status = wait_complete(world, round, self->timeout_ms);
    if (status == EP_OK)
        memcpy(recv, world->data[round % 2], (size_t)world->num_ranks * bytes);
    pthread_mutex_unlock(&world->mutex);
    return status;
}

ep_status epi_bootstrap_threads(int rank, ep_thread_world *world, int64_t timeout_ms,
                                epi_bootstrap **bootstrap)
{
    threads_bootstrap *self = calloc(1, sizeof *self);
    if (self == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of %d ranks", world->num_ranks);
    self->world = world;
    self->timeout_ms = timeout_ms;
    ep_status status = epi_bootstrap_init(&self->base, threads_allgather, epi_bootstrap_free, rank,
                                          world->num_ranks);
    if (status != EP_OK)
        epi_bootstrap_free(&self->base);
    else
        *bootstrap = &self->base;
    return status;
}
