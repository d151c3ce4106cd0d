/* SPDX-License-Identifier: MIT */
/* What a placement is worth: GPU loads, balancedness, duplicates, moves. */
#include "base/error.h"
#include "plan/eplb.h"

#include <stdlib.h>
#include <string.h>

/* Experts dealt to GPUs in order, one slot each: the placement without a plan. */
static void deal(const epi_plan *plan, const float *load, double *gpu_load)
{
    memset(gpu_load, 0, (size_t)plan->gpus * sizeof *gpu_load);
    for (int e = 0; e < plan->experts; e++)
        gpu_load[(int64_t)e * plan->gpus / plan->experts] += (double)load[e];
}

void epi_plan_add_up(const epi_plan *plan, const float *load, const int32_t *phy2log, int *count,
                     double *gpu_load)
{
    if (!phy2log) {
        deal(plan, load, gpu_load);
        return;
    }
    memset(count, 0, (size_t)plan->experts * sizeof *count);
    for (int slot = 0; slot < plan->replicas; slot++)
        count[phy2log[slot]]++;
    for (int g = 0, slot = 0; g < plan->gpus; g++) {
        gpu_load[g] = 0;
        for (int s = 0; s < plan->gpu_slots; s++, slot++)
            gpu_load[g] += (double)load[phy2log[slot]] / count[phy2log[slot]];
    }
}

double epi_plan_balance(const double *gpu_load, int n)
{
    double sum = 0, most = 0;
    for (int g = 0; g < n; g++) {
        sum += gpu_load[g];
        most = gpu_load[g] > most ? gpu_load[g] : most;
    }
    return most > 0 ? sum / n / most : 1;
}

static int any_load(const epi_plan *plan, const float *row)
{
    for (int e = 0; e < plan->experts; e++)
        if (row[e] > 0)
            return 1;
    return 0;
}

/* Mean over windows of the mean over layers with a load. */
static double balancedness(const epi_plan *plan, const float *load, const int32_t *phy2log,
                           int *count, double *gpu_load)
{
    double mean = 0;
    for (int w = 0; w < plan->windows; w++) {
        double sum = 0;
        int loaded = 0;
        for (int layer = 0; layer < plan->layers; layer++) {
            const float *row = epi_plan_load(plan, load, w, layer);
            if (!any_load(plan, row))
                continue;
            epi_plan_add_up(plan, row, phy2log ? phy2log + epi_plan_row(plan, layer) : NULL, count,
                            gpu_load);
            sum += epi_plan_balance(gpu_load, plan->gpus);
            loaded++;
        }
        mean += loaded ? sum / loaded : 1;
    }
    return mean / plan->windows;
}

/* Whether GPU g has the expert before: in `current`, or when experts are dealt in order. */
static int had(const epi_plan *plan, const int32_t *current, int g, int expert)
{
    if (current)
        return epi_plan_holds(plan, current, g, expert, plan->gpu_slots);
    return (int64_t)expert * plan->gpus / plan->experts == g;
}

static void count_slots(const epi_plan *plan, const int32_t *current, const int32_t *row,
                        ep_plan_report *report)
{
    for (int slot = 0; slot < plan->replicas; slot++) {
        int g = slot / plan->gpu_slots, before = slot % plan->gpu_slots;
        if (epi_plan_holds(plan, row, g, row[slot], before))
            report->duplicates++;
        else if (!had(plan, current, g, row[slot]))
            report->moves++;
    }
}

ep_status epi_plan_check_report(const char *call, const ep_plan_report *report)
{
    if (report->size >= sizeof report->size && report->size <= sizeof *report)
        return EP_OK;
    return epi_fail(EP_ERR_ARGUMENT, "%s: report.size is %zu, allowed: %zu..%zu", call,
                    report->size, sizeof report->size, sizeof *report);
}

ep_status epi_plan_report(const epi_plan *plan, const char *call, const float *load,
                          const int32_t *current, const int32_t *phy2log, ep_plan_report *report)
{
    ep_plan_report full = {.size = report->size};
    double *gpu_load = malloc((size_t)plan->gpus * sizeof *gpu_load);
    int *count = malloc((size_t)plan->experts * sizeof *count);
    if (!gpu_load || !count) {
        free(gpu_load);
        free(count);
        return epi_fail(EP_ERR_MEMORY, "%s: no memory for %d GPUs", call, plan->gpus);
    }
    full.balancedness_before = balancedness(plan, load, current, count, gpu_load);
    full.balancedness = balancedness(plan, load, phy2log, count, gpu_load);
    for (int layer = 0; layer < plan->layers; layer++) {
        size_t row = epi_plan_row(plan, layer);
        count_slots(plan, current ? current + row : NULL, phy2log + row, &full);
    }
    int over = plan->gpu_slots - plan->experts / plan->nodes;
    full.duplicates_unavoidable = over > 0 ? (int64_t)over * plan->gpus * plan->layers : 0;
    memcpy(report, &full, report->size);
    free(gpu_load);
    free(count);
    return EP_OK;
}

ep_status ep_plan_judge(const ep_plan_config *config, const float *load, const int32_t *current,
                        const int32_t *phy2log, ep_plan_report *report)
{
    static const char call[] = "ep_plan_judge";
    epi_plan plan;
    EPI_TRY(epi_plan_check(config, call, &plan));
    EPI_TRY(epi_plan_check_load(&plan, call, load));
    if (current)
        EPI_TRY(epi_plan_check_placement(&plan, call, "current", current));
    EPI_TRY(epi_plan_check_placement(&plan, call, "phy2log", phy2log));
    if (!report)
        return epi_fail(EP_ERR_ARGUMENT, "%s: report is NULL", call);
    EPI_TRY(epi_plan_check_report(call, report));
    return epi_plan_report(&plan, call, load, current, phy2log, report);
}

ep_status ep_plan_gpu_load(const ep_plan_config *config, const float *load, const int32_t *phy2log,
                           double *gpu_load)
{
    static const char call[] = "ep_plan_gpu_load";
    epi_plan plan;
    EPI_TRY(epi_plan_check(config, call, &plan));
    EPI_TRY(epi_plan_check_load(&plan, call, load));
    if (phy2log)
        EPI_TRY(epi_plan_check_placement(&plan, call, "phy2log", phy2log));
    if (!gpu_load)
        return epi_fail(EP_ERR_ARGUMENT, "%s: gpu_load is NULL", call);
    int *count = malloc((size_t)plan.experts * sizeof *count);
    if (!count)
        return epi_fail(EP_ERR_MEMORY, "%s: no memory for %d counts", call, plan.experts);
    for (int w = 0; w < plan.windows; w++)
        for (int layer = 0; layer < plan.layers; layer++, gpu_load += plan.gpus)
            epi_plan_add_up(&plan, epi_plan_load(&plan, load, w, layer),
                            phy2log ? phy2log + epi_plan_row(&plan, layer) : NULL, count, gpu_load);
    free(count);
    return EP_OK;
}

/* A slot of the current row that holds the expert: on `node` if any, else the first. */
static int find_source(const epi_plan *plan, const int32_t *current, int expert, int node)
{
    int per_node = plan->replicas / plan->physical_nodes, found = -1;
    for (int slot = 0; slot < plan->replicas; slot++) {
        if (current[slot] != expert)
            continue;
        if (slot / per_node == node)
            return slot;
        found = found < 0 ? slot : found;
    }
    return found;
}

ep_status ep_plan_moves(const ep_plan_config *config, const int32_t *current,
                        const int32_t *phy2log, ep_plan_move *moves, int64_t capacity,
                        int64_t *count)
{
    static const char call[] = "ep_plan_moves";
    epi_plan plan;
    EPI_TRY(epi_plan_check(config, call, &plan));
    EPI_TRY(epi_plan_check_placement(&plan, call, "current", current));
    EPI_TRY(epi_plan_check_placement(&plan, call, "phy2log", phy2log));
    if (!count || (!moves && capacity > 0))
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is NULL", call, count ? "moves" : "count");
    int64_t n = 0;
    for (int layer = 0; layer < plan.layers; layer++) {
        const int32_t *from = current + epi_plan_row(&plan, layer);
        const int32_t *to = phy2log + epi_plan_row(&plan, layer);
        for (int slot = 0; slot < plan.replicas; slot++) {
            int g = slot / plan.gpu_slots, node = slot / (plan.replicas / plan.physical_nodes);
            if (epi_plan_holds(&plan, to, g, to[slot], slot % plan.gpu_slots) ||
                had(&plan, from, g, to[slot]))
                continue;
            if (n < capacity)
                moves[n] =
                    (ep_plan_move){layer, slot, to[slot], find_source(&plan, from, to[slot], node)};
            n++;
        }
    }
    *count = n;
    return EP_OK;
}
