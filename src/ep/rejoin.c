/* SPDX-License-Identifier: MIT */
/*
 * A masked rank comes back. It and the lowest of the others meet at a rendezvous
 * of the job's, and that one passes words on: to it those of all the others, which
 * they exchange over the group's control window, and to them its own. Over this
 * bootstrap the rank that comes back creates its group as ever, while the others
 * take its place in all collectives of that: they admit it to the transport and to
 * the control window. From there on the control window serves, and in the same way
 * the rank creates its buffers while the others admit it to theirs.
 */
#include "base/error.h"
#include "ep/bootstrap.h"
#include "ep/buffer.h"
#include "ep/client.h"
#include "ep/collective.h"
#include "ep/hub.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CALL "ep_group_readmit"

/* The rank that comes back and the one that passes words on. */
enum { STAYING, COMING, NUM_SIDES };

typedef struct verdict {
    int32_t status;
    char text[300];
} verdict;

/* What a rank that stays tells the others in one all-gather. */
typedef struct parcel {
    verdict verdict; /* of the one that passes words on */
    uint8_t own[EPI_BOOTSTRAP_MAX];
    uint8_t coming[EPI_BOOTSTRAP_MAX]; /* passed on */
} parcel;

typedef struct rejoin {
    epi_bootstrap base;
    epi_bootstrap *pair; /* between the two sides; NULL on ranks that only stay */
    ep_group *group;     /* NULL on the rank that comes back */
    int coming;
    parcel *parcels; /* [num_ranks] */
    verdict broken;  /* why words no longer reach the rank that comes back; all hear it next time */
} rejoin;

/* Both sides know the job, the group's name and the rank. */
static epi_rendezvous_name meeting_place(uint64_t job, const char *name, int rank)
{
    return epi_rendezvous(job ^ (UINT64_C(0x9e3779b97f4a7c15) * ((uint64_t)rank + 1)), name);
}

/* ------------------------------------------------------------- passing words on */

/* The pair counts its sides 0 and 1; the caller knows them as ranks. */
static ep_status fail_pair(const rejoin *self, ep_status status)
{
    if (status != EP_ERR_RANK_DEAD && status != EP_ERR_TIMEOUT)
        return status;
    const char *what =
        status == EP_ERR_TIMEOUT ? "is no longer heard from" : "has ended or given up";
    return self->group ? epi_fail(status, "rank %d, which was coming back, %s", self->coming, what)
                       : epi_fail(status, "the rank that was taking this one in %s", what);
}

/* One exchange between the two sides, of up to EPI_BOOTSTRAP_MAX bytes each. */
static ep_status exchange(const rejoin *self, const void *send, void *recv, size_t bytes)
{
    const void *both = NULL;
    uint8_t padded[EPI_BOOTSTRAP_MAX] = {0};
    if (send)
        memcpy(padded, send, bytes);
    ep_status status = epi_gather(self->pair, padded, sizeof padded, &both);
    if (status != EP_OK)
        return fail_pair(self, status);
    int other = self->group ? COMING : STAYING;
    if (recv)
        memcpy(recv, (const uint8_t *)both + (size_t)other * sizeof padded, bytes);
    return EP_OK;
}

static verdict verdict_of(ep_status status)
{
    verdict v = {.status = (int32_t)status};
    if (status != EP_OK)
        snprintf(v.text, sizeof v.text, "%.299s", ep_last_error());
    return v;
}

static ep_status heed(const verdict *v)
{
    return v->status == EP_OK
               ? EP_OK
               : epi_fail((ep_status)v->status, "%.*s", (int)sizeof v->text - 1, v->text);
}

/* The rank that passes words on tells the other side everybody's. */
static ep_status tell_coming(const rejoin *self, const verdict *v, const uint8_t *all, size_t bytes)
{
    EPI_TRY(exchange(self, v, NULL, sizeof *v));
    for (int rank = 0; v->status == EP_OK && rank < self->base.num_ranks; rank++)
        if (rank != self->coming)
            EPI_TRY(exchange(self, all + (size_t)rank * bytes, NULL, bytes));
    return EP_OK;
}

/* The others wait for the rank that passes words on, which itself waits that long for its own. */
static ep_status gather_parcels(const rejoin *self, const parcel *mine)
{
    ep_group *group = self->group;
    int64_t timeout_ms = group->timeout_ms;
    if (!self->pair)
        group->timeout_ms = 2 * timeout_ms;
    ep_status status = epi_collective_gather(group, CALL, mine, self->parcels, sizeof *mine);
    group->timeout_ms = timeout_ms;
    return status;
}

static ep_status staying_allgather(epi_bootstrap *base, const void *send, void *recv, size_t bytes)
{
    rejoin *self = (rejoin *)base;
    ep_group *group = self->group;
    parcel mine = {.verdict = {.status = EP_OK}};
    memcpy(mine.own, send, bytes);
    if (self->pair && self->broken.status == EP_OK)
        mine.verdict = verdict_of(exchange(self, send, mine.coming, bytes));
    else
        mine.verdict = self->broken;
    ep_status status = gather_parcels(self, &mine);
    const parcel *first = &self->parcels[epi_group_first(group)];
    if (status == EP_OK)
        status = heed(&first->verdict);
    for (int rank = 0; status == EP_OK && rank < group->num_ranks; rank++)
        memcpy((uint8_t *)recv + (size_t)rank * bytes,
               rank == self->coming ? first->coming : self->parcels[rank].own, bytes);
    if (!self->pair || self->broken.status != EP_OK)
        return status;
    verdict v = verdict_of(status);
    status = tell_coming(self, &v, recv, bytes);
    if (status != EP_OK) /* failing here alone would leave the others waiting for this rank */
        self->broken = verdict_of(status);
    return heed(&v);
}

static ep_status coming_allgather(epi_bootstrap *base, const void *send, void *recv, size_t bytes)
{
    rejoin *self = (rejoin *)base;
    verdict v;
    EPI_TRY(exchange(self, send, NULL, bytes));
    EPI_TRY(exchange(self, NULL, &v, sizeof v));
    EPI_TRY(heed(&v));
    for (int rank = 0; rank < base->num_ranks; rank++) {
        uint8_t *to = (uint8_t *)recv + (size_t)rank * bytes;
        if (rank == self->coming)
            memcpy(to, send, bytes);
        else
            EPI_TRY(exchange(self, NULL, to, bytes));
    }
    return EP_OK;
}

static void rejoin_close(epi_bootstrap *base)
{
    rejoin *self = (rejoin *)base;
    epi_bootstrap_close(self->pair);
    free(base->scratch);
    free(self->parcels);
    free(self);
}

static ep_status new_rejoin(ep_group *group, int rank, int num_ranks, int coming, rejoin **made)
{
    rejoin *self = calloc(1, sizeof *self);
    parcel *parcels = calloc(group ? (size_t)num_ranks : 1, sizeof *parcels);
    if (!self || !parcels) {
        free(self);
        free(parcels);
        return epi_fail(EP_ERR_MEMORY, "no memory for the bootstrap of %d ranks", num_ranks);
    }
    *made = self;
    self->group = group;
    self->coming = coming;
    self->parcels = parcels;
    self->base.rejoining = true;
    return epi_bootstrap_init(&self->base, group ? staying_allgather : coming_allgather,
                              rejoin_close, rank, num_ranks);
}

ep_status epi_rejoin_open(uint64_t job, const char *name, int rank, int num_ranks,
                          int64_t timeout_ms, epi_bootstrap **bootstrap)
{
    rejoin *self = NULL;
    epi_rendezvous_name place = meeting_place(job, name, rank);
    ep_status status = new_rejoin(NULL, rank, num_ranks, rank, &self);
    if (status == EP_OK)
        status = epi_client_open(&place, COMING, NUM_SIDES, timeout_ms, &self->pair);
    if (status == EP_OK) {
        *bootstrap = &self->base;
        return EP_OK;
    }
    if (self && status == EP_ERR_RANK_DEAD)
        status = fail_pair(self, status);
    if (self)
        rejoin_close(&self->base);
    return status != EP_ERR_TIMEOUT
               ? status
               : epi_fail(status,
                          "the other ranks have not called ep_group_readmit for rank %d "
                          "within %lld ms",
                          rank, (long long)timeout_ms);
}

/* ------------------------------------------------------------- the side that stays */

typedef struct position {
    uint64_t group_epoch, recoveries;
} position;

ep_status epi_rejoin_align(ep_group *group, epi_bootstrap *bootstrap)
{
    position own = {group->epoch, group->recoveries};
    const void *all = NULL;
    /* What this rank said when it was here before must not pass for new words. */
    for (int rank = 0; rank < group->num_ranks; rank++) {
        uint64_t said = epi_slot_load(group->control, rank, EPI_GROUP_SLOT_EPOCH);
        uint64_t round = epi_slot_load(group->control, rank, EPI_GROUP_SLOT_ROUND);
        own.group_epoch = said > own.group_epoch ? said : own.group_epoch;
        own.recoveries = round > own.recoveries ? round : own.recoveries;
    }
    EPI_TRY(epi_gather(bootstrap, &own, sizeof own, &all));
    const position *positions = all;
    for (int rank = 0; rank < group->num_ranks; rank++) {
        if (positions[rank].group_epoch > own.group_epoch)
            own.group_epoch = positions[rank].group_epoch;
        if (positions[rank].recoveries > own.recoveries)
            own.recoveries = positions[rank].recoveries;
    }
    group->epoch = own.group_epoch + 2; /* past that of the gather itself */
    group->recoveries = own.recoveries;
    return EP_OK;
}

/* Takes the rank into the transport and the control window. */
static ep_status admit(ep_group *group, int rank, epi_bootstrap *bootstrap)
{
    const epi_transport_ops *ops = group->transport->ops;
    EPI_TRY(epi_agree(bootstrap, EP_OK)); /* its settings */
    EPI_TRY(epi_group_compare(bootstrap, group->ranks_per_node, group->transport_name, NULL));
    EPI_TRY(epi_agree(bootstrap, EP_OK)); /* its memory for a group */
    EPI_TRY(ops->admit(group->transport, rank, bootstrap));
    EPI_TRY(ops->window_admit(group->control, rank, bootstrap));
    return epi_rejoin_align(group, bootstrap);
}

static ep_status admit_to_buffers(ep_group *group, int rank)
{
    for (ep_buffer *buffer = group->buffers; buffer; buffer = buffer->next_of_group)
        EPI_TRY(epi_buffer_admit(buffer, rank));
    return EP_OK;
}

/* The words by which each rank knows that the others are at the group's epoch. */
static ep_status welcome(ep_group *group, int rank)
{
    epi_group_set_mask(group, rank, false);
    epi_collective_announce(group);
    ep_status status = epi_collective_gather(group, CALL, NULL, NULL, 0);
    if (status == EP_OK)
        status = admit_to_buffers(group, rank);
    if (status != EP_OK)
        epi_group_set_mask(group, rank, true);
    return status;
}

static ep_status check(ep_group *group, int32_t rank)
{
    if (rank < 0 || rank >= group->num_ranks)
        return epi_fail(EP_ERR_ARGUMENT, "rank is %d; it can be 0..%d", (int)rank,
                        group->num_ranks - 1);
    if (!group->masked[rank])
        return epi_fail(EP_ERR_STATE, "rank %d is not masked", (int)rank);
    if (!group->transport->ops->admit)
        return epi_fail(EP_ERR_UNSUPPORTED, "transport \"%s\" takes no rank in again",
                        group->transport->ops->name);
    int buffers = 0;
    for (const ep_buffer *buffer = group->buffers; buffer; buffer = buffer->next_of_group) {
        if (buffer->backend)
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "a buffer on a device is alive; destroy it on every rank, and make "
                            "one anew when the rank is back");
        buffers++;
    }
    if (atomic_load(&group->num_objects) != buffers)
        return epi_fail(EP_ERR_STATE, "%d channels are alive; destroy them first",
                        atomic_load(&group->num_objects) - buffers);
    return epi_group_check_idle(group, CALL);
}

/* The lowest rank that stays meets the one that comes. */
static ep_status open_staying(ep_group *group, int rank, epi_bootstrap **bootstrap)
{
    rejoin *self = NULL;
    ep_status status = new_rejoin(group, group->rank, group->num_ranks, rank, &self);
    if (status == EP_OK && group->rank == epi_group_first(group)) {
        epi_rendezvous_name place = meeting_place(group->job, group->name, rank);
        status = epi_hub_open(&place, NUM_SIDES, group->timeout_ms, &self->pair);
        if (status == EP_ERR_TIMEOUT)
            epi_fail(status, "rank %d has not come back within %lld ms", rank,
                     (long long)group->timeout_ms);
        else if (status != EP_OK)
            status = fail_pair(self, status);
    }
    status = epi_agree(group->bootstrap, status);
    if (status != EP_OK && self)
        rejoin_close(&self->base);
    else
        *bootstrap = &self->base;
    return status;
}

static ep_status readmit(ep_group *group, int32_t rank)
{
    EPI_TRY(check(group, rank));
    epi_bootstrap *bootstrap = NULL;
    EPI_TRY(open_staying(group, rank, &bootstrap));
    ep_status status = admit(group, rank, bootstrap);
    epi_bootstrap_close(bootstrap);
    return status == EP_OK ? welcome(group, rank) : status;
}

ep_status ep_group_readmit(ep_group *group, int32_t rank)
{
    if (!group)
        return epi_fail(EP_ERR_ARGUMENT, CALL ": group is NULL");
    ep_status status = readmit(group, rank);
    return status == EP_OK ? EP_OK : epi_fail(status, CALL ": %s", ep_last_error());
}
