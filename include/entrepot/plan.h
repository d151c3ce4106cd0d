/* SPDX-License-Identifier: MIT */
/*
 * Planning: where the experts of a mixture-of-experts model live.
 *
 * Each layer has E logical experts and P >= E physical slots, P / U on each of
 * U GPUs; GPU g owns slots g * P/U .. (g + 1) * P/U - 1, and node d owns GPUs
 * d * U/D .. (d + 1) * U/D - 1. A plan says which expert each slot holds. A
 * load is what was counted per expert (tokens, say); the c replicas of an
 * expert each carry 1/c of it unless the plan carries shares.
 *
 * All functions are pure: arrays in, arrays out, no I/O, no clock, no state, the
 * same result on every run. All are safe from any thread. On an error nothing
 * is written except the last error.
 */
#ifndef ENTREPOT_PLAN_H
#define ENTREPOT_PLAN_H

#include "status.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/** How a placement is found; docs/planning.md says what each gives and costs. */
typedef enum ep_plan_policy {
    /** Bit for bit the public EPLB (github.com/deepseek-ai/EPLB) with a stable sort. */
    EP_PLAN_REFERENCE = 0,
} ep_plan_policy;

/** What to plan. Initialise with EP_PLAN_CONFIG_INIT, then set the fields. */
typedef struct ep_plan_config {
    size_t size;      /**< sizeof(ep_plan_config); a smaller one leaves the rest at default */
    int32_t layers;   /**< L >= 1 */
    int32_t experts;  /**< E >= 1, logical experts per layer */
    int32_t replicas; /**< P >= E, physical slots per layer, a multiple of gpus */
    int32_t groups;   /**< G, divides experts; 1 by default */
    /**
     * D, divides gpus; 1 by default. When it divides groups, all experts of a
     * group are kept on one node; otherwise groups and nodes are ignored, as
     * the public EPLB does.
     */
    int32_t nodes;
    int32_t gpus;   /**< U >= 1 */
    int32_t policy; /**< an ep_plan_policy */
} ep_plan_config;

#define EP_PLAN_CONFIG_INIT                                         \
    {                                                               \
        sizeof(ep_plan_config), 0, 0, 0, 1, 1, 0, EP_PLAN_REFERENCE \
    }

/**
 * Plans every layer.
 *
 * load: float32 [L][E], finite and >= 0, with a total per layer that float32
 * can hold. phy2log: int32 [L][P], written: the expert of each slot. phyrank:
 * int32 [L][P] or NULL, written: which of its expert's replicas the slot is,
 * 0 .. count - 1. The caller owns all arrays.
 *
 * Errors: EP_ERR_ARGUMENT (names the field, its value and its range),
 * EP_ERR_MEMORY. Source of the method: the public EPLB, in float32 throughout.
 */
EP_API ep_status ep_plan_eplb(const ep_plan_config *config, const float *load, int32_t *phy2log,
                              int32_t *phyrank);

/**
 * The largest number of replicas that any expert of any layer has, the last
 * dimension that ep_plan_tables needs. phy2log: int32 [L][P].
 *
 * Errors: EP_ERR_ARGUMENT (a bad config, or an expert out of range or without a slot),
 * EP_ERR_MEMORY.
 */
EP_API ep_status ep_plan_max_count(const ep_plan_config *config, const int32_t *phy2log,
                                   int32_t *max_count);

/**
 * The inverse of a placement. phy2log: int32 [L][P]. phyrank: int32 [L][P] as
 * ep_plan_eplb wrote it, or NULL for replicas in the order of their slots.
 * log2phy: int32 [L][E][max_count] or NULL, written: the slots of each expert by
 * rank, padded with -1. logcnt: int32 [L][E] or NULL, written: how many those are.
 *
 * Errors: EP_ERR_ARGUMENT (as ep_plan_max_count; max_count too small; ranks
 * that are not 0 .. count - 1 of each expert), EP_ERR_MEMORY.
 */
EP_API ep_status ep_plan_tables(const ep_plan_config *config, const int32_t *phy2log,
                                const int32_t *phyrank, int32_t max_count, int32_t *log2phy,
                                int32_t *logcnt);

#ifdef __cplusplus
}
#endif
#endif
