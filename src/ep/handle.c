/* SPDX-License-Identifier: MIT */
#include "ep/handle.h"

#include "base/error.h"
#include "ep/args.h"
#include "ep/backend.h"
#include "ep/ll.h"

#include <stdlib.h>

ep_handle *epi_handle_new_bare(ep_buffer *buffer)
{
    ep_handle *handle = calloc(1, sizeof *handle);
    if (!handle)
        return NULL;
    handle->buffer = buffer;
    handle->num_ranks = buffer->num_ranks;
    atomic_init(&handle->holders, 1);
    atomic_fetch_add(&buffer->num_objects, 1);
    return handle;
}

ep_handle *epi_handle_new(ep_buffer *buffer, int64_t num_tokens, int topk)
{
    ep_handle *handle = epi_handle_new_bare(buffer);
    if (!handle)
        return NULL;
    size_t links = (size_t)(num_tokens * topk), ranks = (size_t)buffer->num_ranks;
    handle->num_tokens = num_tokens;
    handle->topk = topk;
    handle->send_rank = malloc((links + 1) * sizeof(int32_t));
    handle->send_row = malloc((links + 1) * sizeof(int32_t));
    handle->rows_between = calloc(ranks * ranks, sizeof(int32_t));
    handle->rows_at = calloc(ranks, sizeof(int64_t));
    handle->source_offset = calloc(ranks + 1, sizeof(int32_t));
    if (!handle->send_rank || !handle->send_row || !handle->rows_between || !handle->rows_at ||
        !handle->source_offset) {
        ep_handle_release(handle);
        return NULL;
    }
    return handle;
}

ep_handle *epi_handle_of_device(ep_buffer *buffer)
{
    ep_handle *handle = calloc(1, sizeof *handle);
    if (!handle)
        return NULL;
    handle->buffer = buffer;
    handle->num_ranks = buffer->num_ranks;
    handle->mask_sum = buffer->group->mask_sum;
    atomic_init(&handle->holders, 1);
    atomic_fetch_add(&buffer->num_objects, 1);
    return handle;
}

ep_handle *epi_handle_hold(ep_handle *handle)
{
    atomic_fetch_add(&handle->holders, 1);
    return handle;
}

ep_status epi_handle_check(const char *call, const ep_buffer *buffer, const ep_handle *handle,
                           bool same_ranks)
{
    if (!handle)
        return epi_fail(EP_ERR_ARGUMENT, "%s: handle is NULL", call);
    if (handle->buffer != buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: handle was made by another buffer", call);
    if (handle->ll)
        return epi_fail(EP_ERR_ARGUMENT, "%s: handle is of ep_ll_dispatch", call);
    if (same_ranks && handle->mask_sum != buffer->group->mask_sum)
        return epi_fail(EP_ERR_STATE,
                        "%s: handle is of call %llu, when other ranks were masked; dispatch anew",
                        call, (unsigned long long)handle->id);
    return epi_buffer_check_handle(call, buffer, handle->id);
}

void ep_handle_release(ep_handle *handle)
{
    if (!handle || atomic_fetch_sub(&handle->holders, 1) != 1)
        return;
    if (handle->device)
        handle->buffer->backend->handle_free(handle);
    atomic_fetch_sub(&handle->buffer->num_objects, 1);
    free(handle->send_rank);
    free(handle->send_row);
    free(handle->rows_between);
    free(handle->rows_at);
    free(handle->source_token);
    free(handle->source_offset);
    free(handle->expert_offset);
    free(handle->expert_rows);
    free(handle->expert_filled);
    free(handle->weights);
    epi_ll_result_free(handle->ll);
    free(handle);
}

ep_status ep_handle_query(const ep_handle *handle, ep_handle_info *info)
{
    if (!handle)
        return epi_fail(EP_ERR_ARGUMENT, "ep_handle_query: handle is NULL");
    if (handle->device)
        EPI_TRY(handle->buffer->backend->handle_fetch((ep_handle *)handle));
    const ep_handle_info full = {
        .size = sizeof full,
        .num_ranks = handle->num_ranks,
        .topk = handle->topk,
        .num_tokens = handle->num_tokens,
        .num_rows = handle->num_rows,
        .hidden = handle->hidden,
        .num_experts = handle->num_experts,
        .num_local_experts = handle->num_local,
        .layout = handle->layout,
        .rows_between = handle->rows_between,
        .send_rank = handle->send_rank,
        .send_row = handle->send_row,
        .source_token = handle->source_token,
    };
    return epi_result_copy("ep_handle_query", "info", info, &full, sizeof full);
}
