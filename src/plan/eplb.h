/* SPDX-License-Identifier: MIT */
/* Inside the expert placement: the checked shape, and the parts that policies share. */
#ifndef EPI_PLAN_EPLB_H
#define EPI_PLAN_EPLB_H

#include "entrepot/plan.h"

/* A checked configuration. Where groups are not kept on nodes, groups = nodes = 1. */
typedef struct epi_plan {
    int layers, experts, replicas, groups, nodes, gpus, policy;
    int gpu_slots; /* replicas / gpus */
} epi_plan;

/* Checks `config` and writes `plan`. */
ep_status epi_plan_check(const ep_plan_config *config, const char *call, epi_plan *plan);

/* Checks load [layers][experts]: finite, not negative, totals within float32. */
ep_status epi_plan_check_load(const epi_plan *plan, const char *call, const float *load);

/* Checks phy2log [layers][replicas]: experts in range, each with a slot; `name` is the argument's.
 * counts [experts] is scratch. */
ep_status epi_plan_check_placement(const epi_plan *plan, const char *call, const char *name,
                                   const int32_t *phy2log, int *counts);

/* --- the reference method's parts, float32, stable ties --- */

/* Descending order of weights >= 0, ties by index. keys: scratch [2 * n]. */
void epi_plan_order(const float *weight, int n, uint64_t *keys, int *order);

typedef struct epi_packer {
    int capacity;   /* the most items and packs */
    uint64_t *keys; /* [2 * capacity] */
    int *order;     /* [capacity] */
    int *held;      /* [capacity] items in each pack */
    float *sum;     /* [capacity] weight in each pack */
    uint64_t *tree; /* [4 * capacity] */
} epi_packer;

ep_status epi_packer_open(epi_packer *packer, int capacity, const char *call);
void epi_packer_close(epi_packer *packer);

/* Packs n items into m packs of n/m: pack [n] and rank in pack [n]. */
void epi_plan_pack(epi_packer *packer, const float *weight, int n, int m, int *pack, int *rank);

/* Gives n experts `slots` slots: expert and rank of each slot, count of each expert.
 * tree: scratch [4 * n]. share: [n], written, weight / count. */
void epi_plan_replicate(const float *weight, int n, int slots, uint64_t *tree, float *share,
                        int *expert, int *rank, int *count);

/* Plans one call with the reference method; phyrank may be NULL. */
ep_status epi_plan_reference(const epi_plan *plan, const float *load, int32_t *phy2log,
                             int32_t *phyrank);

#endif
