/* SPDX-License-Identifier: MIT */
/*
 * Low latency: dispatch and combine for decode, one to a few hundred tokens a
 * rank. No counts go ahead of the rows, memory is bounded by an agreed maximum
 * of tokens, and a call can return once it has sent, leaving the receiving to a
 * hook.
 *
 * Letters as in ep.h; M = agreed maximum of tokens per rank, S = rows that one
 * local expert has room for (R * M, or the bound that was set).
 */
#ifndef ENTREPOT_LOW_LATENCY_H
#define ENTREPOT_LOW_LATENCY_H

#include "entrepot/ep.h"

#ifdef __cplusplus
extern "C" {
#endif

/** How a call that was given an `event` goes on after it returned. */
typedef enum ep_completion {
    EP_COMPLETE_IN_BACKGROUND = 0, /**< on the buffer's worker, if it has one */
    EP_COMPLETE_BY_HOOK = 1        /**< the call has sent; ep_event_wait on the event is the hook
                                        that receives. Between the two no thread of ours runs. */
} ep_completion;

/** What happens where more rows arrive for a local expert than it has room for. */
typedef enum ep_overflow {
    EP_OVERFLOW_ERROR = 0, /**< EP_ERR_CAPACITY on every rank */
    EP_OVERFLOW_DROP = 1   /**< later rows in (source rank, token) order are dropped and counted;
                                combine leaves them out of the sum */
} ep_overflow;

typedef struct ep_ll_shape {
    size_t size;             /**< sizeof(ep_ll_shape) */
    int32_t num_ranks;       /**< R */
    int64_t max_tokens;      /**< M >= 1 */
    int64_t hidden;          /**< H, a multiple of 8 */
    int32_t topk;            /**< K */
    int64_t num_experts;     /**< E */
    int64_t max_expert_rows; /**< S; 0: R * M, which no routing exceeds */
    ep_dtype wire;           /**< EP_BF16 or EP_E4M3 */
    ep_scale scale;          /**< when wire is EP_E4M3 */
} ep_ll_shape;

#define EP_LL_SHAPE_INIT                                             \
    {                                                                \
        sizeof(ep_ll_shape), 1, 1, 0, 1, 1, 0, EP_BF16, EP_SCALE_F32 \
    }

typedef struct ep_ll_size {
    size_t size;          /**< sizeof(ep_ll_size), set by the caller */
    size_t window_bytes;  /**< memory that two live results can come to need of this rank's
                               window, worst routing */
    size_t private_bytes; /**< likewise outside the window */
    size_t address_bytes; /**< address space of both; more than the memory, since an expert's
                               room of S rows is backed only as far as rows arrive */
} ep_ll_size;

/** Exact sizes for two live results, computed locally. */
EP_API ep_status ep_ll_size_query(const ep_ll_shape *shape, ep_ll_size *size);

typedef struct ep_ll_dispatch_args {
    size_t size;                /**< sizeof(ep_ll_dispatch_args) */
    ep_tensor x;                /**< [T, H] BF16, T <= M */
    ep_tensor topk_idx;         /**< [T, K] I32 or I64; -1: no expert */
    int64_t max_tokens;         /**< M, the same on every rank */
    int64_t num_experts;        /**< E */
    const int32_t *expert_rank; /**< [E] or NULL, as in ep_dispatch_args */
    int64_t max_expert_rows;    /**< S; 0: R * M */
    ep_overflow overflow;
    ep_dtype wire;  /**< EP_BF16, or EP_E4M3: quantised per 128 channels */
    ep_scale scale; /**< when wire is EP_E4M3 */
    int32_t
        scales_by_column; /**< 1: scales in memory as [L, channels/128, S], seen through strides */
    ep_tensor expert_tokens;  /**< optional [L] I32: rows received are added (cumulative) */
    ep_tensor wait_cost;      /**< optional [R] I64: ns spent waiting for each source are added */
    ep_completion completion; /**< of a call with an event */
    ep_event *previous;
    void *stream;
    int32_t num_sms; /**< as in ep_dispatch_args */
} ep_ll_dispatch_args;

#define EP_LL_DISPATCH_ARGS_INIT                                                         \
    {                                                                                    \
        sizeof(ep_ll_dispatch_args), EP_TENSOR_NONE, EP_TENSOR_NONE, 1, 1, NULL, 0,      \
            EP_OVERFLOW_ERROR, EP_BF16, EP_SCALE_F32, 0, EP_TENSOR_NONE, EP_TENSOR_NONE, \
            EP_COMPLETE_IN_BACKGROUND, NULL, NULL, 0                                     \
    }

/**
 * A received batch, valid until ep_ll_recv_release(). Filled when the call
 * completes; with EP_COMPLETE_BY_HOOK already when it returns, so that tensors
 * can be made of it, while what they hold comes with the hook. Should that fail,
 * the result must be released all the same, though later calls need not wait for that; on
 * CUDA this holds for every completion. All S rows of an expert may be touched, though memory
 * is set aside only for those that arrive.
 */
typedef struct ep_ll_recv {
    size_t size;            /**< sizeof(ep_ll_recv), set by the caller */
    ep_tensor x;            /**< [L, S, H] BF16 or E4M3; the first count[l] rows of expert l hold
                                 tokens, in (source rank, token) order */
    ep_tensor scales;       /**< [L, S, ceil(H/128)] F32, or [L, S, ceil(H/512)] UE8M0X4 */
    ep_tensor count;        /**< [L] I32 */
    ep_tensor source_token; /**< [L, S] I32 token index at its source */
    ep_tensor source_range; /**< [L, R] I64: first row << 32 | rows, of each source rank */
    ep_tensor dropped;      /**< [L] I32 rows dropped, all 0 unless EP_OVERFLOW_DROP */
    ep_handle *handle;      /**< for ep_ll_combine; ends with the result */
    void *owner;            /**< private */
} ep_ll_recv;

#define EP_LL_RECV_INIT                                                                     \
    {                                                                                       \
        sizeof(ep_ll_recv), EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE, \
            EP_TENSOR_NONE, EP_TENSOR_NONE, NULL, NULL                                      \
    }

/**
 * Sends every (token, expert) pair as one row and receives this rank's. Two
 * results may be alive at once. They take turns with two places: a call needs
 * the place of the call before last, and while that result is alive it is
 * EP_ERR_STATE, also when the one in between was released.
 * An expert that a token names twice gets one row, to which combine applies both
 * weights; in verify mode it is EP_ERR_CORRUPT.
 * The first call with a shape (M, H, E, K, S, wire, scale) sets memory up and
 * so waits for every rank; later ones only for the rows.
 * On CUDA that memory is given back when a call has another shape or set of
 * masked ranks, and in ep_group_recover(), unless a graph has captured a call
 * that uses it: then it stays taken until the buffer is destroyed. Such a graph
 * can be replayed between calls of other shapes as before, by every rank at the
 * same place in the order of calls. It goes on with the masks of its capture: a
 * rank lost since then is waited for until the timeout, and the graph is best
 * captured anew.
 * Errors as ep_dispatch.
 */
EP_API ep_status ep_ll_dispatch(ep_buffer *buffer, const ep_ll_dispatch_args *args,
                                ep_ll_recv *recv, ep_event **event);

/** Declares a result unused: its memory serves the next call but one. */
EP_API void ep_ll_recv_release(ep_ll_recv *recv);

/**
 * Lets the next call but one use a result's memory, which yet stays mapped: its
 * tensors may be looked at and show rows of other calls by then. Combining it is
 * EP_ERR_STATE from now on; ep_ll_recv_release() is still due. For callers that
 * cannot tell when the last view of a result is gone. NULL is allowed.
 */
EP_API void ep_ll_recv_retire(ep_ll_recv *recv);

/** Wire format of combined rows. */
typedef enum ep_combine_wire {
    EP_COMBINE_BF16 = 0,
    EP_COMBINE_LOGFMT10 = 1 /**< 10 bits an element where a chunk's range allows it, else BF16 */
} ep_combine_wire;

typedef struct ep_ll_combine_args {
    size_t size;            /**< sizeof(ep_ll_combine_args) */
    ep_tensor y;            /**< [L, S, H] BF16 expert outputs, rows as received; the tensor of
                                 ep_ll_combine_buffer is read in place (zero copy) */
    ep_tensor topk_idx;     /**< [T, K] as in dispatch; checked against it in verify mode */
    ep_tensor topk_weights; /**< [T, K] F32 */
    ep_handle *handle;
    ep_combine_wire wire;
    ep_tensor out;       /**< [T, H] BF16, the caller's memory */
    ep_tensor wait_cost; /**< as in dispatch */
    ep_completion completion;
    ep_event *previous;
    void *stream;
    int32_t num_sms; /**< as in ep_dispatch_args */
} ep_ll_combine_args;

#define EP_LL_COMBINE_ARGS_INIT                                                               \
    {                                                                                         \
        sizeof(ep_ll_combine_args), EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE, NULL,     \
            EP_COMBINE_BF16, EP_TENSOR_NONE, EP_TENSOR_NONE, EP_COMPLETE_IN_BACKGROUND, NULL, \
            NULL, 0                                                                           \
    }

/** out[t] = sum over k of weight[t, k] * row of (t, k), float32 fused multiply-add in top-k order.
 */
EP_API ep_status ep_ll_combine(ep_buffer *buffer, const ep_ll_combine_args *args, ep_event **event);

/** The [L, S, H] BF16 send buffer of a result: expert outputs written there are combined without a
    copy. It lives as long as the result. On CUDA EP_COMBINE_LOGFMT10 encodes them where they lie:
    for another combine they must be written anew. */
EP_API ep_status ep_ll_combine_buffer(ep_buffer *buffer, ep_handle *handle, ep_tensor *y);

#ifdef __cplusplus
}
#endif
#endif
