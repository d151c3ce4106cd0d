/* SPDX-License-Identifier: MIT */
/*
 * A rank publishes its bytes in its own window, notifies everybody of the call's
 * epoch, waits until everybody has done so and reads theirs.
 *
 * Two cells take turns. A rank overwrites the cell of epoch e at e + 2, and only
 * once every rank has notified e + 1: none still reads e. After a failed call
 * ranks may be at different epochs; a cell carries its own, so that the words of
 * a later call are never taken for those of an earlier one.
 */
#include "ep/collective.h"

#include "base/clock.h"
#include "base/error.h"
#include "ep/wait.h"

#include <string.h>

#define CELL_BYTES 4096

typedef struct cell {
    uint64_t epoch;
    uint64_t bytes;
    uint8_t data[CELL_BYTES - 2 * sizeof(uint64_t)]; /* longer messages lie behind the cells */
} cell;

typedef struct late_context {
    const ep_group *group;
    uint64_t epoch;
} late_context;

static size_t cells_offset(const ep_group *group)
{
    return (epi_control_bytes(group->num_ranks) + CELL_BYTES - 1) / CELL_BYTES * CELL_BYTES;
}

static cell *cell_of(const ep_group *group, int rank, uint64_t epoch)
{
    return (cell *)(group->control->peer[rank] + cells_offset(group)) + epoch % 2;
}

size_t epi_collective_recover_offset(const ep_group *group)
{
    return cells_offset(group) + 2 * sizeof(cell);
}

/* Where longer messages lie. */
static size_t long_offset(const ep_group *group)
{
    return epi_collective_recover_offset(group) +
           (epi_recover_bytes(group->num_ranks) + CELL_BYTES - 1) / CELL_BYTES * CELL_BYTES;
}

static uint8_t *data_of(const ep_group *group, int rank, uint64_t epoch, size_t bytes)
{
    cell *small = cell_of(group, rank, epoch);
    if (bytes <= sizeof small->data)
        return small->data;
    return group->control->peer[rank] + long_offset(group) + (epoch % 2) * EPI_ALLGATHER_MAX;
}

static bool is_late(void *context, int rank)
{
    const late_context *late = context;
    return rank != late->group->rank &&
           epi_slot_load(late->group->control, rank, EPI_GROUP_SLOT_EPOCH) < late->epoch;
}

void epi_collective_announce(ep_group *group)
{
    for (int i = 1; i < group->num_ranks; i++) { /* starting beside oneself spreads the load */
        int rank = (group->rank + i) % group->num_ranks;
        if (!group->masked[rank])
            group->transport->ops->notify(group->control, rank, EPI_GROUP_SLOT_EPOCH, group->epoch);
    }
}

static ep_status publish(ep_group *group, uint64_t epoch, const void *send, size_t bytes)
{
    if (bytes > sizeof((cell *)0)->data)
        EPI_TRY(group->transport->ops->window_commit(group->control,
                                                     long_offset(group) + 2 * EPI_ALLGATHER_MAX));
    cell *own = cell_of(group, group->rank, epoch);
    own->epoch = epoch;
    own->bytes = bytes;
    if (bytes > 0)
        memcpy(data_of(group, group->rank, epoch, bytes), send, bytes);
    epi_collective_announce(group);
    return EP_OK;
}

static ep_status collect(ep_group *group, const char *call, uint64_t epoch, void *recv,
                         size_t bytes)
{
    for (int rank = 0; rank < group->num_ranks; rank++) {
        uint8_t *to = (uint8_t *)recv + (size_t)rank * bytes;
        if (group->masked[rank]) {
            if (bytes > 0)
                memset(to, 0, bytes);
            continue;
        }
        const cell *theirs = cell_of(group, rank, epoch);
        if (theirs->epoch != epoch)
            return epi_fail(EP_ERR_ABORTED, "%s (call %llu): rank %d gave it up", call,
                            (unsigned long long)epoch, rank);
        if (theirs->bytes != bytes)
            return epi_fail(EP_ERR_MISMATCH,
                            "%s (call %llu): %zu bytes on rank %d but %llu on rank %d", call,
                            (unsigned long long)epoch, bytes, group->rank,
                            (unsigned long long)theirs->bytes, rank);
        if (bytes > 0)
            memcpy(to, data_of(group, rank, epoch, bytes), bytes);
    }
    return EP_OK;
}

ep_status epi_collective_gather(ep_group *group, const char *call, const void *send, void *recv,
                                size_t bytes)
{
    uint64_t epoch = ++group->epoch;
    late_context previous = {group, epoch - 1}, current = {group, epoch};
    EPI_TRY(epi_wait(group, group->control, call, epoch, NULL, is_late, &previous, 0));
    EPI_TRY(publish(group, epoch, send, bytes));
    EPI_TRY(epi_wait(group, group->control, call, epoch, NULL, is_late, &current, 0));
    return collect(group, call, epoch, recv, bytes);
}

ep_status epi_collective_open(ep_group *group)
{
    size_t head = long_offset(group);
    return group->transport->ops->window_create(group->transport, head + 2 * EPI_ALLGATHER_MAX,
                                                head, &group->control);
}
