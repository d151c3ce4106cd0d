/* SPDX-License-Identifier: MIT */
/* Inside the expert placement: the checked shape, and the parts that policies share. */
#ifndef EPI_PLAN_EPLB_H
#define EPI_PLAN_EPLB_H

#include "entrepot/plan.h"

/* A checked configuration. Where groups are not kept on nodes, groups = nodes = 1. */
typedef struct epi_plan {
    int layers, experts, replicas, groups, nodes, gpus;
    int policy, windows, max_moves;
    int gpu_slots;      /* replicas / gpus */
    int physical_nodes; /* as configured */
} epi_plan;

/* Checks `config` and writes `plan`. */
ep_status epi_plan_check(const ep_plan_config *config, const char *call, epi_plan *plan);

/* Checks load [windows][layers][experts]: finite, not negative, totals within float32. */
ep_status epi_plan_check_load(const epi_plan *plan, const char *call, const float *load);

/* Checks phy2log [layers][replicas], the argument `name`: experts in range, each with a slot. */
ep_status epi_plan_check_placement(const epi_plan *plan, const char *call, const char *name,
                                   const int32_t *phy2log);

/* One layer's part of an array. */
static inline const float *epi_plan_load(const epi_plan *plan, const float *load, int window,
                                         int layer)
{
    return load + ((size_t)window * (size_t)plan->layers + (size_t)layer) * (size_t)plan->experts;
}

static inline size_t epi_plan_row(const epi_plan *plan, int layer)
{
    return (size_t)layer * (size_t)plan->replicas;
}

/* GPU loads [gpus] of one layer in one window; count [experts] is scratch. */
void epi_plan_add_up(const epi_plan *plan, const float *load, const int32_t *phy2log, int *count,
                     double *gpu_load);

/* mean / max of n loads; 1 when all are 0. */
double epi_plan_balance(const double *gpu_load, int n);

/* Whether GPU g of a layer's row holds the expert in one of its first `slots` slots. */
static inline int epi_plan_holds(const epi_plan *plan, const int32_t *row, int g, int expert,
                                 int slots)
{
    for (int s = g * plan->gpu_slots; s < g * plan->gpu_slots + slots; s++)
        if (row[s] == expert)
            return 1;
    return 0;
}

/* Checks a report's size. */
ep_status epi_plan_check_report(const char *call, const ep_plan_report *report);

/* Fills a report, whose arguments have been checked. */
ep_status epi_plan_report(const epi_plan *plan, const char *call, const float *load,
                          const int32_t *current, const int32_t *phy2log, ep_plan_report *report);

/* --- the reference method's parts, float32, stable ties --- */

/* Descending order of weights >= 0, ties by index. keys: scratch [2 * n]. */
void epi_plan_order(const float *weight, int n, uint64_t *keys, int *order);

typedef struct epi_packer {
    uint64_t *keys; /* [2 * capacity] */
    uint64_t *tree; /* [4 * capacity] */
    int *order;     /* [capacity] */
    int *held;      /* [capacity] items in each pack */
    float *sum;     /* [capacity] weight in each pack */
} epi_packer;

/* capacity: the most items and packs. */
ep_status epi_packer_open(epi_packer *packer, int capacity);
void epi_packer_close(epi_packer *packer);

/* Packs n items into m packs of n/m: pack [n] and rank in pack [n]. */
void epi_plan_pack(epi_packer *packer, const float *weight, int n, int m, int *pack, int *rank);

/* Gives n experts `slots` slots: expert and rank of each slot, count of each expert.
 * tree: scratch [4 * n]. share: [n], written, weight / count. */
void epi_plan_replicate(const float *weight, int n, int slots, uint64_t *tree, float *share,
                        int *expert, int *rank, int *count);

/* --- the policies; load [layers][experts], or [windows][layers][experts] where several are
 * planned for --- */

/* phyrank may be NULL. */
ep_status epi_plan_reference(const epi_plan *plan, const float *load, int32_t *phy2log,
                             int32_t *phyrank);

/* Weights [experts] of one layer in one window, in units of its mean GPU load; 0 without a load. */
void epi_plan_weigh(const epi_plan *plan, const float *load, double *weight);

/* The searching policies: refine, unique, windows. */
ep_status epi_plan_search(const epi_plan *plan, const float *load, int32_t *phy2log);

/* Changes at most plan->max_moves replicas; phy2log gets the new placement. */
ep_status epi_plan_incremental(const epi_plan *plan, const float *load, const int32_t *current,
                               int32_t *phy2log);

#endif
