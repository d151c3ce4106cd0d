/* SPDX-License-Identifier: MIT */
/*
 * The incremental policy. Each layer is improved change by change, taking the
 * change with the most gain per fetched replica; that gives a curve of
 * balancedness over moves. The moves allowed are then spent across layers
 * wherever the next stretch of a curve is steepest.
 */
#include "base/error.h"
#include "plan/eplb.h"
#include "plan/eplb_change.h"

#include <stdlib.h>
#include <string.h>

/* One layer's curve: after `changes` changes, `moves` replicas are fetched. */
typedef struct point {
    int moves;
    double balance;
} point;

typedef struct curve {
    point *points; /* [count], points[0] is the current placement */
    int count;
    int taken; /* index of the point chosen so far */
} curve;

static ep_status trace(epi_change *state, const epi_plan *plan, const float *load, int layer,
                       const int32_t *current, curve *c)
{
    int most = 2 * plan->replicas + 1;
    c->points = malloc((size_t)most * sizeof *c->points);
    if (!c->points)
        return epi_fail(EP_ERR_MEMORY, "ep_plan_eplb: no memory for %d changes", most);
    epi_change_start(state, load, layer, current);
    c->points[c->count++] = (point){0, epi_change_balance(state)};
    while (c->count < most && epi_change_step(state, plan->max_moves))
        c->points[c->count++] = (point){epi_change_moves(state), epi_change_balance(state)};
    point *fitted = realloc(c->points, (size_t)c->count * sizeof *fitted);
    c->points = fitted ? fitted : c->points;
    return EP_OK;
}

/* The steepest way on from the point taken, for at most `left` more moves; -1: none. */
static int next_point(const curve *c, int left, double *slope)
{
    const point *from = &c->points[c->taken];
    int best = -1;
    *slope = 0;
    for (int k = c->taken + 1; k < c->count; k++) {
        int moves = c->points[k].moves - from->moves;
        double gain = c->points[k].balance - from->balance;
        if (moves > left || gain <= 0)
            continue;
        double here = gain / (moves > 0 ? moves : 0.5);
        if (here > *slope) {
            *slope = here;
            best = k;
        }
    }
    return best;
}

/* Spends plan->max_moves over the layers. */
static void spend(const epi_plan *plan, curve *curves)
{
    int left = plan->max_moves;
    for (;;) {
        int layer = -1, to = -1;
        double best = 0, slope;
        for (int l = 0; l < plan->layers; l++) {
            int k = next_point(&curves[l], left, &slope);
            if (k >= 0 && slope > best) {
                best = slope;
                layer = l;
                to = k;
            }
        }
        if (layer < 0)
            return;
        curve *c = &curves[layer];
        left -= c->points[to].moves - c->points[c->taken].moves;
        c->taken = to;
    }
}

/* Groups that are kept on nodes must be so in the current placement. */
static ep_status check_groups(const epi_plan *plan, const int32_t *current)
{
    int size = plan->experts / plan->groups, slots = plan->replicas / plan->nodes;
    int *node = malloc((size_t)plan->groups * sizeof *node);
    if (!node)
        return epi_fail(EP_ERR_MEMORY, "ep_plan_eplb: no memory for %d groups", plan->groups);
    ep_status status = EP_OK;
    for (int layer = 0; layer < plan->layers && status == EP_OK; layer++) {
        const int32_t *row = current + epi_plan_row(plan, layer);
        for (int g = 0; g < plan->groups; g++)
            node[g] = -1;
        for (int slot = 0; slot < plan->replicas && status == EP_OK; slot++) {
            int *home = &node[row[slot] / size];
            if (*home >= 0 && *home != slot / slots)
                status =
                    epi_fail(EP_ERR_ARGUMENT,
                             "ep_plan_eplb: current[%d][%d] is %d on node %d, allowed: experts "
                             "of groups on node %d, or nodes that do not divide groups",
                             layer, slot, (int)row[slot], slot / slots, *home);
            *home = slot / slots;
        }
    }
    free(node);
    return status;
}

static ep_status plan_layers(const epi_plan *plan, const float *load, const int32_t *current,
                             epi_change *state, curve *curves, int32_t *phy2log)
{
    for (int layer = 0; layer < plan->layers; layer++)
        EPI_TRY(
            trace(state, plan, load, layer, current + epi_plan_row(plan, layer), &curves[layer]));
    spend(plan, curves);
    /* The changes are made again up to the point chosen: cheaper than keeping every row. */
    for (int layer = 0; layer < plan->layers; layer++) {
        size_t row = epi_plan_row(plan, layer);
        epi_change_start(state, load, layer, current + row);
        for (int k = 0; k < curves[layer].taken; k++)
            epi_change_step(state, plan->max_moves);
        epi_change_write(state, phy2log + row);
    }
    return EP_OK;
}

ep_status epi_plan_incremental(const epi_plan *plan, const float *load, const int32_t *current,
                               int32_t *phy2log)
{
    epi_change state;
    EPI_TRY(check_groups(plan, current));
    EPI_TRY(epi_change_open(&state, plan));
    curve *curves = calloc((size_t)plan->layers, sizeof *curves);
    ep_status status =
        curves ? plan_layers(plan, load, current, &state, curves, phy2log)
               : epi_fail(EP_ERR_MEMORY, "ep_plan_eplb: no memory for %d layers", plan->layers);
    for (int layer = 0; curves && layer < plan->layers; layer++)
        free(curves[layer].points);
    free(curves);
    epi_change_close(&state);
    return status;
}
