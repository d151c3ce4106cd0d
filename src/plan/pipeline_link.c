/* SPDX-License-Identifier: MIT */
/* A pipeline's link over a group: one channel, a lane for each message queue of a rank. */
#include "entrepot/channel.h"
#include "entrepot/pipeline.h"

#include "base/error.h"
#include "plan/pipeline.h"
#include "plan/schedule.h"

#include <stdlib.h>
#include <string.h>

static ep_status link_send(void *context, int32_t to, int32_t lane, const void *data, size_t bytes)
{
    return ep_channel_send(context, to, lane, data, bytes);
}

static ep_status link_recv(void *context, int32_t from, int32_t lane, void *data, size_t bytes)
{
    return ep_channel_recv(context, from, lane, data, bytes);
}

static void link_give_up(void *context, ep_status why)
{
    ep_channel_give_up(context, why);
}

/* FNV-1a, field by field: an operation has padding of the caller's. */
static uint64_t mix(uint64_t hash, int64_t value)
{
    for (int i = 0; i < 8; i++)
        hash = (hash ^ ((uint64_t)value >> (8 * i) & 0xff)) * UINT64_C(0x100000001b3);
    return hash;
}

static uint64_t fingerprint(const ep_schedule *s)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    hash = mix(mix(mix(hash, s->shape.ranks), s->shape.phases), s->shape.chunks);
    for (int32_t i = 0; i < epi_schedule_places(s); i++)
        hash = mix(mix(hash, s->stage[i]), s->stream[i]);
    for (size_t i = 0; i < s->first[s->shape.ranks]; i++) {
        const ep_schedule_op *op = &s->ops[i];
        hash = mix(hash, op->kind | op->payload << 8 | op->phase << 16);
        hash = mix(hash, (int64_t)op->chunk << 32 | (uint32_t)op->peer);
        hash = mix(hash, (int64_t)op->back_chunk << 32 | op->back_phase);
    }
    return hash;
}

/* What every rank must agree on; the status first, so that a failure of one ends all. */
typedef struct word {
    uint64_t status, schedule;
    int64_t activation_bytes, gradient_bytes;
} word;

static ep_status compare(const word *all, int32_t ranks, int32_t rank)
{
    if (all[rank].status != EP_OK)
        return (ep_status)all[rank].status; /* its message stands */
    for (int32_t i = 0; i < ranks; i++)
        if (all[i].status != EP_OK)
            return epi_fail(EP_ERR_ABORTED, "ep_pipeline_link_open: rank %d gave it up: %s", (int)i,
                            ep_status_string((ep_status)all[i].status));
    for (int32_t i = 1; i < ranks; i++) {
        if (all[i].schedule != all[0].schedule)
            return epi_fail(EP_ERR_MISMATCH,
                            "ep_pipeline_link_open: ranks 0 and %d have different schedules",
                            (int)i);
        if (all[i].activation_bytes != all[0].activation_bytes ||
            all[i].gradient_bytes != all[0].gradient_bytes)
            return epi_fail(EP_ERR_MISMATCH,
                            "ep_pipeline_link_open: activation_bytes and gradient_bytes are %lld "
                            "and %lld on rank 0 but %lld and %lld on rank %d",
                            (long long)all[0].activation_bytes, (long long)all[0].gradient_bytes,
                            (long long)all[i].activation_bytes, (long long)all[i].gradient_bytes,
                            (int)i);
    }
    return EP_OK;
}

/* What one rank alone may fail at. */
static ep_status examine(ep_group *group, const ep_schedule *schedule,
                         const ep_pipeline_config *given, ep_pipeline_config *config,
                         int32_t *slots)
{
    const char *call = "ep_pipeline_link_open";
    EPI_TRY(epi_pipeline_take_config(call, given, config));
    if (!schedule)
        return epi_fail(EP_ERR_ARGUMENT, "%s: schedule is NULL", call);
    if (schedule->shape.ranks != ep_group_num_ranks(group))
        return epi_fail(EP_ERR_ARGUMENT, "%s: the schedule has %d ranks; the group has %d", call,
                        (int)schedule->shape.ranks, (int)ep_group_num_ranks(group));
    return ep_schedule_check(schedule, NULL, slots);
}

static ep_status agree(ep_group *group, const ep_schedule *schedule,
                       const ep_pipeline_config *given, ep_pipeline_config *config, int32_t *slots)
{
    int32_t ranks = ep_group_num_ranks(group);
    word own = {0}, *all = malloc((size_t)ranks * sizeof *all);
    if (!all)
        return epi_fail(EP_ERR_MEMORY, "ep_pipeline_link_open: no memory for %d ranks", (int)ranks);
    own.status = examine(group, schedule, given, config, slots);
    if (own.status == EP_OK) {
        own.schedule = fingerprint(schedule);
        own.activation_bytes = config->activation_bytes;
        own.gradient_bytes = config->gradient_bytes;
    }
    ep_status status = ep_group_allgather(group, &own, all, sizeof own);
    if (status == EP_OK)
        status = compare(all, ranks, ep_group_rank(group));
    free(all);
    return status;
}

ep_status ep_pipeline_link_open(ep_group *group, const ep_schedule *schedule,
                                const ep_pipeline_config *config, ep_pipeline_link *link)
{
    if (!group || !link)
        return epi_fail(EP_ERR_ARGUMENT, "ep_pipeline_link_open: %s is NULL",
                        group ? "link" : "group");
    ep_pipeline_config c;
    ep_channel_config channel = EP_CHANNEL_CONFIG_INIT;
    ep_channel *opened;
    int32_t slots = 0;
    EPI_TRY(agree(group, schedule, config, &c, &slots));
    channel.lanes = 2 * schedule->shape.phases;
    channel.slots = slots + 1;
    channel.slot_bytes =
        c.activation_bytes > c.gradient_bytes ? c.activation_bytes : c.gradient_bytes;
    EPI_TRY(ep_channel_create(group, &channel, &opened));
    *link = (ep_pipeline_link){sizeof *link, opened, link_send, link_recv, link_give_up};
    return EP_OK;
}

void ep_pipeline_link_close(ep_pipeline_link *link)
{
    if (!link || link->send != link_send)
        return;
    ep_channel_destroy(link->context);
    *link = (ep_pipeline_link)EP_PIPELINE_LINK_INIT;
}
