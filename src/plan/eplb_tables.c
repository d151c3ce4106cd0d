/* SPDX-License-Identifier: MIT */
/* The inverse of a placement: which slots hold an expert. */
#include "base/error.h"
#include "plan/eplb.h"

#include <stdlib.h>
#include <string.h>

static ep_status check_layer(const epi_plan *plan, const char *call, const char *name, int layer,
                             const int32_t *row, int *counts)
{
    memset(counts, 0, (size_t)plan->experts * sizeof *counts);
    for (int slot = 0; slot < plan->replicas; slot++) {
        if (row[slot] < 0 || row[slot] >= plan->experts)
            return epi_fail(EP_ERR_ARGUMENT, "%s: %s[%d][%d] is %d, allowed: 0..%d", call, name,
                            layer, slot, (int)row[slot], plan->experts - 1);
        counts[row[slot]]++;
    }
    for (int e = 0; e < plan->experts; e++)
        if (!counts[e])
            return epi_fail(EP_ERR_ARGUMENT, "%s: %s[%d] has no slot for expert %d", call, name,
                            layer, e);
    return EP_OK;
}

ep_status epi_plan_check_placement(const epi_plan *plan, const char *call, const char *name,
                                   const int32_t *phy2log)
{
    if (!phy2log)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is NULL", call, name);
    int *counts = malloc((size_t)plan->experts * sizeof *counts);
    if (!counts)
        return epi_fail(EP_ERR_MEMORY, "%s: no memory for %d counts", call, plan->experts);
    ep_status status = EP_OK;
    for (int layer = 0; layer < plan->layers && status == EP_OK; layer++)
        status = check_layer(plan, call, name, layer, phy2log + epi_plan_row(plan, layer), counts);
    free(counts);
    return status;
}

static int largest(const int *counts, int n)
{
    int most = 0;
    for (int e = 0; e < n; e++)
        most = counts[e] > most ? counts[e] : most;
    return most;
}

ep_status ep_plan_max_count(const ep_plan_config *config, const int32_t *phy2log,
                            int32_t *max_count)
{
    static const char call[] = "ep_plan_max_count";
    epi_plan plan;
    EPI_TRY(epi_plan_check(config, call, &plan));
    if (!phy2log || !max_count)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is NULL", call, phy2log ? "max_count" : "phy2log");
    int *counts = malloc((size_t)plan.experts * sizeof *counts);
    if (!counts)
        return epi_fail(EP_ERR_MEMORY, "%s: no memory for %d counts", call, plan.experts);
    int most = 0;
    ep_status status = EP_OK;
    for (int layer = 0; layer < plan.layers && status == EP_OK; layer++) {
        status = check_layer(&plan, call, "phy2log", layer,
                             phy2log + (size_t)layer * (size_t)plan.replicas, counts);
        int here = largest(counts, plan.experts);
        most = here > most ? here : most;
    }
    free(counts);
    if (status == EP_OK)
        *max_count = most;
    return status;
}

/* Checks that each expert's ranks are 0 .. count - 1. seen: [replicas], start: [experts] scratch.
 */
static ep_status check_ranks(const epi_plan *plan, int layer, const int32_t *row,
                             const int32_t *ranks, const int *counts, int *start, char *seen)
{
    memset(seen, 0, (size_t)plan->replicas);
    for (int e = 0, sum = 0; e < plan->experts; e++) {
        start[e] = sum;
        sum += counts[e];
    }
    for (int slot = 0; slot < plan->replicas; slot++) {
        int e = row[slot], rank = ranks[slot];
        if (rank < 0 || rank >= counts[e] || seen[start[e] + rank])
            return epi_fail(EP_ERR_ARGUMENT,
                            "ep_plan_tables: phyrank[%d][%d] is %d, allowed: 0..%d, each once for "
                            "expert %d",
                            layer, slot, rank, counts[e] - 1, e);
        seen[start[e] + rank] = 1;
    }
    return EP_OK;
}

/* Checks one layer; counts, start, seen are scratch. */
static ep_status check_tables(const epi_plan *plan, int layer, const int32_t *row,
                              const int32_t *ranks, int max_count, int *counts, int *start,
                              char *seen)
{
    EPI_TRY(check_layer(plan, "ep_plan_tables", "phy2log", layer, row, counts));
    int most = largest(counts, plan->experts);
    if (most > max_count)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_plan_tables: max_count is %d, allowed: at least %d, the replicas of an "
                        "expert in layer %d",
                        max_count, most, layer);
    return ranks ? check_ranks(plan, layer, row, ranks, counts, start, seen) : EP_OK;
}

static void write_tables(const epi_plan *plan, const int32_t *row, const int32_t *ranks,
                         int max_count, int *counts, int32_t *log2phy, int32_t *logcnt)
{
    memset(counts, 0, (size_t)plan->experts * sizeof *counts);
    if (log2phy) /* every byte 0xff is -1 */
        memset(log2phy, 0xff, (size_t)plan->experts * (size_t)max_count * sizeof *log2phy);
    for (int slot = 0; slot < plan->replicas; slot++) {
        int e = row[slot], rank = counts[e]++;
        if (log2phy)
            log2phy[(size_t)e * (size_t)max_count + (size_t)(ranks ? ranks[slot] : rank)] = slot;
    }
    if (logcnt)
        memcpy(logcnt, counts, (size_t)plan->experts * sizeof *logcnt);
}

ep_status ep_plan_tables(const ep_plan_config *config, const int32_t *phy2log,
                         const int32_t *phyrank, int32_t max_count, int32_t *log2phy,
                         int32_t *logcnt)
{
    epi_plan plan;
    EPI_TRY(epi_plan_check(config, "ep_plan_tables", &plan));
    if (!phy2log)
        return epi_fail(EP_ERR_ARGUMENT, "ep_plan_tables: phy2log is NULL");
    size_t experts = (size_t)plan.experts, replicas = (size_t)plan.replicas;
    int *counts = malloc(2 * experts * sizeof *counts);
    char *seen = malloc(replicas);
    ep_status status = EP_OK;
    if (!counts || !seen)
        status =
            epi_fail(EP_ERR_MEMORY, "ep_plan_tables: no memory for %d replicas", plan.replicas);
    for (size_t layer = 0; layer < (size_t)plan.layers && status == EP_OK; layer++)
        status = check_tables(&plan, (int)layer, phy2log + layer * replicas,
                              phyrank ? phyrank + layer * replicas : NULL, max_count, counts,
                              counts + experts, seen);
    for (size_t layer = 0; layer < (size_t)plan.layers && status == EP_OK; layer++)
        write_tables(&plan, phy2log + layer * replicas, phyrank ? phyrank + layer * replicas : NULL,
                     max_count, counts,
                     log2phy ? log2phy + layer * experts * (size_t)max_count : NULL,
                     logcnt ? logcnt + layer * experts : NULL);
    free(counts);
    free(seen);
    return status;
}
