/* SPDX-License-Identifier: MIT */
/*
 * Pipeline schedules as data.
 *
 * A schedule is one list of operations per rank: what the rank computes and
 * what it sends and receives, in order. Generators produce it, a checker proves
 * it, a simulator times it, and ep_pipeline_run() of <entrepot/pipeline.h> runs
 * it. Everything here is a pure function of its arguments: no I/O, no clock.
 *
 * Vocabulary
 *   stage   a contiguous part of the model; stage 0 reads the input, the last
 *           stage computes the loss
 *   phase   which of the stages a rank holds: 0 or, for methods that place
 *           several stages on a rank, up to phases - 1
 *   chunk   a micro-batch, numbered from 0 within its stream
 *   stream  an independent sequence of chunks. DualPipe feeds two, one from each
 *           end of the pipeline; every other method has one
 *
 * An activation is live on a rank from the start of the chunk's forward there to
 * the end of its weight gradient (of its backward, when that is not split).
 *
 * A schedule never changes once made; any number of threads may read it.
 */
#ifndef ENTREPOT_SCHEDULE_H
#define ENTREPOT_SCHEDULE_H

#include <stddef.h>
#include <stdint.h>

#include "entrepot/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Methods, with the page that describes each. */
typedef enum ep_schedule_method {
    /** One forward, one backward: PipeDream-Flush, Narayanan et al., ICML 2021. */
    EP_SCHEDULE_1F1B = 0,
    /** 1F1B over several stages a rank: Narayanan et al., SC 2021, section 2.2. */
    EP_SCHEDULE_INTERLEAVED = 1,
    /** ZB-H1, 1F1B with the weight gradient split off: Qi et al., ICLR 2024, section 2. */
    EP_SCHEDULE_ZB1P = 2,
    /** ZB-V, two stages a rank folded into a V: Qi et al., ICLR 2024, section 6. */
    EP_SCHEDULE_ZBV = 3,
    /** DualPipe, fed from both ends: DeepSeek-V3 technical report, section 3.2.1. */
    EP_SCHEDULE_DUALPIPE = 4,
    /** DualPipe cut in half, a V of 2R stages: Qi et al. (Sea AI Lab), 2025. */
    EP_SCHEDULE_DUALPIPEV = 5,
    /** Assembled by the caller from its own operations. */
    EP_SCHEDULE_CUSTOM = 6
} ep_schedule_method;

/** Methods that ep_schedule_create() generates: 0 .. EP_SCHEDULE_METHODS - 1. */
#define EP_SCHEDULE_METHODS 6

/** Bounds of a schedule's shape. */
#define EP_SCHEDULE_MAX_RANKS 4096
#define EP_SCHEDULE_MAX_CHUNKS 65536
#define EP_SCHEDULE_MAX_PHASES 64

/** Kinds of operation. */
typedef enum ep_op_kind {
    EP_OP_FORWARD = 0,     /**< F: forward of (phase, chunk) */
    EP_OP_BACKWARD = 1,    /**< B: both gradients of (phase, chunk) */
    EP_OP_INPUT_GRAD = 2,  /**< I: gradient for the input; its W follows later */
    EP_OP_WEIGHT_GRAD = 3, /**< W: gradient for the weights, deferred by an I */
    EP_OP_PAIR = 4,        /**< F&B: F of (phase, chunk) overlapped with B of the back pair */
    EP_OP_SEND = 5,        /**< hands a result of (phase, chunk) to `peer`; does not wait for it */
    EP_OP_RECV = 6         /**< waits for what (phase, chunk) needs from `peer` */
} ep_op_kind;

/** What a send or receive carries. */
typedef enum ep_op_payload {
    EP_PAYLOAD_ACTIVATION = 0, /**< to the next stage: the output of F */
    EP_PAYLOAD_GRADIENT = 1    /**< to the stage before: the result of B or I */
} ep_op_payload;

/** One operation. Fields that its kind does not use are zero. */
typedef struct ep_schedule_op {
    uint8_t kind;       /**< an ep_op_kind */
    uint8_t payload;    /**< EP_OP_SEND, EP_OP_RECV: an ep_op_payload */
    uint8_t phase;      /**< 0 .. phases - 1; of the forward in a pair */
    uint8_t back_phase; /**< EP_OP_PAIR: phase of the backward */
    int32_t chunk;      /**< 0 .. chunks - 1; of the forward in a pair */
    int32_t back_chunk; /**< EP_OP_PAIR: chunk of the backward */
    int32_t peer;       /**< EP_OP_SEND, EP_OP_RECV: the other rank */
} ep_schedule_op;

/** What to generate. */
typedef struct ep_schedule_config {
    size_t size;          /**< sizeof(ep_schedule_config) */
    int32_t method;       /**< an ep_schedule_method other than EP_SCHEDULE_CUSTOM */
    int32_t ranks;        /**< R, 1 .. EP_SCHEDULE_MAX_RANKS; DualPipe: even */
    int32_t chunks;       /**< C, micro-batches in all, 1 .. EP_SCHEDULE_MAX_CHUNKS;
                               interleaved: a multiple of R; DualPipe: even and >= 2R;
                               DualPipeV: >= 2R */
    int32_t model_chunks; /**< interleaved: stages a rank, 1 .. EP_SCHEDULE_MAX_PHASES;
                               0 means 2. Other methods: 0 */
} ep_schedule_config;

#define EP_SCHEDULE_CONFIG_INIT                               \
    {                                                         \
        sizeof(ep_schedule_config), EP_SCHEDULE_1F1B, 1, 1, 0 \
    }

/** The shape of a schedule. */
typedef struct ep_schedule_shape {
    int32_t method;  /**< an ep_schedule_method */
    int32_t ranks;   /**< R */
    int32_t phases;  /**< stages held by each rank */
    int32_t streams; /**< 2 for DualPipe, else 1 */
    int32_t stages;  /**< parts the model is cut into */
    int32_t chunks;  /**< chunks of each stream */
} ep_schedule_shape;

/** An immutable schedule. */
typedef struct ep_schedule ep_schedule;

/**
 * Short name of a method, as the command line spells it: "1f1b", "interleaved",
 * "zb1p", "zbv", "dualpipe", "dualpipev"; "custom"; "unknown" for any other
 * value. A static string. Safe from any thread.
 */
EP_API const char *ep_schedule_method_name(int32_t method);

/** The method of a name, in any case and with or without dashes; EP_ERR_ARGUMENT when unknown. */
EP_API ep_status ep_schedule_method_parse(const char *name, int32_t *method);

/**
 * Generates a schedule. Sends and receives are derived from the operations: a
 * result is sent right after the operation that makes it and received right
 * before the one that needs it; what stays on a rank is neither.
 *
 * The caller owns *schedule and frees it with ep_schedule_destroy().
 * Errors: EP_ERR_ARGUMENT (names the field, its value and range), EP_ERR_MEMORY.
 */
EP_API ep_status ep_schedule_create(const ep_schedule_config *config, ep_schedule **schedule);

/** Where the caller's own operations run: the shape and the place of each phase. */
typedef struct ep_schedule_layout {
    size_t size;           /**< sizeof(ep_schedule_layout) */
    int32_t ranks;         /**< as in ep_schedule_shape */
    int32_t phases;        /**< ranks * phases = streams * stages */
    int32_t streams;       /**< 1 or 2 */
    int32_t stages;        /**< >= 1 */
    int32_t chunks;        /**< of each stream */
    const int32_t *stage;  /**< [ranks][phases] stage held; each (stream, stage) exactly once */
    const int32_t *stream; /**< [ranks][phases] stream served; NULL: all 0 */
} ep_schedule_layout;

/**
 * Makes a schedule from the caller's operations: `ops` holds count[0] operations
 * of rank 0, then count[1] of rank 1, and so on. Both arrays are copied. With
 * `derive` non-zero they must hold no sends and receives, which are then added
 * as ep_schedule_create() does; otherwise they are taken as they stand.
 *
 * Only the range of each field is examined here; ep_schedule_check() proves the
 * rest. Errors: EP_ERR_ARGUMENT (names rank, position and field), EP_ERR_MEMORY.
 */
EP_API ep_status ep_schedule_assemble(const ep_schedule_layout *layout, const ep_schedule_op *ops,
                                      const size_t *count, int derive, ep_schedule **schedule);

/** Frees a schedule; NULL is allowed. */
EP_API void ep_schedule_destroy(ep_schedule *schedule);

/** Shape of a schedule. */
EP_API ep_status ep_schedule_get_shape(const ep_schedule *schedule, ep_schedule_shape *shape);

/** Stream and stage of a rank's phase. Either result may be NULL. */
EP_API ep_status ep_schedule_place(const ep_schedule *schedule, int32_t rank, int32_t phase,
                                   int32_t *stream, int32_t *stage);

/**
 * Operations of one rank: *ops points at *count of them and belongs to the
 * schedule. *first, when not NULL, is the index of the rank's first operation
 * among those of all ranks: arrays over all operations are laid out rank after
 * rank.
 */
EP_API ep_status ep_schedule_ops(const ep_schedule *schedule, int32_t rank,
                                 const ep_schedule_op **ops, size_t *count, size_t *first);

/**
 * Writes a rank's computations as text, such as "F0.0 (F0.1+B1.0) I1.1 W1.1"
 * with phase.chunk after each letter; sends and receives are left out.
 *
 * @param text      may be NULL with a capacity of 0, to ask for the size
 * @param capacity  bytes at `text`
 * @param needed    bytes the whole text takes with its final NUL; may be NULL
 * Errors: EP_ERR_ARGUMENT; EP_ERR_CAPACITY (what is at `text` is of no use).
 */
EP_API ep_status ep_schedule_format(const ep_schedule *schedule, int32_t rank, char *text,
                                    size_t capacity, size_t *needed);

/**
 * Proves a schedule:
 *   complete  every chunk has one F and either one B or one I and one W on every
 *             stage, in that order, each with what it needs at hand
 *   paired    every result that crosses ranks is sent once and received once, and
 *             between two stages in the same order at both ends
 *   W order   weight gradients leave in the order their I entered, first in first out
 *   deadlock  some order of all ranks' operations lets every one of them finish
 *
 * @param peak_activations  [ranks] most activations live at one time; may be NULL
 * @param slots  least number of messages that must fit in flight between two
 *               stages (in each direction) for the schedule to finish when a send
 *               waits for room; may be NULL
 * Errors: EP_ERR_FORMAT when the schedule is not legal (names the rank, the
 * operation and its position in the rank's list), EP_ERR_ARGUMENT, EP_ERR_MEMORY.
 */
EP_API ep_status ep_schedule_check(const ep_schedule *schedule, int32_t *peak_activations,
                                   int32_t *slots);

/** Durations of the operations of one stage, in any one unit of time. */
typedef struct ep_schedule_costs {
    size_t size;        /**< sizeof(ep_schedule_costs) */
    double forward;     /**< F */
    double backward;    /**< B, both gradients */
    double input_grad;  /**< I; negative: backward - weight_grad */
    double weight_grad; /**< W */
    double pair;        /**< F&B; negative: forward + backward */
    double comm;        /**< from the end of a send to the data's arrival */
} ep_schedule_costs;

#define EP_SCHEDULE_COSTS_INIT                                    \
    {                                                             \
        sizeof(ep_schedule_costs), 1.0, 2.0, -1.0, 1.0, -1.0, 0.0 \
    }

/**
 * Runs a schedule on a model of time: operations of a rank run one after
 * another, each as soon as what it receives has arrived; sends take no time of
 * the sender and messages do not slow one another.
 *
 * @param costs      `cost_count` of them, one for all ranks (1) or one per rank;
 *                   the sender's `comm` applies to a message
 * @param makespan   end of the last operation of any rank
 * @param bubble     [ranks] makespan less the time the rank computes; may be NULL
 * @param start,end  [operations of all ranks] when each begins and ends, laid out
 *                   as ep_schedule_ops() says; either may be NULL
 * Errors: EP_ERR_ARGUMENT; EP_ERR_FORMAT when an assembled schedule is not legal;
 * EP_ERR_MEMORY.
 */
EP_API ep_status ep_schedule_simulate(const ep_schedule *schedule, const ep_schedule_costs *costs,
                                      int32_t cost_count, double *makespan, double *bubble,
                                      double *start, double *end);

/** What to choose among. */
typedef struct ep_schedule_choose_config {
    size_t size;                    /**< sizeof(ep_schedule_choose_config) */
    int32_t ranks;                  /**< R */
    int32_t chunks;                 /**< C */
    int32_t model_chunks;           /**< of the interleaved candidate; 0 means 2 */
    const ep_schedule_costs *costs; /**< one, of 1/R of the model; NULL: the defaults. A method
                                   that cuts the model into S stages runs operations R/S as
                                   long; comm stays */
    double memory;                  /**< bound on a rank's memory; negative: none */
    double activation_memory;       /**< of one chunk's activations on 1/R of the model */
    double parameter_memory;        /**< of the parameters and their state on 1/R of the model */
} ep_schedule_choose_config;

#define EP_SCHEDULE_CHOOSE_CONFIG_INIT                                   \
    {                                                                    \
        sizeof(ep_schedule_choose_config), 1, 1, 0, NULL, -1.0, 1.0, 0.0 \
    }

/** How one method fares. */
typedef struct ep_schedule_candidate {
    int32_t method;  /**< an ep_schedule_method */
    int32_t allowed; /**< 0: R and C are outside the method's rules; the rest is zero */
    int32_t fits;    /**< 1: memory is within the bound */
    double makespan; /**< simulated */
    double bubble;   /**< largest of any rank */
    double memory;   /**< largest of any rank: activations and parameters */
} ep_schedule_candidate;

/**
 * Simulates every method and picks the shortest makespan among those that fit
 * the memory bound; ties go to the smaller memory, then to the lower method.
 *
 * @param candidates  [EP_SCHEDULE_METHODS] in the order of the methods; may be NULL
 * @param method      the pick
 * Errors: EP_ERR_ARGUMENT; EP_ERR_CAPACITY when no method fits (candidates are
 * still written); EP_ERR_MEMORY.
 */
EP_API ep_status ep_schedule_choose(const ep_schedule_choose_config *config,
                                    ep_schedule_candidate *candidates, int32_t *method);

#ifdef __cplusplus
}
#endif
#endif
