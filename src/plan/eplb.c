/* SPDX-License-Identifier: MIT */
/* What every placement call checks first, and the choice of the policy. */
#include "plan/eplb.h"
#include "base/error.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char call_eplb[] = "ep_plan_eplb";

/* Keeps every product of two sizes, and four times any size, within an int. */
#define SIZE_MAX_EACH (1 << 20)
#define WINDOWED_MAX (1 << 30) /* windows times replicas */

static ep_status check_size(const char *call, const char *name, int value, int least)
{
    if (value >= least && value <= SIZE_MAX_EACH)
        return EP_OK;
    return epi_fail(EP_ERR_ARGUMENT, "%s: %s is %d, allowed: %d..%d", call, name, value, least,
                    SIZE_MAX_EACH);
}

static ep_status check_divides(const char *call, const char *name, int value, const char *of,
                               int total)
{
    if (total % value == 0)
        return EP_OK;
    return epi_fail(EP_ERR_ARGUMENT, "%s: %s is %d, which does not divide %s, %d", call, name,
                    value, of, total);
}

static ep_status check_sizes(const char *call, const ep_plan_config *c)
{
    EPI_TRY(check_size(call, "layers", c->layers, 1));
    EPI_TRY(check_size(call, "experts", c->experts, 1));
    EPI_TRY(check_size(call, "gpus", c->gpus, 1));
    EPI_TRY(check_size(call, "groups", c->groups, 1));
    EPI_TRY(check_size(call, "nodes", c->nodes, 1));
    EPI_TRY(check_size(call, "replicas", c->replicas, c->experts));
    if (c->windows < 1 || c->windows > WINDOWED_MAX / c->replicas)
        return epi_fail(EP_ERR_ARGUMENT, "%s: windows is %d, allowed: 1..%d", call, c->windows,
                        WINDOWED_MAX / c->replicas);
    EPI_TRY(check_divides(call, "groups", c->groups, "experts", c->experts));
    EPI_TRY(check_divides(call, "nodes", c->nodes, "gpus", c->gpus));
    return check_divides(call, "gpus", c->gpus, "replicas", c->replicas);
}

ep_status epi_plan_check(const ep_plan_config *config, const char *call, epi_plan *plan)
{
    ep_plan_config full = EP_PLAN_CONFIG_INIT;
    if (!config)
        return epi_fail(EP_ERR_ARGUMENT, "%s: config is NULL", call);
    if (config->size < sizeof config->size || config->size > sizeof full)
        return epi_fail(EP_ERR_ARGUMENT, "%s: config.size is %zu, allowed: %zu..%zu", call,
                        config->size, sizeof config->size, sizeof full);
    memcpy(&full, config, config->size);
    EPI_TRY(check_sizes(call, &full));
    if (!ep_plan_policy_name(full.policy))
        return epi_fail(EP_ERR_ARGUMENT, "%s: policy is %d, allowed: 0..%d", call, full.policy,
                        EP_PLAN_POLICIES - 1);
    if (full.max_moves < 0)
        return epi_fail(EP_ERR_ARGUMENT, "%s: max_moves is %d, allowed: 0 or more", call,
                        full.max_moves);
    int kept = full.groups % full.nodes == 0;
    *plan = (epi_plan){
        .layers = full.layers,
        .experts = full.experts,
        .replicas = full.replicas,
        .groups = kept ? full.groups : 1,
        .nodes = kept ? full.nodes : 1,
        .gpus = full.gpus,
        .policy = full.policy,
        .windows = full.windows,
        .max_moves = full.max_moves,
        .gpu_slots = full.replicas / full.gpus,
        .physical_nodes = full.nodes,
    };
    return EP_OK;
}

static ep_status check_load_row(const epi_plan *plan, const char *call, const float *row,
                                int window, int layer)
{
    double total = 0;
    for (int e = 0; e < plan->experts; e++) {
        if (!(row[e] >= 0) || isinf(row[e]))
            return epi_fail(EP_ERR_ARGUMENT,
                            "%s: load[%d][%d][%d] is %g, allowed: finite and not negative", call,
                            window, layer, e, (double)row[e]);
        total += (double)row[e];
    }
    if (total * plan->windows > (double)FLT_MAX)
        return epi_fail(EP_ERR_ARGUMENT, "%s: load[%d][%d] sums to %g, allowed: up to %g", call,
                        window, layer, total, (double)FLT_MAX / plan->windows);
    return EP_OK;
}

ep_status epi_plan_check_load(const epi_plan *plan, const char *call, const float *load)
{
    if (!load)
        return epi_fail(EP_ERR_ARGUMENT, "%s: load is NULL", call);
    for (int window = 0; window < plan->windows; window++)
        for (int layer = 0; layer < plan->layers; layer++)
            EPI_TRY(check_load_row(plan, call, epi_plan_load(plan, load, window, layer), window,
                                   layer));
    return EP_OK;
}

const char *ep_plan_policy_name(int32_t policy)
{
    static const char *const names[EP_PLAN_POLICIES] = {
        [EP_PLAN_REFERENCE] = "reference",     [EP_PLAN_REFINE] = "refine",
        [EP_PLAN_UNIQUE] = "unique",           [EP_PLAN_WINDOWS] = "windows",
        [EP_PLAN_INCREMENTAL] = "incremental",
    };
    return policy >= 0 && policy < EP_PLAN_POLICIES ? names[policy] : NULL;
}

/* The windows' sum, rounded to float32 once. */
static void add_windows(const epi_plan *plan, const float *load, float *sum)
{
    size_t n = (size_t)plan->layers * (size_t)plan->experts;
    for (size_t i = 0; i < n; i++) {
        double total = 0;
        for (size_t w = 0; w < (size_t)plan->windows; w++)
            total += (double)load[w * n + i];
        sum[i] = (float)total;
    }
}

/* Ranks replicas in the order of their slots. */
static ep_status rank_by_slot(const epi_plan *plan, const int32_t *phy2log, int32_t *phyrank)
{
    int32_t *next = malloc((size_t)plan->experts * sizeof *next);
    if (!next)
        return epi_fail(EP_ERR_MEMORY, "%s: no memory for %d counts", call_eplb, plan->experts);
    for (int layer = 0; layer < plan->layers; layer++) {
        size_t row = epi_plan_row(plan, layer);
        memset(next, 0, (size_t)plan->experts * sizeof *next);
        for (size_t slot = row; slot < row + (size_t)plan->replicas; slot++)
            phyrank[slot] = next[phy2log[slot]]++;
    }
    free(next);
    return EP_OK;
}

/* load: as the policy wants it, one window or all. */
static ep_status run_policy(const epi_plan *plan, const float *load, const int32_t *current,
                            int32_t *phy2log, int32_t *phyrank)
{
    if (plan->policy == EP_PLAN_REFERENCE)
        return epi_plan_reference(plan, load, phy2log, phyrank);
    if (plan->policy == EP_PLAN_INCREMENTAL)
        EPI_TRY(epi_plan_incremental(plan, load, current, phy2log));
    else
        EPI_TRY(epi_plan_search(plan, load, phy2log));
    return phyrank ? rank_by_slot(plan, phy2log, phyrank) : EP_OK;
}

static ep_status check_arguments(const epi_plan *plan, const float *load, const int32_t *current,
                                 const int32_t *phy2log, const ep_plan_report *report)
{
    EPI_TRY(epi_plan_check_load(plan, call_eplb, load));
    if (current || plan->policy == EP_PLAN_INCREMENTAL)
        EPI_TRY(epi_plan_check_placement(plan, call_eplb, "current", current));
    if (!phy2log)
        return epi_fail(EP_ERR_ARGUMENT, "%s: phy2log is NULL", call_eplb);
    return report ? epi_plan_check_report(call_eplb, report) : EP_OK;
}

/*
 * Results are made aside and copied at the end, so that an error leaves the
 * caller's arrays as they were and `current` may be the array that is written.
 */
static ep_status plan_aside(const epi_plan *plan, const float *load, const int32_t *current,
                            int32_t *phy2log, int32_t *phyrank, ep_plan_report *report)
{
    size_t slots = epi_plan_row(plan, plan->layers);
    size_t loads = (size_t)plan->layers * (size_t)plan->experts;
    epi_plan one = *plan;
    int sums = plan->windows > 1 && plan->policy <= EP_PLAN_UNIQUE;
    int32_t *aside = malloc(2 * slots * sizeof *aside);
    float *sum = sums ? malloc(loads * sizeof *sum) : NULL;
    ep_status status = EP_OK;
    if (!aside || (sums && !sum))
        status = epi_fail(EP_ERR_MEMORY, "%s: no memory for %zu slots", call_eplb, slots);
    if (status == EP_OK && sums) {
        one.windows = 1;
        add_windows(plan, load, sum);
    }
    if (status == EP_OK)
        status =
            run_policy(&one, sums ? sum : load, current, aside, phyrank ? aside + slots : NULL);
    if (status == EP_OK && report)
        status = epi_plan_report(plan, call_eplb, load, current, aside, report);
    if (status == EP_OK)
        memcpy(phy2log, aside, slots * sizeof *aside);
    if (status == EP_OK && phyrank)
        memcpy(phyrank, aside + slots, slots * sizeof *aside);
    free(sum);
    free(aside);
    return status;
}

ep_status ep_plan_eplb(const ep_plan_config *config, const float *load, const int32_t *current,
                       int32_t *phy2log, int32_t *phyrank, ep_plan_report *report)
{
    epi_plan plan;
    EPI_TRY(epi_plan_check(config, call_eplb, &plan));
    EPI_TRY(check_arguments(&plan, load, current, phy2log, report));
    return plan_aside(&plan, load, current, phy2log, phyrank, report);
}
