/* SPDX-License-Identifier: MIT */
/*
 * Channels. Each rank's window holds, behind the control head,
 *
 *   mark[lanes]            messages put into each of this rank's lanes, written by
 *                          the lane's sender
 *   taken[ranks][lanes]    messages that rank has taken from each of its lanes,
 *                          written by that rank: what this rank may overwrite
 *   slots[lanes][slots]    a header and the bytes
 *
 * Message n of a lane lies in slot n % slots. Its sender waits until n < taken +
 * slots, writes the slot, raises mark to n + 1 and notifies; the receiver waits
 * until mark > n, reads, raises taken and notifies. Counts only grow, so a late or
 * repeated notification does no more than wake somebody.
 */
#include "entrepot/channel.h"

#include "base/error.h"
#include "ep/bootstrap.h"
#include "ep/group.h"
#include "ep/wait.h"

#include <stdlib.h>
#include <string.h>

#define LINE 64
#define MAX_LANES 4096
#define MAX_SLOTS 65536
#define MAX_SLOT_BYTES (INT64_C(1) << 40)

/* Words of the window: two by which ranks wake each other, whose values only count wakes, and one
   that a rank sets once, when it gives the channel up. */
enum { WAKE_RECEIVER, WAKE_SENDER, GIVEN_UP };

/* The word GIVEN_UP: that it is set, whose fault it is, and why. */
#define GIVEN_UP_BIT (UINT64_C(1) << 63)
#define GIVEN_UP_WORD(culprit, why) (GIVEN_UP_BIT | (uint64_t)(culprit) << 32 | (uint32_t)(why))

typedef struct mark {
    _Alignas(LINE) _Atomic uint64_t count;
} mark;

typedef struct slot_head {
    _Alignas(LINE) uint64_t bytes;
    int32_t from;
} slot_head;

struct ep_channel {
    ep_group *group;
    epi_window *window;
    int32_t lanes, slots;
    size_t slot_bytes, stride;           /* of the data; of a slot with its head */
    size_t marks, taken, row, data, end; /* offsets in a window; row is one rank's share of taken */
    uint64_t *sent;                      /* [ranks][lanes] messages put into others' lanes */
    uint64_t *received;                  /* [lanes] messages taken from this rank's lanes */
    uint64_t *wakes[2];                  /* [ranks] notifications sent, by word */
    uint64_t gave_up;                    /* the word GIVEN_UP of this rank; 0: not given up */
};

static size_t round_up(size_t value, size_t unit)
{
    return (value + unit - 1) / unit * unit;
}

static mark *mark_of(const ep_channel *c, int rank, int lane)
{
    return (mark *)(c->window->peer[rank] + c->marks) + lane;
}

/* In the window of `sender`: what `receiver` has taken from its lane. */
static _Atomic uint64_t *taken_of(const ep_channel *c, int sender, int receiver, int lane)
{
    return (_Atomic uint64_t *)(c->window->peer[sender] + c->taken + (size_t)receiver * c->row) +
           lane;
}

static slot_head *slot_of(const ep_channel *c, int rank, int lane, uint64_t number)
{
    size_t slot = (size_t)lane * (size_t)c->slots + (size_t)(number % (uint64_t)c->slots);
    return (slot_head *)(c->window->peer[rank] + c->data + slot * c->stride);
}

static ep_status examine(const ep_channel_config *given, ep_channel_config *config)
{
    if (!given)
        return epi_fail(EP_ERR_ARGUMENT, "config is NULL");
    if (given->size < sizeof given->size || given->size > sizeof *config)
        return epi_fail(EP_ERR_ARGUMENT, "config.size is %zu; it can be %zu..%zu", given->size,
                        sizeof given->size, sizeof *config);
    memcpy(config, given, given->size);
    if (config->lanes < 1 || config->lanes > MAX_LANES)
        return epi_fail(EP_ERR_ARGUMENT, "lanes is %d; it can be 1..%d", config->lanes, MAX_LANES);
    if (config->slots < 1 || config->slots > MAX_SLOTS)
        return epi_fail(EP_ERR_ARGUMENT, "slots is %d; it can be 1..%d", config->slots, MAX_SLOTS);
    if (config->slot_bytes < 1 || config->slot_bytes > MAX_SLOT_BYTES)
        return epi_fail(EP_ERR_ARGUMENT, "slot_bytes is %lld; it can be 1..%lld",
                        (long long)config->slot_bytes, (long long)MAX_SLOT_BYTES);
    return EP_OK;
}

static void lay_out(ep_channel *c)
{
    size_t lanes = (size_t)c->lanes, ranks = (size_t)c->group->num_ranks;
    c->stride = sizeof(slot_head) + round_up(c->slot_bytes, LINE);
    c->row = round_up(lanes * sizeof(uint64_t), LINE);
    c->marks = round_up(epi_control_bytes(c->group->num_ranks), LINE);
    c->taken = c->marks + lanes * sizeof(mark);
    c->data = c->taken + ranks * c->row;
    c->end = c->data + lanes * (size_t)c->slots * c->stride;
}

/* What one rank alone may fail at. */
static ep_status prepare(ep_group *group, const ep_channel_config *given, ep_channel **prepared)
{
    ep_channel_config config = EP_CHANNEL_CONFIG_INIT;
    size_t ranks = (size_t)group->num_ranks;
    EPI_TRY(examine(given, &config));
    ep_channel *c = calloc(1, sizeof *c);
    *prepared = c; /* whatever happens next, the caller frees it */
    if (c) {
        c->group = group;
        c->lanes = config.lanes;
        c->slots = config.slots;
        c->slot_bytes = (size_t)config.slot_bytes;
        c->sent = calloc(ranks * (size_t)c->lanes, sizeof *c->sent);
        c->received = calloc((size_t)c->lanes, sizeof *c->received);
        c->wakes[0] = calloc(ranks, sizeof *c->wakes[0]);
        c->wakes[1] = calloc(ranks, sizeof *c->wakes[1]);
    }
    if (!c || !c->sent || !c->received || !c->wakes[0] || !c->wakes[1])
        return epi_fail(EP_ERR_MEMORY, "no memory for %d lanes of %zu ranks", config.lanes, ranks);
    lay_out(c);
    return EP_OK;
}

typedef struct settings {
    int64_t lanes, slots, slot_bytes;
} settings;

static ep_status compare(const ep_channel *c)
{
    const settings own = {c->lanes, c->slots, (int64_t)c->slot_bytes};
    const void *gathered = NULL;
    EPI_TRY(epi_gather(c->group->bootstrap, &own, sizeof own, &gathered));
    const settings *all = gathered;
    for (int rank = 1; rank < c->group->num_ranks; rank++)
        if (memcmp(&all[rank], &all[0], sizeof own) != 0)
            return epi_fail(EP_ERR_MISMATCH,
                            "a channel of %lld lanes, %lld slots, %lld bytes on rank 0 but of "
                            "%lld, %lld, %lld on rank %d",
                            (long long)all[0].lanes, (long long)all[0].slots,
                            (long long)all[0].slot_bytes, (long long)all[rank].lanes,
                            (long long)all[rank].slots, (long long)all[rank].slot_bytes, rank);
    return EP_OK;
}

ep_status ep_channel_create(ep_group *group, const ep_channel_config *config, ep_channel **channel)
{
    ep_channel *c = NULL;
    if (!channel)
        return epi_fail(EP_ERR_ARGUMENT, "channel is NULL");
    *channel = NULL;
    if (!group)
        return epi_fail(EP_ERR_ARGUMENT, "group is NULL");
    ep_status status = epi_agree(group->bootstrap, prepare(group, config, &c));
    if (status == EP_OK)
        status = compare(c);
    if (status == EP_OK)
        status = group->transport->ops->window_create(group->transport, c->end, c->end, &c->window);
    if (status != EP_OK) {
        ep_channel_destroy(c);
        return status;
    }
    atomic_fetch_add(&group->num_objects, 1);
    *channel = c;
    return EP_OK;
}

void ep_channel_destroy(ep_channel *c)
{
    if (!c)
        return;
    if (c->window) {
        c->group->transport->ops->window_destroy(c->window);
        atomic_fetch_sub(&c->group->num_objects, 1);
    }
    free(c->sent);
    free(c->received);
    free(c->wakes[0]);
    free(c->wakes[1]);
    free(c);
}

/* A wait for one peer: until `count` reaches `least`, or somebody gave the channel up. */
typedef struct expectation {
    const ep_channel *channel;
    const _Atomic uint64_t *count;
    uint64_t least;
    int peer;
} expectation;

/* The word of the first rank that gave the channel up, or 0. */
static uint64_t given_up(const ep_channel *c)
{
    const epi_control *control = (const epi_control *)c->window->base;
    uint64_t word = c->gave_up;
    for (int rank = 0; rank < c->group->num_ranks && !word; rank++)
        word = atomic_load_explicit(&control->source[rank].slot[GIVEN_UP], memory_order_acquire);
    return word;
}

static bool has_come(const expectation *e)
{
    /* acquire: pairs with the release in send or recv of the peer */
    return atomic_load_explicit(e->count, memory_order_acquire) >= e->least;
}

static bool is_over(void *context)
{
    return has_come(context) || given_up(((const expectation *)context)->channel);
}

static bool is_late(void *context, int rank)
{
    return rank == ((const expectation *)context)->peer && !has_come(context);
}

static ep_status await(const ep_channel *c, const char *call, uint64_t number, expectation e)
{
    if (has_come(&e))
        return EP_OK;
    EPI_TRY(epi_wait(c->group, c->window, call, number + 1, is_over, is_late, &e, 0));
    if (has_come(&e))
        return EP_OK;
    uint64_t word = given_up(c);
    int culprit = (int)(word >> 32 & INT32_MAX);
    ep_status why = (ep_status)(int32_t)(uint32_t)word;
    if (why == EP_ERR_RANK_DEAD)
        return epi_fail(why, "%s (call %llu): rank %d has ended", call,
                        (unsigned long long)number + 1, culprit);
    return epi_fail(EP_ERR_ABORTED, "%s (call %llu): rank %d gave the channel up: %s", call,
                    (unsigned long long)number + 1, culprit, ep_status_string(why));
}

static void wake(ep_channel *c, int rank, int word)
{
    c->group->transport->ops->notify(c->window, rank, word, ++c->wakes[word][rank]);
}

static ep_status examine_message(const ep_channel *c, const char *peer_name, int32_t peer,
                                 int32_t lane, const void *data, size_t bytes)
{
    if (!c)
        return epi_fail(EP_ERR_ARGUMENT, "channel is NULL");
    if (peer < 0 || peer >= c->group->num_ranks)
        return epi_fail(EP_ERR_ARGUMENT, "%s is %d; it can be 0..%d", peer_name, peer,
                        c->group->num_ranks - 1);
    if (lane < 0 || lane >= c->lanes)
        return epi_fail(EP_ERR_ARGUMENT, "lane is %d; it can be 0..%d", lane, c->lanes - 1);
    if (bytes > c->slot_bytes)
        return epi_fail(EP_ERR_ARGUMENT, "bytes is %zu; it can be 0..%zu", bytes, c->slot_bytes);
    if (!data && bytes > 0)
        return epi_fail(EP_ERR_ARGUMENT, "data is NULL, bytes %zu", bytes);
    if (c->group->masked[peer])
        return epi_fail(EP_ERR_STATE, "rank %d is masked", peer);
    return EP_OK;
}

ep_status ep_channel_send(ep_channel *c, int32_t to, int32_t lane, const void *data, size_t bytes)
{
    EPI_TRY(examine_message(c, "to", to, lane, data, bytes));
    uint64_t *sent = &c->sent[(size_t)to * (size_t)c->lanes + (size_t)lane], number = *sent;
    uint64_t slots = (uint64_t)c->slots;
    if (number >= slots) {
        const _Atomic uint64_t *taken = taken_of(c, c->group->rank, to, lane);
        EPI_TRY(await(c, "send", number, (expectation){c, taken, number - slots + 1, to}));
    }
    slot_head *slot = slot_of(c, to, lane, number);
    slot->bytes = bytes;
    slot->from = c->group->rank;
    if (bytes > 0)
        memcpy(slot + 1, data, bytes);
    *sent = number + 1;
    /* release: pairs with the acquire in the receiver's wait */
    atomic_store_explicit(&mark_of(c, to, lane)->count, number + 1, memory_order_release);
    wake(c, to, WAKE_RECEIVER);
    return EP_OK;
}

ep_status ep_channel_recv(ep_channel *c, int32_t from, int32_t lane, void *data, size_t bytes)
{
    EPI_TRY(examine_message(c, "from", from, lane, data, bytes));
    uint64_t number = c->received[lane];
    mark *arrived = mark_of(c, c->group->rank, lane);
    EPI_TRY(await(c, "receive", number, (expectation){c, &arrived->count, number + 1, from}));
    const slot_head *slot = slot_of(c, c->group->rank, lane, number);
    if (slot->from != from || slot->bytes != bytes)
        return epi_fail(EP_ERR_MISMATCH,
                        "lane %d: message %llu is %llu bytes from rank %d; expected %zu from rank "
                        "%d",
                        lane, (unsigned long long)number, (unsigned long long)slot->bytes,
                        slot->from, bytes, from);
    if (bytes > 0)
        memcpy(data, slot + 1, bytes);
    c->received[lane] = number + 1;
    /* release: pairs with the acquire in the sender's wait */
    atomic_store_explicit(taken_of(c, from, c->group->rank, lane), number + 1,
                          memory_order_release);
    wake(c, from, WAKE_SENDER);
    return EP_OK;
}

/* Whose fault it is: of a dead rank, of whoever gave up before, of this rank. */
static uint64_t own_word(const ep_channel *c, ep_status why)
{
    uint64_t word = given_up(c);
    if (word)
        return word;
    int culprit = c->group->rank;
    for (int rank = 0; why == EP_ERR_RANK_DEAD && rank < c->group->num_ranks; rank++)
        if (atomic_load(&c->group->late[rank]))
            culprit = rank;
    return GIVEN_UP_WORD(culprit, why);
}

ep_status ep_channel_give_up(ep_channel *c, ep_status why)
{
    if (!c)
        return epi_fail(EP_ERR_ARGUMENT, "channel is NULL");
    if (why == EP_OK)
        return epi_fail(EP_ERR_ARGUMENT, "why is EP_OK; it can be any other status");
    if (c->gave_up)
        return EP_OK;
    c->gave_up = own_word(c, why);
    for (int rank = 0; rank < c->group->num_ranks; rank++)
        if (rank != c->group->rank && !c->group->masked[rank])
            c->group->transport->ops->notify(c->window, rank, GIVEN_UP, c->gave_up);
    return EP_OK;
}
