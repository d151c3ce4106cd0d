/* SPDX-License-Identifier: MIT */
/*
 * Runs a pipeline schedule: calls the caller's forward and backward in the
 * schedule's order and moves activations and gradients between ranks.
 *
 *   ep_schedule_create(&schedule_config, &schedule);
 *   ep_pipeline_link_open(group, schedule, &config, &link);
 *   for (each step)
 *       ep_pipeline_run(schedule, rank, &config, &callbacks, &link);
 *   ep_pipeline_link_close(&link);
 */
#ifndef ENTREPOT_PIPELINE_H
#define ENTREPOT_PIPELINE_H

#include "entrepot/group.h"
#include "entrepot/schedule.h"

#ifdef __cplusplus
extern "C" {
#endif

/** One chunk's pass over one stage. */
typedef struct ep_pipeline_step {
    int32_t stage;  /**< 0 .. stages - 1 */
    int32_t stream; /**< 0 .. streams - 1 */
    int32_t chunk;  /**< within the stream */
    int32_t phase;  /**< which of the rank's stages it is */
} ep_pipeline_step;

/**
 * What a rank computes. Each returns EP_OK, or any other status to end the run.
 * Buffers belong to the run and are valid during the call only: what a backward
 * needs of the input, the forward must keep.
 *
 *   input        activation_bytes; NULL on stage 0, which has the data itself
 *   output       activation_bytes to fill; NULL on the last stage, which computes
 *                the loss instead
 *   output_grad  gradient_bytes; NULL on the last stage, which starts from the loss
 *   input_grad   gradient_bytes to fill; NULL on stage 0
 *
 * Members that the schedule does not need may be NULL.
 */
typedef struct ep_pipeline_callbacks {
    size_t size;   /**< sizeof(ep_pipeline_callbacks) */
    void *context; /**< passed to each */

    ep_status (*forward)(void *context, const ep_pipeline_step *step, const void *input,
                         void *output);

    /** B: the gradients for the input and for the weights. */
    ep_status (*backward)(void *context, const ep_pipeline_step *step, const void *output_grad,
                          void *input_grad);

    /** I: the gradient for the input; keeps what weight_grad needs of output_grad. */
    ep_status (*input_grad)(void *context, const ep_pipeline_step *step, const void *output_grad,
                            void *input_grad);

    /** W: the gradient for the weights, some time after input_grad of the same step. */
    ep_status (*weight_grad)(void *context, const ep_pipeline_step *step);

    /**
     * F&B: the forward of one step and the backward of another, which the caller
     * interleaves so that each hides the other's communication. NULL: forward,
     * then backward. As DualPipe's overlapped_forward_backward: module0 is the
     * stage of `forward`, inputs0 its input, criterion0 and labels0 what the last
     * stage has itself, outputs0 its output; module1 is the stage of `backward`,
     * output_grads1 its output_grad, loss1 and outputs1 what it kept.
     */
    ep_status (*overlapped_forward_backward)(void *context, const ep_pipeline_step *forward,
                                             const void *input, void *output,
                                             const ep_pipeline_step *backward,
                                             const void *output_grad, void *input_grad);
} ep_pipeline_callbacks;

typedef struct ep_pipeline_config {
    size_t size;              /**< sizeof(ep_pipeline_config) */
    int64_t activation_bytes; /**< between stages, for one chunk, 1..2^40 */
    int64_t gradient_bytes;   /**< 0: activation_bytes */
} ep_pipeline_config;

#define EP_PIPELINE_CONFIG_INIT          \
    {                                    \
        sizeof(ep_pipeline_config), 1, 0 \
    }

/**
 * How messages travel. `lane` counts from 0 to 2 * phases - 1 at the receiver:
 * twice the phase there, plus 1 for a gradient. A lane has one sender, and its
 * messages must keep their order. A send must not wait for the receiver's call
 * while the lane has room for `slots` of ep_schedule_check().
 */
typedef struct ep_pipeline_link {
    size_t size;   /**< sizeof(ep_pipeline_link) */
    void *context; /**< passed to both */
    ep_status (*send)(void *context, int32_t to, int32_t lane, const void *data, size_t bytes);
    ep_status (*recv)(void *context, int32_t from, int32_t lane, void *data, size_t bytes);

    /** Tells the other ranks that this one's run has failed; may be NULL. */
    void (*give_up)(void *context, ep_status why);
} ep_pipeline_link;

#define EP_PIPELINE_LINK_INIT                            \
    {                                                    \
        sizeof(ep_pipeline_link), NULL, NULL, NULL, NULL \
    }

/**
 * Runs one rank's part of the schedule once, from the first forward to the last
 * weight gradient. Every rank of the schedule must do so.
 *
 * @param link  may be NULL for a schedule of one rank
 * @return EP_ERR_ARGUMENT (names the member that is missing); EP_ERR_FORMAT when
 *         an assembled schedule is not legal; EP_ERR_MEMORY; what a callback or
 *         the link returned. Whatever ends a run is told to the other ranks by
 *         link->give_up, and the link is of no more use; without it they are left
 *         waiting, and their waits end as the link bounds them.
 */
EP_API ep_status ep_pipeline_run(const ep_schedule *schedule, int32_t rank,
                                 const ep_pipeline_config *config,
                                 const ep_pipeline_callbacks *callbacks,
                                 const ep_pipeline_link *link);

/**
 * Opens a link over a group's transport; collective. Rank r of the schedule is
 * rank r of the group, and both have the same number of ranks.
 *
 * A lane has one slot more than the schedule needs, so that a sender seldom
 * waits. The link's waits are bounded by the group's timeout and name the late
 * rank. When a run fails on one rank, runs of the others end at once with
 * EP_ERR_ABORTED, or EP_ERR_RANK_DEAD, and name the rank where it began; then
 * close the link on every rank and open another.
 *
 * @param link  filled in; close with ep_pipeline_link_close() before the group
 * @return EP_ERR_ARGUMENT, EP_ERR_MISMATCH (ranks have different schedules or
 *         sizes), EP_ERR_FORMAT, EP_ERR_MEMORY, EP_ERR_TIMEOUT, EP_ERR_RANK_DEAD.
 */
EP_API ep_status ep_pipeline_link_open(ep_group *group, const ep_schedule *schedule,
                                       const ep_pipeline_config *config, ep_pipeline_link *link);

/** Closes a link that ep_pipeline_link_open() filled in; one never opened is allowed. */
EP_API void ep_pipeline_link_close(ep_pipeline_link *link);

#ifdef __cplusplus
}
#endif
#endif
