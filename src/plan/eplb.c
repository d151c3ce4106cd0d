/* SPDX-License-Identifier: MIT */
/* What every placement call checks first, and the choice of the policy. */
#include "plan/eplb.h"
#include "base/error.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Keeps every product of two sizes, and four times any size, within an int. */
#define SIZE_MAX_EACH (1 << 20)

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
    if (full.policy != EP_PLAN_REFERENCE)
        return epi_fail(EP_ERR_ARGUMENT, "%s: policy is %d, allowed: %d..%d", call, full.policy,
                        EP_PLAN_REFERENCE, EP_PLAN_REFERENCE);
    int kept = full.groups % full.nodes == 0;
    *plan = (epi_plan){
        .layers = full.layers,
        .experts = full.experts,
        .replicas = full.replicas,
        .groups = kept ? full.groups : 1,
        .nodes = kept ? full.nodes : 1,
        .gpus = full.gpus,
        .policy = full.policy,
        .gpu_slots = full.replicas / full.gpus,
    };
    return EP_OK;
}

static ep_status check_load_row(const epi_plan *plan, const char *call, const float *row, int layer)
{
    double total = 0;
    for (int e = 0; e < plan->experts; e++) {
        if (!(row[e] >= 0) || isinf(row[e]))
            return epi_fail(EP_ERR_ARGUMENT,
                            "%s: load[%d][%d] is %g, allowed: finite and not negative", call, layer,
                            e, (double)row[e]);
        total += (double)row[e];
    }
    if (total > (double)FLT_MAX)
        return epi_fail(EP_ERR_ARGUMENT, "%s: load[%d] sums to %g, allowed: up to %g", call, layer,
                        total, (double)FLT_MAX);
    return EP_OK;
}

ep_status epi_plan_check_load(const epi_plan *plan, const char *call, const float *load)
{
    if (!load)
        return epi_fail(EP_ERR_ARGUMENT, "%s: load is NULL", call);
    for (int layer = 0; layer < plan->layers; layer++)
        EPI_TRY(check_load_row(plan, call, load + (size_t)layer * (size_t)plan->experts, layer));
    return EP_OK;
}

ep_status ep_plan_eplb(const ep_plan_config *config, const float *load, int32_t *phy2log,
                       int32_t *phyrank)
{
    epi_plan plan;
    EPI_TRY(epi_plan_check(config, "ep_plan_eplb", &plan));
    EPI_TRY(epi_plan_check_load(&plan, "ep_plan_eplb", load));
    if (!phy2log)
        return epi_fail(EP_ERR_ARGUMENT, "ep_plan_eplb: phy2log is NULL");
    return epi_plan_reference(&plan, load, phy2log, phyrank);
}
