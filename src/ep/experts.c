/* SPDX-License-Identifier: MIT */
/* Which rank owns an expert. */
#include "ep/handle.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"

#include <stdlib.h>

static ep_status check_table(const char *call, int64_t count, const int32_t *expert_rank,
                             int num_ranks)
{
    if (!expert_rank && count % num_ranks)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: num_experts is %lld; without expert_rank it must be a multiple of the "
                        "%d ranks",
                        call, (long long)count, num_ranks);
    for (int64_t e = 0; expert_rank && e < count; e++)
        if (expert_rank[e] < 0 || expert_rank[e] >= num_ranks)
            return epi_fail(EP_ERR_ARGUMENT, "%s: expert_rank[%lld] is %d; it must be 0..%d", call,
                            (long long)e, (int)expert_rank[e], num_ranks - 1);
    return EP_OK;
}

static int64_t sum_table(const int32_t *expert_rank, int64_t count)
{
    if (!expert_rank)
        return 0;
    return (int64_t)epi_checksum(expert_rank, (size_t)count * sizeof *expert_rank) | 1;
}

ep_status epi_experts_check(const char *call, int64_t count, const int32_t *expert_rank,
                            int num_ranks, int rank, int *num_local, int64_t *table_sum)
{
    EPI_TRY(check_table(call, count, expert_rank, num_ranks));
    *num_local = expert_rank ? 0 : (int)(count / num_ranks);
    for (int64_t e = 0; expert_rank && e < count; e++)
        *num_local += expert_rank[e] == rank;
    *table_sum = sum_table(expert_rank, count);
    return EP_OK;
}

ep_status epi_experts_init(epi_experts *experts, const char *call, int64_t count,
                           const int32_t *expert_rank, int num_ranks, int rank)
{
    EPI_TRY(check_table(call, count, expert_rank, num_ranks));
    size_t n = (size_t)count;
    *experts = (epi_experts){.count = count};
    experts->rank = malloc(n * sizeof(int32_t));
    experts->local = malloc(n * sizeof(int32_t));
    int32_t *next = calloc((size_t)num_ranks, sizeof(int32_t));
    if (!experts->rank || !experts->local || !next) {
        free(next);
        epi_experts_free(experts);
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory for %lld experts", call,
                        (long long)count);
    }
    int64_t block = count / num_ranks;
    for (int64_t e = 0; e < count; e++) {
        experts->rank[e] = expert_rank ? expert_rank[e] : (int32_t)(e / block);
        experts->local[e] = next[experts->rank[e]]++;
    }
    experts->num_local = next[rank];
    experts->table_sum = sum_table(expert_rank, count);
    free(next);
    return EP_OK;
}

void epi_experts_free(epi_experts *experts)
{
    free(experts->rank);
    free(experts->local);
    *experts = (epi_experts){0};
}
