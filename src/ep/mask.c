/* SPDX-License-Identifier: MIT */
/* Ranks that are left out. */
#include "base/error.h"
#include "codec/rows.h"
#include "ep/buffer.h"
#include "ep/op.h"

void epi_group_set_mask(ep_group *group, int rank, bool masked)
{
    group->masked[rank] = masked;
    group->mask_sum =
        (int64_t)epi_checksum(group->masked, (size_t)group->num_ranks * sizeof *group->masked);
}

int epi_group_first(const ep_group *group)
{
    int first = 0; /* never past this rank itself, which is not masked */
    while (group->masked[first])
        first++;
    return first;
}

/* Nobody waits for a call that was refused: it tells the others, and is over soon. */
static void await_refusals(ep_buffer *buffer)
{
    while (buffer->has_worker && buffer->head && epi_op_refusals_only(buffer))
        pthread_cond_wait(&buffer->done, &buffer->lock);
}

ep_status epi_group_check_idle(ep_group *group, const char *call)
{
    bool busy = false;
    for (ep_buffer *buffer = group->buffers; buffer; buffer = buffer->next_of_group) {
        pthread_mutex_lock(&buffer->lock);
        await_refusals(buffer);
        busy |= buffer->head || buffer->running;
        pthread_mutex_unlock(&buffer->lock);
    }
    return busy ? epi_fail(EP_ERR_STATE, "%s: a call of a buffer of the group is under way", call)
                : EP_OK;
}

ep_status ep_group_mask(ep_group *group, int32_t rank, int32_t masked)
{
    if (!group)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_mask: group is NULL");
    if (rank < 0 || rank >= group->num_ranks || rank == group->rank)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_group_mask: rank is %d; it can be 0..%d, but not this rank, %d",
                        (int)rank, group->num_ranks - 1, group->rank);
    if (masked != 0 && masked != 1)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_mask: masked is %d; it can be 0 or 1",
                        (int)masked);
    EPI_TRY(epi_group_check_idle(group, "ep_group_mask"));
    epi_group_set_mask(group, rank, masked);
    return EP_OK;
}

ep_status ep_group_clear_masks(ep_group *group)
{
    if (!group)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_clear_masks: group is NULL");
    EPI_TRY(epi_group_check_idle(group, "ep_group_clear_masks"));
    for (int rank = 0; rank < group->num_ranks; rank++)
        epi_group_set_mask(group, rank, false);
    return EP_OK;
}

ep_status ep_group_query_masks(const ep_group *group, uint8_t *masked)
{
    if (!group || !masked)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_query_masks: %s is NULL",
                        group ? "masked" : "group");
    for (int rank = 0; rank < group->num_ranks; rank++)
        masked[rank] = group->masked[rank];
    return EP_OK;
}

ep_status ep_group_query_late(const ep_group *group, uint8_t *late)
{
    if (!group || !late)
        return epi_fail(EP_ERR_ARGUMENT, "ep_group_query_late: %s is NULL",
                        group ? "late" : "group");
    for (int rank = 0; rank < group->num_ranks; rank++)
        late[rank] = atomic_load(&group->late[rank]);
    return EP_OK;
}
