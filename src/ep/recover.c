/* SPDX-License-Identifier: MIT */
/*
 * Getting in step again. A rank publishes in its control window, under a round's
 * number, whom it masks and how far it has counted, and raises ROUND. It waits
 * until everybody it does not mask has come to the same round, adds their masks to
 * its own, and goes to the next round until all say the same; it then notes the
 * round as finished. Masks only grow, so this ends.
 *
 * Ranks that failed here before may be at different rounds: the lower goes to the
 * higher. One that is past a round because it finished it, and calls again, still
 * counts for that round; what it said in it lies in the other of two cells, which
 * it cannot write over before everybody has come to the round after.
 */
#include "base/error.h"
#include "ep/backend.h"
#include "ep/buffer.h"
#include "ep/collective.h"
#include "ep/ll.h"
#include "ep/wait.h"

#include <string.h>

#define CALL "ep_group_recover"

typedef struct round_cell {
    _Atomic uint64_t round; /* raised last */
    _Atomic uint64_t group_epoch, buffer_epoch;
    _Atomic uint8_t masked[]; /* [num_ranks] */
} round_cell;

typedef struct recover_area {
    _Alignas(64) _Atomic uint64_t finished; /* last round that this rank has finished */
} recover_area;

typedef struct recovery {
    ep_group *group;
    uint64_t round;
    uint64_t group_epoch, buffer_epoch; /* largest of any rank */
    int masked_by;                      /* a rank that masks this one; -1 */
    bool differs;                       /* somebody masks others than this rank does */
} recovery;

static size_t cell_bytes(int num_ranks)
{
    return (sizeof(round_cell) + (size_t)num_ranks + 63) / 64 * 64;
}

size_t epi_recover_bytes(int num_ranks)
{
    return sizeof(recover_area) + 2 * cell_bytes(num_ranks);
}

static recover_area *area_of(const ep_group *group, int rank)
{
    return (recover_area *)(group->control->peer[rank] + epi_collective_recover_offset(group));
}

static round_cell *cell_of(const ep_group *group, int rank, uint64_t round)
{
    return (round_cell *)((uint8_t *)(area_of(group, rank) + 1) +
                          round % 2 * cell_bytes(group->num_ranks));
}

static uint64_t word_of(const ep_group *group, int rank, int slot)
{
    return epi_slot_load(group->control, rank, slot);
}

static void raise_all(ep_group *group, int slot, uint64_t value)
{
    for (int i = 0; i < group->num_ranks; i++)
        if (!group->masked[i] && i != group->rank)
            group->transport->ops->notify(group->control, i, slot, value);
}

static void publish(const recovery *r)
{
    ep_group *group = r->group;
    round_cell *own = cell_of(group, group->rank, r->round);
    uint64_t most = 0;
    for (const ep_buffer *buffer = group->buffers; buffer; buffer = buffer->next_of_group)
        most = buffer->epoch > most ? buffer->epoch : most;
    atomic_store(&own->group_epoch, group->epoch);
    atomic_store(&own->buffer_epoch, most);
    for (int i = 0; i < group->num_ranks; i++)
        atomic_store(&own->masked[i], group->masked[i]);
    atomic_store(&own->round, r->round);
    raise_all(group, EPI_GROUP_SLOT_ROUND, r->round);
}

/* Whether `rank` has said what it says in this round. */
static bool has_come(const recovery *r, int rank)
{
    return rank == r->group->rank || word_of(r->group, rank, EPI_GROUP_SLOT_ROUND) >= r->round;
}

/* Whether `rank` has gone to a later round without having finished this one. */
static bool is_ahead(const recovery *r, int rank)
{
    return rank != r->group->rank && word_of(r->group, rank, EPI_GROUP_SLOT_ROUND) > r->round &&
           atomic_load(&area_of(r->group, rank)->finished) < r->round;
}

/* Takes over the masks of one rank that has come. */
static void read_cell(recovery *r, int rank)
{
    ep_group *group = r->group;
    const round_cell *cell = cell_of(group, rank, r->round);
    if (atomic_load(&cell->round) != r->round)
        return;
    uint64_t group_epoch = atomic_load(&cell->group_epoch);
    uint64_t buffer_epoch = atomic_load(&cell->buffer_epoch);
    r->group_epoch = group_epoch > r->group_epoch ? group_epoch : r->group_epoch;
    r->buffer_epoch = buffer_epoch > r->buffer_epoch ? buffer_epoch : r->buffer_epoch;
    for (int i = 0; i < group->num_ranks; i++) {
        bool masks = atomic_load(&cell->masked[i]);
        r->differs |= masks != group->masked[i];
        if (masks && i == group->rank)
            r->masked_by = rank;
        else if (masks)
            epi_group_set_mask(group, i, true);
    }
}

/* Whether the round is over, well or not. */
static bool round_over(void *context)
{
    recovery *r = context;
    const bool *masked = r->group->masked;
    bool all = true;
    for (int rank = 0; rank < r->group->num_ranks; rank++) {
        if (masked[rank])
            continue;
        if (is_ahead(r, rank))
            return true;
        if (!has_come(r, rank))
            all = false;
        else
            read_cell(r, rank);
    }
    return all || r->differs || r->masked_by >= 0;
}

static bool is_late(void *context, int rank)
{
    return !has_come(context, rank);
}

/* Masks whoever the failed wait has found dead; what else it found is an error. */
static ep_status mask_dead(recovery *r, ep_status status)
{
    if (status != EP_ERR_RANK_DEAD || atomic_load(&r->group->late[r->group->rank]))
        return status;
    for (int rank = 0; rank < r->group->num_ranks; rank++)
        if (atomic_load(&r->group->late[rank]))
            epi_group_set_mask(r->group, rank, true);
    r->differs = true;
    return EP_OK;
}

/* One round; EP_IN_PROGRESS when another must follow. */
static ep_status run_round(recovery *r)
{
    ep_group *group = r->group;
    r->differs = false;
    r->group_epoch = r->buffer_epoch = 0;
    publish(r);
    ep_status status = epi_wait(group, group->control, CALL, r->round, round_over, is_late, r, 0);
    if (status != EP_OK)
        EPI_TRY(mask_dead(r, status));
    if (r->masked_by >= 0)
        return epi_fail(EP_ERR_STATE,
                        CALL ": rank %d has masked this rank, which can come back by "
                             "ep_group_create with config.rejoin",
                        r->masked_by);
    uint64_t last = r->round;
    for (int rank = 0; rank < group->num_ranks; rank++)
        if (!group->masked[rank] && is_ahead(r, rank) &&
            word_of(group, rank, EPI_GROUP_SLOT_ROUND) > last)
            last = word_of(group, rank, EPI_GROUP_SLOT_ROUND);
    if (last == r->round && !r->differs)
        return EP_OK;
    r->round = last > r->round ? last : r->round + 1;
    return EP_IN_PROGRESS;
}

ep_status epi_recover_align(ep_group *group, uint64_t group_epoch, uint64_t buffer_epoch)
{
    group->epoch = group_epoch;
    epi_collective_announce(group);
    for (ep_buffer *buffer = group->buffers; buffer; buffer = buffer->next_of_group)
        if (!buffer->backend)
            epi_buffer_align(buffer, buffer_epoch);
    for (ep_buffer *buffer = group->buffers; buffer; buffer = buffer->next_of_group)
        if (buffer->backend)
            EPI_TRY(buffer->backend->align(buffer));
    return EP_OK;
}

ep_status ep_group_recover(ep_group *group)
{
    if (!group)
        return epi_fail(EP_ERR_ARGUMENT, CALL ": group is NULL");
    EPI_TRY(epi_group_check_idle(group, CALL));
    recovery r = {.group = group, .round = group->recoveries + 1, .masked_by = -1};
    ep_status status;
    do {
        group->recoveries = r.round;
        status = run_round(&r);
    } while (status == EP_IN_PROGRESS);
    EPI_TRY(status);
    atomic_store(&area_of(group, group->rank)->finished, r.round);
    return epi_recover_align(group, r.group_epoch, r.buffer_epoch + 2);
}
