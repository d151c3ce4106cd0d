/* SPDX-License-Identifier: MIT */
/*
 * Planning: where the experts of a mixture-of-experts model live, and which of
 * an expert's replicas a token goes to.
 *
 * Each layer has E logical experts and P >= E physical slots, P / U on each of
 * U GPUs; GPU g owns slots g * P/U .. (g + 1) * P/U - 1, and node d owns GPUs
 * d * U/D .. (d + 1) * U/D - 1. A plan says which expert each slot holds. A
 * load is what was counted per expert (tokens, say) in one window of time; each
 * of an expert's c replicas carries 1/c of it.
 *
 * Balancedness of a layer is its mean GPU load over its largest, 1 at best; of
 * a plan, the mean over the layers that have any load (1 without one), and over
 * the windows.
 *
 * All functions are pure: arrays in, arrays out, no I/O, no clock, no state, the
 * same result on every run. All are safe from any thread. The caller owns every
 * array. On an error nothing is written except the last error.
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
    /** Searched: replicas swapped between GPUs and slots given to other experts while that helps;
     * never worse than the reference in any layer. */
    EP_PLAN_REFINE = 1,
    /** Like refine, and no GPU holds an expert twice unless a GPU has more slots than there are
     * experts to hold. */
    EP_PLAN_UNIQUE = 2,
    /** Like unique, for several windows: lowers the mean over windows of the largest GPU load,
     * each window's load taken relative to its mean. */
    EP_PLAN_WINDOWS = 3,
    /** Changes a current placement by at most max_moves moved replicas. */
    EP_PLAN_INCREMENTAL = 4,
} ep_plan_policy;

/** Policies are 0 .. EP_PLAN_POLICIES - 1. */
#define EP_PLAN_POLICIES 5

/** Name of a policy, such as "reference"; NULL for any other value. A static string. */
EP_API const char *ep_plan_policy_name(int32_t policy);

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
    int32_t gpus;      /**< U >= 1 */
    int32_t policy;    /**< an ep_plan_policy; EP_PLAN_REFERENCE by default */
    int32_t windows;   /**< W >= 1, load windows; 1 by default */
    int32_t max_moves; /**< >= 0, of EP_PLAN_INCREMENTAL, over all layers; 0 by default */
} ep_plan_config;

#define EP_PLAN_CONFIG_INIT                                               \
    {                                                                     \
        sizeof(ep_plan_config), 0, 0, 0, 1, 1, 0, EP_PLAN_REFERENCE, 1, 0 \
    }

/** What a plan is worth. */
typedef struct ep_plan_report {
    size_t size; /**< sizeof(ep_plan_report), set by the caller */
    /** Of `current`; without one, of E experts dealt to U GPUs in order, no replicas. */
    double balancedness_before;
    double balancedness; /**< of the plan */
    /** Replicas that some GPU must fetch: slots whose expert that GPU did not hold before. */
    int64_t moves;
    int64_t duplicates;             /**< slots whose expert the same GPU holds in an earlier slot */
    int64_t duplicates_unavoidable; /**< the least possible number of them */
} ep_plan_report;

/**
 * Plans every layer.
 *
 * load: float32 [W][L][E], finite and >= 0, each layer's total within float32;
 * policies other than windows and incremental plan for the sum of the windows.
 * current: int32 [L][P], the expert in each slot now; needed by
 * EP_PLAN_INCREMENTAL, else NULL or only for the report. phy2log: int32 [L][P],
 * written: the expert of each slot. phyrank: int32 [L][P] or NULL, written:
 * which of its expert's replicas the slot is, 0 .. count - 1. report: NULL, or
 * written up to its size.
 *
 * The incremental policy keeps each slot that it does not change. Where groups
 * are kept on nodes, so must they be in `current`.
 *
 * Errors: EP_ERR_ARGUMENT (names the field, its value and its range),
 * EP_ERR_MEMORY. Source of the reference method: the public EPLB, float32 throughout.
 */
EP_API ep_status ep_plan_eplb(const ep_plan_config *config, const float *load,
                              const int32_t *current, int32_t *phy2log, int32_t *phyrank,
                              ep_plan_report *report);

/**
 * Judges any placement, made here or elsewhere. load: float32 [W][L][E];
 * phy2log: int32 [L][P]; current: int32 [L][P] or NULL, as for ep_plan_eplb.
 * report: written up to its size. config.policy and config.max_moves are not used.
 *
 * Errors: EP_ERR_ARGUMENT, EP_ERR_MEMORY.
 */
EP_API ep_status ep_plan_judge(const ep_plan_config *config, const float *load,
                               const int32_t *current, const int32_t *phy2log,
                               ep_plan_report *report);

/**
 * GPU loads. load: float32 [W][L][E]; phy2log: int32 [L][P], or NULL for E
 * experts dealt to U GPUs in order. gpu_load: float64 [W][L][U], written.
 *
 * Errors: EP_ERR_ARGUMENT, EP_ERR_MEMORY.
 */
EP_API ep_status ep_plan_gpu_load(const ep_plan_config *config, const float *load,
                                  const int32_t *phy2log, double *gpu_load);

/** One replica to fetch. */
typedef struct ep_plan_move {
    int32_t layer;
    int32_t slot;   /**< where it goes */
    int32_t expert; /**< what it is */
    int32_t source; /**< a slot of the current placement that holds it, on the same node if any */
} ep_plan_move;

/**
 * The replicas to fetch to get from one placement to another, both int32 [L][P]:
 * every slot of `phy2log` whose expert its GPU does not hold in `current`.
 *
 * moves: [capacity] or NULL, the first `capacity` are written, in the order of
 * layers and slots. count: written, how many there are, so that a first call with
 * a capacity of 0 sizes the array. Errors: EP_ERR_ARGUMENT, EP_ERR_MEMORY.
 */
EP_API ep_status ep_plan_moves(const ep_plan_config *config, const int32_t *current,
                               const int32_t *phy2log, ep_plan_move *moves, int64_t capacity,
                               int64_t *count);

/**
 * The largest number of replicas that any expert of any layer has, the last
 * dimension that ep_plan_tables needs. phy2log: int32 [L][P].
 *
 * Errors: EP_ERR_ARGUMENT (a bad config, or an expert out of range or without a
 * slot), EP_ERR_MEMORY.
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

/** How a token's replica is chosen. */
typedef enum ep_plan_choice {
    /** By a hash of seed, token and expert: even in the long run, no memory. */
    EP_PLAN_HASH = 0,
    /** The replica whose GPU has the fewest tokens so far, those of experts with one replica
     * included; lower rank on ties. Tokens are taken in their order. */
    EP_PLAN_LEAST_LOADED = 1,
} ep_plan_choice;

/** One layer's replicas and how to choose. Initialise with EP_PLAN_ROUTER_INIT. */
typedef struct ep_plan_router {
    size_t size;            /**< sizeof(ep_plan_router); a smaller one leaves the rest at default */
    int32_t experts;        /**< E */
    int32_t replicas;       /**< P, a multiple of gpus */
    int32_t gpus;           /**< U */
    int32_t nodes;          /**< D, divides gpus; 1 by default */
    int32_t max_count;      /**< last dimension of log2phy */
    const int32_t *log2phy; /**< [E][max_count], of the layer */
    const int32_t *logcnt;  /**< [E], each 1 .. max_count */
    int32_t choice;         /**< an ep_plan_choice; EP_PLAN_HASH by default */
    /** The node that the tokens are on: its replicas are preferred. -1, the default: no preference.
     */
    int32_t node;
    uint64_t seed;        /**< of the hash */
    uint64_t first_token; /**< number of the call's first token in the hash, so that calls differ */
} ep_plan_router;

#define EP_PLAN_ROUTER_INIT                                                       \
    {                                                                             \
        sizeof(ep_plan_router), 0, 0, 0, 1, 0, NULL, NULL, EP_PLAN_HASH, -1, 0, 0 \
    }

/**
 * Turns logical expert ids into slots; the same arguments give the same slots on
 * every machine.
 *
 * topk_idx: [tokens][topk] of integers of topk_bytes (4 or 8), -1 for no expert.
 * physical: the same shape and type, written, -1 where topk_idx is -1; may be
 * topk_idx itself. gpu_tokens: int64 [U] or NULL, read by EP_PLAN_LEAST_LOADED as
 * what each GPU has already and increased in every mode, so that calls can follow
 * one another.
 *
 * Errors: EP_ERR_ARGUMENT (names token and position, or the router's field),
 * EP_ERR_MEMORY.
 */
EP_API ep_status ep_plan_route(const ep_plan_router *router, const void *topk_idx,
                               int32_t topk_bytes, int64_t tokens, int32_t topk, void *physical,
                               int64_t *gpu_tokens);

#ifdef __cplusplus
}
#endif
#endif
