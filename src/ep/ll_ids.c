/* SPDX-License-Identifier: MIT */
#include "ep/ll.h"

#include "base/error.h"

ep_status epi_ll_read_ids(const epi_ll *ll, const char *call, const ep_tensor *idx, int32_t *ids)
{
    const bool *masked = ll->buffer->group->masked;
    bool verify = ll->buffer->config.verify;
    int topk = ll->shape.topk;
    for (int64_t t = 0; t < idx->shape[0]; t++)
        for (int k = 0; k < topk; k++) {
            int64_t id = epi_topk_at(idx, t, k);
            if (id < -1 || id >= ll->shape.num_experts)
                return epi_fail(
                    EP_ERR_ARGUMENT, "%s: topk_idx[%lld][%d] is %lld; it must be -1..%lld", call,
                    (long long)t, k, (long long)id, (long long)ll->shape.num_experts - 1);
            for (int j = 0; verify && id >= 0 && j < k; j++)
                if (epi_topk_at(idx, t, j) == id)
                    return epi_fail(
                        EP_ERR_CORRUPT,
                        "%s: topk_idx[%lld] names expert %lld twice, at places %d and %d", call,
                        (long long)t, (long long)id, j, k);
            if (id >= 0 && masked[ll->experts.rank[id]])
                id = -1;
            ids[t * topk + k] = (int32_t)id;
        }
    return EP_OK;
}

ep_status epi_ll_check_ids(const epi_ll_result *result, const char *call, const ep_tensor *idx)
{
    for (int64_t t = 0; t < result->num_tokens; t++)
        for (int k = 0; k < result->topk; k++) {
            int32_t was = result->ids[t * result->topk + k];
            int64_t id = epi_topk_at(idx, t, k);
            if (was >= 0 && id != was)
                return epi_fail(EP_ERR_CORRUPT,
                                "%s: topk_idx[%lld][%d] is %lld; in dispatch it was %d", call,
                                (long long)t, k, (long long)id, (int)was);
        }
    return EP_OK;
}
