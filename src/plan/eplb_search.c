/* SPDX-License-Identifier: MIT */
/*
 * The searching policies. Groups are dealt to nodes, then each node's experts
 * get replicas, a first placement and swaps, each as a cell; at last the layer
 * as a whole is changed step by step, as the incremental policy does, while
 * that helps. Refine keeps the reference's layer where nothing better was found.
 */
#include "base/error.h"
#include "plan/eplb.h"
#include "plan/eplb_cell.h"
#include "plan/eplb_change.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

/* Between the maximum, which sees one GPU only, and the variance, which sees too many; measured. */
enum { SWAP_POWER = 32 };

typedef struct search {
    const epi_plan *plan;
    epi_cell groups;   /* groups for experts, nodes for GPUs */
    epi_cell node;     /* one node */
    epi_change polish; /* the whole layer */
    double *weight;    /* [windows][experts], mean GPU load 1 */
    double *gpu_load;  /* [gpus] */
    int *members;      /* [experts / nodes] experts of the node */
    int *count;        /* [experts] */
    int32_t *row;      /* [replicas] */
} search;

static void search_close(search *s)
{
    epi_cell_close(&s->groups);
    epi_cell_close(&s->node);
    epi_change_close(&s->polish);
    free(s->weight);
    free(s->gpu_load);
    free(s->members);
    free(s->count);
    free(s->row);
}

static ep_status search_open(search *s, const epi_plan *plan)
{
    static const char call[] = "ep_plan_eplb";
    size_t experts = (size_t)plan->experts;
    memset(s, 0, sizeof *s);
    s->plan = plan;
    EPI_TRY(epi_cell_open(&s->groups, plan->groups, plan->nodes, plan->groups / plan->nodes,
                          plan->windows, call));
    ep_status status =
        epi_cell_open(&s->node, plan->experts / plan->nodes, plan->gpus / plan->nodes,
                      plan->gpu_slots, plan->windows, call);
    if (status == EP_OK)
        status = epi_change_open(&s->polish, plan);
    s->node.distinct = plan->policy != EP_PLAN_REFINE;
    s->weight = malloc((size_t)plan->windows * experts * sizeof *s->weight);
    s->gpu_load = malloc((size_t)plan->gpus * sizeof *s->gpu_load);
    s->members = malloc(experts * sizeof *s->members);
    s->count = malloc(experts * sizeof *s->count);
    s->row = malloc((size_t)plan->replicas * sizeof *s->row);
    if (status == EP_OK && (!s->weight || !s->gpu_load || !s->members || !s->count || !s->row))
        status = epi_fail(EP_ERR_MEMORY, "%s: no memory for %d experts, %d replicas", call,
                          plan->experts, plan->replicas);
    if (status != EP_OK)
        search_close(s);
    return status;
}

void epi_plan_weigh(const epi_plan *plan, const float *load, double *weight)
{
    double total = 0;
    for (int e = 0; e < plan->experts; e++)
        total += (double)load[e];
    double unit = total > 0 ? plan->gpus / total : 0;
    for (int e = 0; e < plan->experts; e++)
        weight[e] = (double)load[e] * unit;
}

static void deal_groups(search *s)
{
    const epi_plan *plan = s->plan;
    epi_cell *cell = &s->groups;
    int size = plan->experts / plan->groups;
    for (int w = 0; w < plan->windows; w++)
        for (int g = 0; g < plan->groups; g++) {
            double sum = 0;
            for (int i = 0; i < size; i++)
                sum += s->weight[w * plan->experts + g * size + i];
            cell->weight[w * plan->groups + g] = sum;
        }
    for (int g = 0; g < plan->groups; g++)
        cell->count[g] = 1;
    epi_cell_size_up(cell);
    epi_cell_fill(cell);
    epi_cell_swap(cell, SWAP_POWER);
}

/* With as many slots as experts or more, every GPU of the node holds them all. */
static void hold_all(epi_cell *cell)
{
    for (int slot = 0; slot < cell->gpus * cell->slots; slot++)
        cell->held[slot] = slot % cell->slots % cell->experts;
    epi_cell_measure(cell);
}

static void plan_node(search *s, int node, int32_t *row)
{
    const epi_plan *plan = s->plan;
    epi_cell *cell = &s->node;
    int size = plan->experts / plan->groups, n = 0;
    for (int k = 0; k < s->groups.slots; k++)
        for (int i = 0; i < size; i++)
            s->members[n++] = s->groups.held[node * s->groups.slots + k] * size + i;
    for (int w = 0; w < plan->windows; w++)
        for (int i = 0; i < n; i++)
            cell->weight[w * n + i] = s->weight[w * plan->experts + s->members[i]];
    epi_cell_size_up(cell);
    if (cell->slots >= n) {
        hold_all(cell);
    } else {
        epi_cell_count(cell);
        epi_cell_fill(cell);
        epi_cell_swap(cell, SWAP_POWER);
    }
    for (int slot = 0; slot < cell->gpus * cell->slots; slot++)
        row[slot] = s->members[cell->held[slot]];
}

/* Sum over windows of the largest GPU load of a layer, each relative to its mean. */
static double peak_of(search *s, const float *load, int layer, const int32_t *row)
{
    double sum = 0;
    for (int w = 0; w < s->plan->windows; w++) {
        epi_plan_add_up(s->plan, epi_plan_load(s->plan, load, w, layer), row, s->count,
                        s->gpu_load);
        sum += 1 / epi_plan_balance(s->gpu_load, s->plan->gpus);
    }
    return sum;
}

static void search_layer(search *s, const float *load, int layer, int32_t *phy2log)
{
    const epi_plan *plan = s->plan;
    int slots = plan->replicas / plan->nodes;
    for (int w = 0; w < plan->windows; w++)
        epi_plan_weigh(plan, epi_plan_load(plan, load, w, layer), s->weight + w * plan->experts);
    deal_groups(s);
    for (int node = 0; node < plan->nodes; node++)
        plan_node(s, node, s->row + node * slots);
    epi_change_start(&s->polish, load, layer, s->row);
    while (epi_change_step(&s->polish, INT_MAX))
        ;
    epi_change_write(&s->polish, s->row);
    if (plan->policy == EP_PLAN_REFINE &&
        peak_of(s, load, layer, phy2log) <= peak_of(s, load, layer, s->row))
        return;
    memcpy(phy2log, s->row, (size_t)plan->replicas * sizeof *phy2log);
}

ep_status epi_plan_search(const epi_plan *plan, const float *load, int32_t *phy2log)
{
    search s;
    if (plan->policy == EP_PLAN_REFINE)
        EPI_TRY(epi_plan_reference(plan, load, phy2log, NULL));
    EPI_TRY(search_open(&s, plan));
    for (int layer = 0; layer < plan->layers; layer++)
        search_layer(&s, load, layer, phy2log + epi_plan_row(plan, layer));
    search_close(&s);
    return EP_OK;
}
