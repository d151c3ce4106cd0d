/* SPDX-License-Identifier: MIT */
/*
 * Routes and places: from top-k ids to counts, and from everybody's counts to
 * the place of every row. Pure arithmetic that each rank does alike, so no rank
 * ever has to be told where a row goes.
 */
#include "ep/handle.h"

#include "base/error.h"
#include "ep/args.h"

#include <stdlib.h>
#include <string.h>

/* ------------------------------------------------------------- routes */

static ep_status read_ids(const char *call, const ep_tensor *idx, int64_t token, int topk,
                          int64_t num_experts, bool verify, int64_t *ids)
{
    for (int k = 0; k < topk; k++) {
        ids[k] = epi_topk_at(idx, token, k);
        if (ids[k] < -1 || ids[k] >= num_experts)
            return epi_fail(EP_ERR_ARGUMENT, "%s: topk_idx[%lld][%d] is %lld; it must be -1..%lld",
                            call, (long long)token, k, (long long)ids[k],
                            (long long)num_experts - 1);
        for (int j = 0; verify && ids[k] >= 0 && j < k; j++)
            if (ids[j] == ids[k])
                return epi_fail(EP_ERR_CORRUPT,
                                "%s: topk_idx[%lld] names expert %lld twice, at places %d and %d",
                                call, (long long)token, (long long)ids[k], j, k);
    }
    return EP_OK;
}

/* Inserts a rank into the ascending head of a token's list, once. */
static int add_rank(int32_t *ranks, int count, int32_t rank)
{
    int at = count;
    while (at > 0 && ranks[at - 1] > rank)
        at--;
    if (at > 0 && ranks[at - 1] == rank)
        return count;
    memmove(ranks + at + 1, ranks + at, (size_t)(count - at) * sizeof *ranks);
    ranks[at] = rank;
    return count + 1;
}

ep_status epi_route(ep_handle *handle, const char *call, const ep_tensor *topk_idx,
                    const epi_experts *experts, const bool *masked, bool verify, int32_t *counts)
{
    int topk = handle->topk, num_ranks = handle->num_ranks;
    int32_t *rank_rows = counts, *expert_rows = counts + num_ranks;
    bool by_token = handle->layout == EP_ROWS_BY_TOKEN;
    int64_t *ids = malloc(((size_t)topk + 1) * sizeof *ids);
    if (!ids)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    ep_status status = EP_OK;
    memset(counts, 0, (size_t)(num_ranks + experts->count) * sizeof *counts);
    for (int64_t t = 0; t < handle->num_tokens && status == EP_OK; t++) {
        int32_t *ranks = handle->send_rank + t * topk;
        int used = 0;
        status = read_ids(call, topk_idx, t, topk, experts->count, verify, ids);
        for (int k = 0; k < topk && status == EP_OK; k++) {
            int32_t rank = ids[k] < 0 ? -1 : experts->rank[ids[k]];
            if (rank >= 0 && masked[rank])
                rank = -1;
            if (rank >= 0)
                expert_rows[ids[k]]++;
            if (!by_token)
                ranks[k] = rank;
            else if (rank >= 0)
                used = add_rank(ranks, used, rank);
        }
        for (int k = used; by_token && k < topk; k++)
            ranks[k] = -1;
        for (int k = 0; k < topk && status == EP_OK; k++)
            if (ranks[k] >= 0)
                rank_rows[ranks[k]]++;
    }
    free(ids);
    return status;
}

/* ------------------------------------------------------------- places */

static int64_t round_up(int64_t rows, int64_t alignment)
{
    return (rows + alignment - 1) / alignment * alignment;
}

/* Rows each expert gets from all ranks, and from the ranks before this one. */
typedef struct expert_sums {
    int64_t *total, *before;
} expert_sums;

static ep_status sum_experts(const ep_handle *handle, const char *call,
                             const int32_t *const *counts, expert_sums *sums)
{
    size_t experts = (size_t)handle->num_experts;
    sums->total = calloc(2 * experts + 1, sizeof(int64_t));
    if (!sums->total)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    sums->before = sums->total + experts;
    for (int s = 0; s < handle->num_ranks; s++) {
        if (!counts[s])
            continue;
        const int32_t *from = counts[s] + handle->num_ranks;
        for (size_t e = 0; e < experts; e++) {
            if (s < handle->buffer->rank)
                sums->before[e] += from[e];
            sums->total[e] += from[e];
        }
    }
    return EP_OK;
}

static ep_status check_total(const char *call, int rank, int64_t rows)
{
    if (rows > INT32_MAX)
        return epi_fail(EP_ERR_CAPACITY, "%s: rank %d would receive %lld rows; the most is %d",
                        call, rank, (long long)rows, INT32_MAX);
    return EP_OK;
}

static ep_status check_worst(ep_handle *handle, const char *call, const int64_t *worst)
{
    for (int r = 0; r < handle->num_ranks; r++) {
        if (!worst[r])
            continue;
        if (handle->rows_at[r] > worst[r])
            return epi_fail(EP_ERR_CAPACITY,
                            "%s: rank %d receives %lld rows; its num_worst_tokens is %lld", call, r,
                            (long long)handle->rows_at[r], (long long)worst[r]);
        handle->rows_at[r] = worst[r];
    }
    return EP_OK;
}

/* By token: sources in order, each source's tokens in order. */
static ep_status place_by_token(ep_handle *handle, const char *call)
{
    int num_ranks = handle->num_ranks, me = handle->buffer->rank;
    int64_t *next = calloc((size_t)num_ranks, sizeof *next);
    if (!next)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    for (int s = 0; s < num_ranks; s++)
        for (int d = 0; d < num_ranks; d++) {
            if (s == me)
                next[d] = handle->rows_at[d];
            handle->rows_at[d] += handle->rows_between[s * num_ranks + d];
        }
    for (int64_t i = 0; i < handle->num_tokens * handle->topk; i++) {
        int32_t rank = handle->send_rank[i];
        handle->send_row[i] = rank < 0 ? -1 : (int32_t)next[rank]++;
    }
    free(next);
    int64_t offset = 0;
    for (int s = 0; s <= num_ranks; s++) {
        handle->source_offset[s] = (int32_t)offset;
        offset += s < num_ranks ? handle->rows_between[s * num_ranks + me] : 0;
    }
    return EP_OK;
}

/* First row of each expert's group at its rank; fills rows_at. */
static void start_groups(ep_handle *handle, const epi_experts *experts, const int64_t *total,
                         int64_t *start)
{
    for (int64_t e = 0; e < handle->num_experts; e++) {
        int64_t *rows = &handle->rows_at[experts->rank[e]];
        start[e] = *rows;
        *rows += round_up(total[e], handle->alignment);
    }
}

/* By expert: groups in local order, within one sources in order, then tokens in order. */
static ep_status place_by_expert(ep_handle *handle, const char *call, const epi_experts *experts,
                                 const expert_sums *sums, const ep_tensor *topk_idx)
{
    size_t count = (size_t)handle->num_experts;
    int64_t *start = calloc(count + 1, sizeof *start);
    if (!start)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    start_groups(handle, experts, sums->total, start);
    for (size_t e = 0; e < count; e++) {
        if (experts->rank[e] == handle->buffer->rank)
            handle->expert_offset[experts->local[e]] = (int32_t)start[e];
        start[e] += sums->before[e];
    }
    handle->expert_offset[handle->num_local] = (int32_t)handle->rows_at[handle->buffer->rank];
    for (int64_t t = 0; t < handle->num_tokens; t++)
        for (int k = 0; k < handle->topk; k++) {
            int64_t i = t * handle->topk + k;
            handle->send_row[i] =
                handle->send_rank[i] < 0 ? -1 : (int32_t)start[epi_topk_at(topk_idx, t, k)]++;
        }
    free(start);
    return EP_OK;
}

static ep_status new_expert_arrays(ep_handle *handle, const char *call)
{
    size_t local = (size_t)handle->num_local;
    handle->expert_rows = calloc(local + 1, sizeof(int32_t));
    handle->expert_filled = calloc(local + 1, sizeof(int32_t));
    handle->expert_offset = calloc(local + 1, sizeof(int32_t));
    if (!handle->expert_rows || !handle->expert_filled || !handle->expert_offset)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    return EP_OK;
}

static ep_status place(ep_handle *handle, const char *call, const epi_experts *experts,
                       const expert_sums *sums, const ep_tensor *topk_idx, const int64_t *worst)
{
    int me = handle->buffer->rank, num_ranks = handle->num_ranks;
    for (int64_t e = 0; e < handle->num_experts; e++) {
        if (experts->rank[e] != me)
            continue;
        int64_t padded = round_up(sums->total[e], handle->alignment);
        EPI_TRY(check_total(call, me, padded));
        handle->expert_filled[experts->local[e]] = (int32_t)sums->total[e];
        handle->expert_rows[experts->local[e]] = (int32_t)padded;
    }
    if (handle->layout == EP_ROWS_BY_TOKEN)
        EPI_TRY(place_by_token(handle, call));
    else
        EPI_TRY(place_by_expert(handle, call, experts, sums, topk_idx));
    for (int r = 0; r < num_ranks; r++)
        EPI_TRY(check_total(call, r, handle->rows_at[r]));
    EPI_TRY(check_worst(handle, call, worst));
    handle->rows = handle->rows_at[me];
    for (int s = 0; s < num_ranks; s++)
        handle->num_rows += handle->rows_between[s * num_ranks + me];
    return EP_OK;
}

ep_status epi_place_rows(ep_handle *handle, const char *call, const epi_experts *experts,
                         const int32_t *const *counts, const ep_tensor *topk_idx,
                         const int64_t *worst)
{
    int num_ranks = handle->num_ranks;
    for (int s = 0; s < num_ranks; s++)
        if (counts[s])
            memcpy(handle->rows_between + s * num_ranks, counts[s],
                   (size_t)num_ranks * sizeof(int32_t));
    EPI_TRY(new_expert_arrays(handle, call));
    expert_sums sums = {NULL, NULL};
    EPI_TRY(sum_experts(handle, call, counts, &sums));
    ep_status status = place(handle, call, experts, &sums, topk_idx, worst);
    free(sums.total);
    return status;
}
