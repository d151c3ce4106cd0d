/* SPDX-License-Identifier: MIT */
/* What a dispatch leaves on the device for the calls that follow it. */
#include "ep/cuda/internal.h"

#include <stdlib.h>

void epc_handle_drop(epc_handle *handle)
{
    if (!handle || atomic_fetch_sub(&handle->holders, 1) != 1)
        return;
    epc_give(handle->owner, handle->block);
    epc_give(handle->owner, handle->sources);
    free(handle->host_tokens);
    pthread_mutex_destroy(&handle->fetching);
    free(handle);
}

static void *carve(uint8_t **next, size_t bytes)
{
    uint8_t *at = *next;
    *next += epc_padded(bytes);
    return at;
}

ep_status epc_handle_new(epc_buffer *b, const ep_handle *public, bool weights, epc_handle **out)
{
    size_t links = (size_t) public->num_tokens * (size_t) public->topk,
           ranks = (size_t)b->num_ranks;
    size_t local = (size_t) public->num_local;
    size_t bytes = epc_padded(links * sizeof(epc_entry)) + epc_padded(ranks * 4) +
                   epc_padded(ranks * ranks * 4) + epc_padded((ranks + 1) * 4) +
                   3 * epc_padded((local + 1) * 4) +
                   (weights ? epc_padded(links * sizeof(float)) : 0);
    epc_handle *handle = calloc(1, sizeof *handle);
    if (!handle)
        return epi_fail(EP_ERR_MEMORY, "out of memory for a handle");
    atomic_init(&handle->holders, 1);
    handle->owner = b;
    ep_status status = epc_take(b, bytes, &handle->block);
    if (status != EP_OK) {
        free(handle);
        return status;
    }
    pthread_mutex_init(&handle->fetching, NULL);
    uint8_t *next = handle->block->memory;
    handle->entries = carve(&next, links * sizeof(epc_entry));
    handle->rows_at = carve(&next, ranks * 4);
    handle->matrix = carve(&next, ranks * ranks * 4);
    handle->source_offset = carve(&next, (ranks + 1) * 4);
    handle->expert_offset = carve(&next, (local + 1) * 4);
    handle->expert_tokens = carve(&next, (local + 1) * 4);
    handle->expert_filled = carve(&next, (local + 1) * 4);
    handle->weights = weights ? carve(&next, links * sizeof(float)) : NULL;
    *out = handle;
    return EP_OK;
}

/* ------------------------------------------------------------- queries */

/* An array of the public handle, which one that failed half way may have left. */
static bool have(int32_t **array, size_t count)
{
    if (!*array)
        *array = malloc(count * sizeof **array);
    return *array != NULL;
}

static ep_status fetch_links(ep_handle *handle, const epc_handle *device)
{
    size_t links = (size_t)handle->num_tokens * (size_t)handle->topk;
    epc_entry *entries = malloc((links + 1) * sizeof *entries);
    ep_status status =
        entries && have(&handle->send_rank, links + 1) && have(&handle->send_row, links + 1)
            ? epi_gpu_get(entries, device->entries, links * sizeof *entries)
            : epi_fail(EP_ERR_MEMORY, "ep_handle_query: out of memory");
    for (size_t i = 0; status == EP_OK && i < links; i++) {
        handle->send_rank[i] = entries[i] < 0 ? -1 : (int32_t)(entries[i] >> 32);
        handle->send_row[i] = entries[i] < 0 ? -1 : (int32_t)(uint32_t)entries[i];
    }
    free(entries);
    return status;
}

static ep_status fetch_sources(ep_handle *handle, const epc_handle *device)
{
    size_t rows = (size_t)handle->rows;
    if (!have(&handle->source_token, rows + 1))
        return epi_fail(EP_ERR_MEMORY, "ep_handle_query: out of memory");
    return device->sources ? epi_gpu_get(handle->source_token, device->sources->memory, rows * 4)
                           : EP_OK;
}

static ep_status fetch_matrix(ep_handle *handle, const epc_handle *device)
{
    size_t ranks = (size_t)handle->num_ranks;
    if (!have(&handle->rows_between, ranks * ranks))
        return epi_fail(EP_ERR_MEMORY, "ep_handle_query: out of memory");
    EPI_TRY(epi_gpu_get(handle->rows_between, device->matrix, ranks * ranks * sizeof(int32_t)));
    int64_t num_rows = 0;
    for (size_t s = 0; s < ranks; s++)
        num_rows += handle->rows_between[s * ranks + (size_t)handle->buffer->rank];
    if (handle->num_rows != num_rows) /* where it is known, calls may be reading it */
        handle->num_rows = num_rows;
    return EP_OK;
}

static ep_status fetch(ep_handle *handle, const epc_handle *device)
{
    epc_buffer *b = device->owner;
    int before;
    EPI_TRY(epi_gpu_enter(b->device, &before));
    ep_status status = b->has_last ? epi_gpu_event_wait(b->last_done) : EP_OK;
    if (status == EP_OK)
        status = fetch_links(handle, device);
    if (status == EP_OK)
        status = fetch_matrix(handle, device);
    if (status == EP_OK)
        status = fetch_sources(handle, device);
    epi_gpu_leave(before);
    return status;
}

/* From any thread. The lock is the handle's own: one that waits for the device must not hold up
   another rank of this process, for which the device may be waiting. */
ep_status epc_handle_fetch(ep_handle *handle)
{
    epc_handle *device = handle->device;
    ep_status status = EP_OK;
    if (device->fetched)
        return EP_OK;
    pthread_mutex_lock(&device->fetching);
    if (!device->fetched) {
        status = fetch(handle, device);
        device->fetched = status == EP_OK;
    }
    pthread_mutex_unlock(&device->fetching);
    return status;
}

void epc_handle_free(ep_handle *handle)
{
    if (((epc_handle *)handle->device)->ll)
        epc_ll_handle_free(handle);
    epc_handle_drop(handle->device);
}
