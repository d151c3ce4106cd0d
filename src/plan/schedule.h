/* SPDX-License-Identifier: MIT */
/* Inside of a schedule, shared by generators, checker, simulator and executor. */
#ifndef EPI_PLAN_SCHEDULE_H
#define EPI_PLAN_SCHEDULE_H

#include "entrepot/schedule.h"

#include <stdbool.h>

/*
 * A place is rank * phases + phase. A lane is place * 2 + payload, taken at the
 * receiver: each has exactly one sender, so a lane is also a directed edge
 * between two stages, and its messages keep their order.
 */
struct ep_schedule {
    ep_schedule_shape shape;
    bool proven;     /* legal by construction */
    int32_t *stage;  /* [places] */
    int32_t *stream; /* [places] */
    int32_t *owner;  /* [streams][stages] place that holds it */
    size_t *first;   /* [ranks + 1] index of each rank's first operation */
    ep_schedule_op *ops;
};

/*
 * Collects the computations of one rank after another. Chunks of a phase come in
 * order, so an operation names only its phase. Chunks beyond the shape's are
 * dropped: a legal order stays legal without them.
 */
typedef struct epi_builder {
    ep_schedule_op *ops;
    size_t count, capacity;
    size_t deferred; /* where to look for the oldest I whose W is still due */
    int32_t chunks;
    int32_t forward[EP_SCHEDULE_MAX_PHASES], backward[EP_SCHEDULE_MAX_PHASES]; /* next chunk */
    ep_status status; /* of the first append that failed */
} epi_builder;

void epi_build_forward(epi_builder *builder, int phase);
void epi_build_backward(epi_builder *builder, int phase);
void epi_build_input_grad(epi_builder *builder, int phase);
/* W of the oldest I still without one; nothing when there is none. */
void epi_build_weight_grad(epi_builder *builder);
void epi_build_pair(epi_builder *builder, int forward_phase, int backward_phase);

/* One rank's computations of each method. */
void epi_schedule_1f1b(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank);
void epi_schedule_interleaved(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank);
void epi_schedule_zb1p(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank);
void epi_schedule_zbv(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank);
void epi_schedule_dualpipe(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank);
void epi_schedule_dualpipev(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank);

/* Replaces the computations of `schedule` by the same with sends and receives. */
ep_status epi_schedule_derive(ep_schedule *schedule);

/* The lane into which (place, payload) sends, or -1 at that end of the pipeline. */
int32_t epi_schedule_out_lane(const ep_schedule *schedule, int32_t place, int payload);

/* The place that feeds (place, payload), or -1 at that end of the pipeline. */
int32_t epi_schedule_in_place(const ep_schedule *schedule, int32_t place, int payload);

static inline int32_t epi_schedule_places(const ep_schedule *schedule)
{
    return schedule->shape.ranks * schedule->shape.phases;
}

static inline bool epi_op_is_forward(const ep_schedule_op *op)
{
    return op->kind == EP_OP_FORWARD || op->kind == EP_OP_PAIR;
}

/* B and I hand a gradient on; a pair does so for its back half. */
static inline bool epi_op_is_backward(const ep_schedule_op *op)
{
    return op->kind == EP_OP_BACKWARD || op->kind == EP_OP_INPUT_GRAD || op->kind == EP_OP_PAIR;
}

static inline int32_t epi_op_back_phase(const ep_schedule_op *op)
{
    return op->kind == EP_OP_PAIR ? op->back_phase : op->phase;
}

static inline int32_t epi_op_back_chunk(const ep_schedule_op *op)
{
    return op->kind == EP_OP_PAIR ? op->back_chunk : op->chunk;
}

/* Text of one operation, sends and receives included, for messages. */
#define EPI_OP_TEXT_MAX 64
void epi_op_text(const ep_schedule_op *op, char text[EPI_OP_TEXT_MAX]);

/* Copies a configuration whose caller may know a shorter form of it; the rest of
 * *into, set by the caller to the defaults, stays. Fails on a size of 0 or too large. */
ep_status epi_take_config(const char *call, const void *config, void *into, size_t size);

/*
 * Goes through the operations of all ranks in an order in which each finds what
 * it needs: one sender's message per receive, in order. A lane holds at most
 * `slots` messages in flight; 0 means any number.
 */
typedef struct epi_walk {
    const ep_schedule *schedule;
    int32_t slots;
    size_t *next;             /* [ranks] operation each rank has reached */
    int32_t *sent, *received; /* [lanes] */
    int32_t *ready;           /* [ranks] stack of ranks that may move */
    bool *waiting;            /* [ranks] not on the stack */
    int32_t ready_count;
    int32_t current; /* rank being walked, or -1 */
} epi_walk;

ep_status epi_walk_begin(epi_walk *walk, const ep_schedule *schedule, int32_t slots);
/* The next operation: its rank, its index among all operations and, for a send or
 * receive, its lane and number in the lane. False at the end or when all wait. */
bool epi_walk_next(epi_walk *walk, int32_t *rank, size_t *index, int32_t *lane, int32_t *number);
bool epi_walk_finished(const epi_walk *walk);
void epi_walk_end(epi_walk *walk);

#endif
