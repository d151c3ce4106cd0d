/* SPDX-License-Identifier: MIT */
#include "entrepot/ep.h"

#include "base/error.h"
#include "ep/args.h"
#include "ep/backend.h"
#include "ep/handle.h"

#include <stdlib.h>
#include <string.h>

static const char on_stream[] = "ep_layout_on_stream";

typedef struct outputs {
    int32_t *per_rank, *per_node, *per_expert;
    uint8_t *in_rank;
} outputs;

static ep_status check_shape(const char *call, const ep_tensor *topk_idx, int64_t num_experts,
                             int32_t num_ranks, int32_t ranks_per_node)
{
    epi_tensor_rule rule = {.call = call,
                            .argument = "topk_idx",
                            .ndim = 2,
                            .rows = -1,
                            .columns = -1,
                            .dtypes = EPI_INDEX_DTYPES,
                            .dtype_names = "I32 or I64"};
    if (!topk_idx)
        return epi_fail(EP_ERR_ARGUMENT, "%s: topk_idx is NULL", call);
    if (strcmp(call, on_stream) == 0) { /* any device that has streams */
        rule.device = topk_idx->device;
        rule.device_index = topk_idx->device_index;
    }
    EPI_TRY(epi_tensor_check(topk_idx, &rule));
    if (num_experts < 1 || num_experts > 65536)
        return epi_bad(call, "num_experts", num_experts, "1..65536");
    if (num_ranks < 1 || num_ranks > 65536)
        return epi_bad(call, "num_ranks", num_ranks, "1..65536");
    if (ranks_per_node < 1 || num_ranks % ranks_per_node)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: ranks_per_node is %d; it must divide num_ranks, which is %d", call,
                        (int)ranks_per_node, (int)num_ranks);
    return EP_OK;
}

static ep_status check_ids(const ep_tensor *topk_idx, int64_t num_experts)
{
    for (int64_t t = 0; t < topk_idx->shape[0]; t++)
        for (int k = 0; k < topk_idx->shape[1]; k++) {
            int64_t id = epi_topk_at(topk_idx, t, k);
            if (id < -1 || id >= num_experts)
                return epi_fail(EP_ERR_ARGUMENT,
                                "ep_layout: topk_idx[%lld][%d] is %lld; it must be -1..%lld",
                                (long long)t, k, (long long)id, (long long)num_experts - 1);
        }
    return EP_OK;
}

/* Adds one token: `last` remembers, per rank and then per node, the last token counted. */
static void count_token(const ep_tensor *idx, int64_t token, const epi_experts *experts,
                        int num_ranks, int ranks_per_node, int64_t *last, const outputs *out)
{
    for (int k = 0; k < idx->shape[1]; k++) {
        int64_t id = epi_topk_at(idx, token, k);
        if (id < 0)
            continue;
        int rank = experts->rank[id], node = rank / ranks_per_node;
        if (out->per_expert)
            out->per_expert[id]++;
        if (last[rank] == token)
            continue;
        last[rank] = token;
        if (out->per_rank)
            out->per_rank[rank]++;
        if (out->in_rank)
            out->in_rank[token * num_ranks + rank] = 1;
        if (last[num_ranks + node] == token)
            continue;
        last[num_ranks + node] = token;
        if (out->per_node)
            out->per_node[node]++;
    }
}

ep_status ep_layout(const ep_tensor *topk_idx, int64_t num_experts, const int32_t *expert_rank,
                    int32_t num_ranks, int32_t ranks_per_node, int32_t *tokens_per_rank,
                    int32_t *tokens_per_node, int32_t *tokens_per_expert, uint8_t *token_in_rank)
{
    EPI_TRY(check_shape("ep_layout", topk_idx, num_experts, num_ranks, ranks_per_node));
    EPI_TRY(check_ids(topk_idx, num_experts));
    epi_experts experts;
    EPI_TRY(epi_experts_init(&experts, "ep_layout", num_experts, expert_rank, num_ranks, 0));
    size_t ranks = (size_t)num_ranks, nodes = ranks / (size_t)ranks_per_node;
    int64_t *last = malloc((ranks + nodes) * sizeof *last);
    if (!last) {
        epi_experts_free(&experts);
        return epi_fail(EP_ERR_MEMORY, "ep_layout: out of memory for %d ranks", (int)num_ranks);
    }
    memset(last, 0xff, (ranks + nodes) * sizeof *last);
    const outputs out = {tokens_per_rank, tokens_per_node, tokens_per_expert, token_in_rank};
    if (tokens_per_rank)
        memset(tokens_per_rank, 0, ranks * sizeof(int32_t));
    if (tokens_per_node)
        memset(tokens_per_node, 0, nodes * sizeof(int32_t));
    if (tokens_per_expert)
        memset(tokens_per_expert, 0, (size_t)num_experts * sizeof(int32_t));
    if (token_in_rank)
        memset(token_in_rank, 0, (size_t)topk_idx->shape[0] * ranks);
    for (int64_t t = 0; t < topk_idx->shape[0]; t++)
        count_token(topk_idx, t, &experts, num_ranks, ranks_per_node, last, &out);
    free(last);
    epi_experts_free(&experts);
    return EP_OK;
}

ep_status ep_layout_on_stream(const ep_tensor *topk_idx, int64_t num_experts,
                              const int32_t *expert_rank, int32_t num_ranks, int32_t ranks_per_node,
                              int32_t *tokens_per_rank, int32_t *tokens_per_node,
                              int32_t *tokens_per_expert, uint8_t *token_in_rank, void *stream)
{
    const epi_backend_ops *backend;
    EPI_TRY(check_shape(on_stream, topk_idx, num_experts, num_ranks, ranks_per_node));
    if (topk_idx->device == EP_DEVICE_CPU)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: topk_idx.device is %d; it must be an accelerator's: ep_layout is for "
                        "host memory",
                        on_stream, (int)topk_idx->device);
    if (!expert_rank && num_experts % num_ranks)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: num_experts is %lld; without expert_rank it must be a multiple of the "
                        "%d ranks",
                        on_stream, (long long)num_experts, (int)num_ranks);
    EPI_TRY(epi_backend_find(topk_idx->device, &backend));
    const epi_layout_call call = {
        topk_idx,        num_experts,     expert_rank,       num_ranks,     ranks_per_node,
        tokens_per_rank, tokens_per_node, tokens_per_expert, token_in_rank, stream};
    return backend->layout(&call);
}
