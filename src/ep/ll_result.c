/* SPDX-License-Identifier: MIT */
/* Low latency: received batches, and the ids they were asked for with. */
#include "ep/ll.h"

#include "base/error.h"
#include "ep/backend.h"

#include <stdlib.h>
#include <string.h>

ep_status epi_ll_result_new(epi_ll *ll, int slot, uint64_t epoch, int64_t num_tokens,
                            epi_ll_result **out)
{
    int num_ranks = ll->buffer->num_ranks, num_local = ll->experts.num_local;
    size_t words = epi_ll_result_words(&ll->shape, num_ranks, num_local, num_tokens);
    epi_ll_result *result = calloc(1, sizeof *result + words * sizeof result->memory[0]);
    if (!result)
        return epi_fail(EP_ERR_MEMORY, "out of memory for a low-latency result");
    result->slot = slot;
    result->epoch = epoch;
    result->num_tokens = num_tokens;
    result->topk = ll->shape.topk;
    result->range = result->memory;
    result->ids = (int32_t *)(result->range + num_local * num_ranks);
    result->count = result->ids + num_tokens * result->topk;
    result->dropped = result->count + num_local;
    result->packed = result->dropped + num_local;
    epi_ll_hold(ll);
    result->ll = ll;
    *out = result;
    return EP_OK;
}

void epi_ll_result_free(epi_ll_result *result)
{
    if (!result)
        return;
    epi_ll_retire(result);
    epi_ll_release(result->ll);
    free(result);
}

void epi_ll_retire(epi_ll_result *result)
{
    ep_buffer *buffer = result->ll->buffer;
    if (result->retired)
        return;
    result->retired = true;
    for (int i = 0; i < 2; i++)
        if (atomic_load(&buffer->ll_live[i]) == result->epoch)
            atomic_store(&buffer->ll_live[i], 0);
    atomic_store(&result->ll->slot[result->slot].in_use, false);
}

void ep_ll_recv_retire(ep_ll_recv *recv)
{
    ep_handle *handle = recv ? recv->owner : NULL;
    if (handle && handle->device)
        handle->buffer->backend->ll_recv_retire(handle);
    else if (handle)
        epi_ll_retire(handle->ll);
}

void ep_ll_recv_release(ep_ll_recv *recv)
{
    if (!recv)
        return;
    ep_handle *handle = recv->owner;
    if (handle && handle->device) {
        handle->buffer->backend->ll_recv_release(handle);
    } else if (handle) {
        epi_ll_retire(handle->ll);
        ep_handle_release(handle);
    }
    ep_ll_recv empty = EP_LL_RECV_INIT;
    empty.size = recv->size;
    memcpy(recv, &empty, recv->size < sizeof empty ? recv->size : sizeof empty);
}

/* ------------------------------------------------------------- ids */

/* The place before `k` that names the same expert, or -1. */
static int find_twin(const int32_t *ids, int k)
{
    for (int j = 0; j < k; j++)
        if (ids[j] == ids[k])
            return j;
    return -1;
}

ep_status epi_ll_read_ids(const epi_ll *ll, const char *call, const ep_tensor *idx, int32_t *ids)
{
    const bool *masked = ll->buffer->group->masked;
    int topk = ll->shape.topk;
    for (int64_t t = 0; t < idx->shape[0]; t++, ids += topk)
        for (int k = 0; k < topk; k++) {
            int64_t id = epi_topk_at(idx, t, k);
            if (id < -1 || id >= ll->shape.num_experts)
                return epi_fail(
                    EP_ERR_ARGUMENT, "%s: topk_idx[%lld][%d] is %lld; it must be -1..%lld", call,
                    (long long)t, k, (long long)id, (long long)ll->shape.num_experts - 1);
            ids[k] = id >= 0 && masked[ll->experts.rank[id]] ? -1 : (int32_t)id;
            int twin = ids[k] >= 0 ? find_twin(ids, k) : -1;
            if (twin < 0)
                continue;
            if (ll->buffer->config.verify)
                return epi_fail(EP_ERR_CORRUPT,
                                "%s: topk_idx[%lld] names expert %lld twice, at places %d and %d",
                                call, (long long)t, (long long)id, twin, k);
            ids[k] = -2 - twin;
        }
    return EP_OK;
}

ep_status epi_ll_check_ids(const epi_ll_result *result, const char *call, const ep_tensor *idx)
{
    const int32_t *ids = result->ids;
    for (int64_t t = 0; t < result->num_tokens; t++, ids += result->topk)
        for (int k = 0; k < result->topk; k++) {
            int32_t was = ids[k] < -1 ? ids[-2 - ids[k]] : ids[k];
            int64_t id = epi_topk_at(idx, t, k);
            if (was >= 0 && id != was)
                return epi_fail(EP_ERR_CORRUPT,
                                "%s: topk_idx[%lld][%d] is %lld; in dispatch it was %d", call,
                                (long long)t, k, (long long)id, (int)was);
        }
    return EP_OK;
}
