/* SPDX-License-Identifier: MIT */
/*
 * Expert-parallel communication: buffers, layout, and the normal mode of
 * dispatch and combine (training and prefill: thousands of tokens, bandwidth).
 *
 * Letters used below: R ranks, T tokens on this rank, H hidden (elements of a
 * row), K = top-k, E experts, L = experts of this rank, N = rows received.
 *
 * Every call on a buffer is collective: each rank of the group makes the same
 * calls in the same order. A call that this rank rejects for its arguments is
 * its part of the collective; the other ranks get EP_ERR_ABORTED with its
 * message rather than wait. A buffer may be used by one thread at a time;
 * different buffers, also of one group, may be used by different threads.
 *
 * Method: DeepSeek-V3 technical report (arXiv:2412.19437) section 3.2.2, with
 * rows written straight to their final place at the receiver.
 */
#ifndef ENTREPOT_EP_H
#define ENTREPOT_EP_H

#include "entrepot/codec.h"
#include "entrepot/event.h"
#include "entrepot/group.h"
#include "entrepot/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ep_buffer ep_buffer;
typedef struct ep_handle ep_handle;

/* ---------------------------------------------------------------- buffer */

typedef struct ep_buffer_config {
    size_t size;             /**< sizeof(ep_buffer_config) */
    size_t window_bytes;     /**< bytes of this rank's window backed by memory at creation;
                                  0: none, memory comes when counts demand it. On CUDA (0: 64 MiB)
                                  only a dispatch that waits for its counts makes the window grow,
                                  also for the calls that may follow it; for num_worst_tokens and
                                  captured graphs this must suffice. */
    size_t window_max_bytes; /**< bound on the window's growth, the same on every rank;
                                  0: 64 GiB of address space. On CUDA, where handles and scratch are
                                  in device memory too, they count but are not refused for it. */
    int32_t num_threads;     /**< threads this rank's calls may use beside the caller's, 0..256.
                                  0: the caller's thread only, asynchronous calls then proceed
                                  inside ep_event_wait and ep_event_query. With n >= 1 one worker
                                  runs asynchronous calls and n - 1 help it copy. */
    int32_t max_experts;     /**< largest num_experts of later calls, 1..65536; 0: 1024. The
                                  same on every rank; costs address space, not memory. */
    int32_t verify;          /**< 1: verify mode, see ep_dispatch. The same on every rank. */
    ep_device_type device;   /**< where tensors live; the same on every rank */
    int32_t device_index;    /**< which accelerator; ignored for EP_DEVICE_CPU */
} ep_buffer_config;

#define EP_BUFFER_CONFIG_INIT                                     \
    {                                                             \
        sizeof(ep_buffer_config), 0, 0, 0, 0, 0, EP_DEVICE_CPU, 0 \
    }

/**
 * Makes a buffer: this rank's window for received rows, and its view of the
 * peers' windows. Collective. The group must outlive it.
 *
 * @param config  NULL means EP_BUFFER_CONFIG_INIT; read during the call only
 * @return EP_ERR_ARGUMENT, EP_ERR_MISMATCH, EP_ERR_MEMORY, EP_ERR_TIMEOUT, EP_ERR_SYSTEM,
 *         EP_ERR_UNSUPPORTED (device)
 */
EP_API ep_status ep_buffer_create(ep_group *group, const ep_buffer_config *config,
                                  ep_buffer **buffer);

/**
 * Frees a buffer and its window. Waits for this rank's unfinished asynchronous
 * calls, and after low-latency calls for peers that still read from the window;
 * for a peer that does not come on, at most the group's timeout. Views of the window end here;
 * handles and events made from the buffer must have been released before. NULL is allowed.
 */
EP_API void ep_buffer_destroy(ep_buffer *buffer);

/** Group the buffer was made on. */
EP_API ep_group *ep_buffer_group(const ep_buffer *buffer);

/**
 * Takes `bytes` of this rank's window for the caller, aligned to 256 bytes:
 * expert outputs placed there are read by combine without a copy. Local; the
 * window grows if it must. Contents are undefined. EP_ERR_MEMORY when the bound
 * or the machine's memory is reached.
 */
EP_API ep_status ep_buffer_alloc(ep_buffer *buffer, size_t bytes, void **memory);
/** Gives memory of ep_buffer_alloc back. NULL is allowed; other pointers are EP_ERR_ARGUMENT. */
EP_API ep_status ep_buffer_free(ep_buffer *buffer, void *memory);

typedef struct ep_buffer_info {
    size_t size;          /**< sizeof(ep_buffer_info), set by the caller */
    size_t window_bytes;  /**< backed by memory now */
    size_t control_bytes; /**< of them, for notifications and counts */
    size_t used_bytes;    /**< of them, held by live results, handles and ep_buffer_alloc */
    size_t peak_bytes;    /**< largest used_bytes + control_bytes so far */
    uint64_t num_calls;   /**< collective calls made so far */
} ep_buffer_info;

/** Fills `info` up to its size. Local. */
EP_API ep_status ep_buffer_query(const ep_buffer *buffer, ep_buffer_info *info);

/* --------------------------------------------------------------- refusal */

/** The collective calls of a buffer. */
typedef enum ep_call {
    EP_CALL_DISPATCH = 0,
    EP_CALL_COMBINE = 1,
    EP_CALL_DISPATCH_BACKWARD = 2,
    EP_CALL_COMBINE_BACKWARD = 3,
    EP_CALL_LL_DISPATCH = 4,
    EP_CALL_LL_COMBINE = 5
} ep_call;

/**
 * This rank's part of the next collective call, for a caller that can't make it: its tensors are
 * not what a call takes, or memory for them has run out. The other ranks' call fails with
 * EP_ERR_ABORTED and the reason, as if this rank had made the call with bad arguments; without it
 * they would wait for the timeout. Does not wait for them; one that is more than seven calls
 * behind by then finds only that this rank gave up.
 *
 * @param call    which one the others make
 * @param reason  told to them; copied, cut to 400 bytes
 * @return EP_OK, or EP_ERR_ARGUMENT, and then nothing was refused
 */
EP_API ep_status ep_buffer_refuse(ep_buffer *buffer, ep_call call, const char *reason);

/* ------------------------------------------------------------- diagnosis */

/**
 * Time this rank's calls on the buffer have spent waiting for each rank, all
 * calls of both modes since the last reset: who is late. Local. Calls on an accelerator are
 * not counted here: there wait_cost of a low-latency call tells.
 *
 * @param ns     [R] nanoseconds
 * @param reset  not 0: counting starts anew
 */
EP_API ep_status ep_buffer_wait_cost(ep_buffer *buffer, int64_t *ns, int32_t reset);

/**
 * The wait costs of all ranks; collective among those not masked.
 *
 * @param ns     [R * R] nanoseconds that rank i waited for rank j at [i * R + j]; rows of masked
 *               ranks are 0
 * @param reset  as above, on this rank
 * @return errors of ep_group_allgather
 */
EP_API ep_status ep_buffer_wait_matrix(ep_buffer *buffer, int64_t *ns, int32_t reset);

/** One phase of one call of one rank: work of its own, or a wait for peers. */
typedef struct ep_trace_event {
    size_t size; /**< sizeof(ep_trace_event) of the library */
    int32_t rank;
    uint64_t call;     /**< its number on the buffer, the same on every rank */
    const char *name;  /**< of the call, "ep_dispatch"; static, as the next */
    const char *phase; /**< "send", "wait for rows" and the like */
    int64_t begin_ns;  /**< on the monotonic clock of the machine */
    int64_t end_ns;
} ep_trace_event;

/** Called by whichever thread runs the call, in the midst of it: it should only take a note. */
typedef void (*ep_trace_fn)(void *context, const ep_trace_event *event);

/** Has `trace` called after every phase of this rank's calls; NULL ends that. To be called while no
    call of the buffer is under way. */
EP_API ep_status ep_buffer_set_trace(ep_buffer *buffer, ep_trace_fn trace, void *context);

/* ------------------------------------------------------------ capacities */

/** Wire format of dispatched rows. */
typedef enum ep_wire {
    EP_WIRE_INPUT = 0, /**< rows travel as given */
    EP_WIRE_FP8 = 1    /**< BF16, F16 or F32 rows are quantised to E4M3 while they are sent */
} ep_wire;

/** Order of received rows. */
typedef enum ep_row_layout {
    EP_ROWS_BY_TOKEN = 0, /**< one row per (token, rank): source rank ascending, then token */
    EP_ROWS_BY_EXPERT = 1 /**< one row per (token, local expert), grouped by expert; within one
                               by source rank, then token; groups padded to the alignment */
} ep_row_layout;

/** What a size query wants to know of the calls to come. */
typedef struct ep_normal_shape {
    size_t size;         /**< sizeof(ep_normal_shape) */
    int32_t num_ranks;   /**< R */
    int64_t num_tokens;  /**< T, the largest of any rank */
    int64_t hidden;      /**< H */
    int32_t topk;        /**< K */
    int64_t num_experts; /**< E */
    int64_t max_experts; /**< of the buffer; 0: its default */
    ep_dtype dtype;      /**< of the rows on the wire */
    ep_scale scale;      /**< when dtype is EP_E4M3 */
    ep_row_layout layout;
    int32_t expert_alignment;
    int32_t topk_bytes; /**< 4 or 8: bytes of one top-k id */
} ep_normal_shape;

#define EP_NORMAL_SHAPE_INIT                                                                     \
    {                                                                                            \
        sizeof(ep_normal_shape), 1, 0, 0, 1, 1, 0, EP_BF16, EP_SCALE_F32, EP_ROWS_BY_TOKEN, 1, 8 \
    }

typedef struct ep_normal_size {
    size_t size;           /**< sizeof(ep_normal_size), set by the caller */
    size_t control_bytes;  /**< notifications and counts, whatever the routing */
    size_t row_bytes;      /**< one received row with everything that travels along */
    size_t expected_bytes; /**< window for one live result when routing is uniform */
    size_t worst_bytes;    /**< window for one live result whatever the routing */
} ep_normal_size;

/** Exact sizes, computed locally; a window of worst_bytes per live result never grows. */
EP_API ep_status ep_normal_size_query(const ep_normal_shape *shape, ep_normal_size *size);

/* ---------------------------------------------------------------- layout */

/**
 * Counts where this rank's tokens go. Local, no buffer needed.
 *
 * @param topk_idx     [T, K] I32 or I64, any row stride, unit column stride; -1 means no expert
 * @param num_experts  E; ids are in -1..E-1
 * @param expert_rank  [E] rank of each expert, or NULL for equal blocks (E % R == 0)
 * @param num_ranks    R
 * @param ranks_per_node  consecutive ranks of one node, divides R
 * Outputs, each may be NULL; caller's memory:
 * @param tokens_per_rank    [R] tokens with at least one expert there, each counted once
 * @param tokens_per_node    [R / ranks_per_node] likewise per node
 * @param tokens_per_expert  [E]
 * @param token_in_rank      [T * R] 1 where the token goes to the rank, else 0
 * @return EP_ERR_ARGUMENT naming the argument, its value and range; outputs are then unwritten
 */
EP_API ep_status ep_layout(const ep_tensor *topk_idx, int64_t num_experts,
                           const int32_t *expert_rank, int32_t num_ranks, int32_t ranks_per_node,
                           int32_t *tokens_per_rank, int32_t *tokens_per_node,
                           int32_t *tokens_per_expert, uint8_t *token_in_rank);

/**
 * ep_layout() of ids on an accelerator, by one kernel in `stream`, without waiting for it.
 * `expert_rank` and the outputs are memory of that device. Nobody can be told of an id or a rank
 * out of range there: it counts nowhere, and the dispatch of such ids refuses them.
 */
EP_API ep_status ep_layout_on_stream(const ep_tensor *topk_idx, int64_t num_experts,
                                     const int32_t *expert_rank, int32_t num_ranks,
                                     int32_t ranks_per_node, int32_t *tokens_per_rank,
                                     int32_t *tokens_per_node, int32_t *tokens_per_expert,
                                     uint8_t *token_in_rank, void *stream);

/* -------------------------------------------------------------- dispatch */

/** Memory for results that shall outlive the window: called by the rank's own threads. */
typedef struct ep_allocator {
    void *(*alloc)(void *context, size_t bytes); /**< 64-byte aligned memory, or NULL */
    void (*free)(void *context, void *memory);   /**< called by ep_recv_release and on errors */
    void *context;
} ep_allocator;

typedef struct ep_dispatch_args {
    size_t size;                /**< sizeof(ep_dispatch_args) */
    ep_tensor x;                /**< [T, H] BF16, F16, F32 or E4M3; H % 8 == 0; unit column
                                     stride, any row stride */
    ep_tensor scales;           /**< of an E4M3 x: F32 [T, ceil(H/128)] or UE8M0X4
                                     [T, ceil(H/512)], any strides */
    ep_tensor topk_idx;         /**< [T, K] I32 or I64; not given in cached mode */
    ep_tensor topk_weights;     /**< [T, K] F32, optional */
    int64_t num_experts;        /**< E, 1..max_experts of the buffer */
    const int32_t *expert_rank; /**< [E] rank of each expert, the same on every rank; NULL:
                                     equal blocks, then E % R == 0 */
    ep_wire wire;
    ep_scale scale; /**< form of the scales when wire is EP_WIRE_FP8 */
    ep_row_layout layout;
    int32_t expert_alignment;      /**< >= 1; tokens_per_expert is rounded up to it, and with
                                        EP_ROWS_BY_EXPERT the groups too */
    int64_t num_worst_tokens;      /**< 0, or a bound on N: results then have exactly that many
                                        rows, and more arriving is EP_ERR_CAPACITY on all ranks */
    ep_handle *handle;             /**< cached mode: reuse this layout; topk_idx, topk_weights,
                                        num_experts, expert_rank, layout, expert_alignment and
                                        num_worst_tokens come from it and must be left unset */
    const ep_allocator *allocator; /**< NULL: results are views of the window. Else they are
                                        copied out of it once, into memory of the allocator,
                                        which must outlive the result. */
    ep_event *previous;            /**< done before the call touches any tensor; may be NULL */
    void *stream;                  /**< of the device; must be NULL on the CPU */
    int32_t num_sms; /**< multiprocessors the call may use; 0: the default, at most 16. Ignored on
                          the CPU, where num_threads of the buffer rules. */
} ep_dispatch_args;

#define EP_DISPATCH_ARGS_INIT                                                                     \
    {                                                                                             \
        sizeof(ep_dispatch_args), EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE, \
            0, NULL, EP_WIRE_INPUT, EP_SCALE_F32, EP_ROWS_BY_TOKEN, 1, 0, NULL, NULL, NULL, NULL, \
            0                                                                                     \
    }

/**
 * What a rank received. Filled when the call completes; valid until
 * ep_recv_release(), or until the buffer is destroyed when nothing was copied
 * to an allocator. Tensors are not given where they do not apply.
 * "rows" is N, or num_worst_tokens in worst-case mode, or with
 * EP_ROWS_BY_EXPERT the sum of the padded groups.
 */
typedef struct ep_recv {
    size_t size;                 /**< sizeof(ep_recv), set by the caller */
    ep_tensor x;                 /**< [rows, H], dtype of the wire */
    ep_tensor scales;            /**< [rows, ceil(H/128)] F32 or [rows, ceil(H/512)] UE8M0X4 */
    ep_tensor topk_idx;          /**< [rows, K] of the input's dtype: local expert ids, -1 where the
                                      expert is elsewhere. EP_ROWS_BY_EXPERT: [rows, 1] local id,
                                      -1 in padding. Local ids count a rank's experts in
                                      ascending global id. */
    ep_tensor topk_weights;      /**< [rows, K] (or [rows, 1]) F32, 0 where topk_idx is -1 */
    ep_tensor source_token;      /**< [rows] I32 index of the token at its source; -1 in padding */
    ep_tensor source_offset;     /**< [R + 1] I32: rows source_offset[s] .. source_offset[s+1]-1
                                      came from rank s. Not given with EP_ROWS_BY_EXPERT. */
    ep_tensor expert_offset;     /**< [L + 1] I32, EP_ROWS_BY_EXPERT: first row of each group */
    ep_tensor tokens_per_expert; /**< [L] I32, each rounded up to expert_alignment */
    int64_t num_rows;            /**< rows that hold a token; N. -1 when the host does not know
                                      (accelerators: worst case; ep_handle_query tells) */
    ep_handle *handle;           /**< for combine, cached dispatch and backward; release it with
                                      ep_handle_release(). NULL in cached mode: the caller has it */
    void *owner;                 /**< of the memory; private */
    const int32_t *host_tokens_per_expert; /**< [L] tokens_per_expert where the host can read it;
                                      NULL when the call did not wait for it (accelerators: worst
                                      case and cached mode) */
} ep_recv;

#define EP_RECV_INIT                                                                            \
    {                                                                                           \
        sizeof(ep_recv), EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE,        \
            EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE, 0, NULL, NULL, NULL \
    }

/**
 * Sends each token's row to the ranks that own its experts and receives the
 * rows of this rank's experts, in an order that does not depend on timing.
 * Received rows are written once, by their sender, to where they stay.
 *
 * @param event  NULL: the call blocks until done. Else it returns after checking
 *               its arguments, and *event completes it (ep_event_wait): inputs
 *               must stay unchanged and `recv` in place until then.
 * @return EP_ERR_ARGUMENT  a bad argument of this rank; no memory was written
 *         EP_ERR_MISMATCH  ranks disagree (names argument, ranks, values), on all ranks
 *         EP_ERR_CAPACITY  num_worst_tokens or the window's bound too small somewhere, on all
 *                          ranks, before any row moved
 *         EP_ERR_TIMEOUT, EP_ERR_RANK_DEAD, EP_ERR_ABORTED  names the ranks
 *         EP_ERR_CORRUPT   verify mode: a row's checksum, source or order is wrong, or a row of
 *                          topk_idx names an expert twice
 *         EP_ERR_MEMORY
 * After an error the buffer stays usable by the ranks that got it.
 */
EP_API ep_status ep_dispatch(ep_buffer *buffer, const ep_dispatch_args *args, ep_recv *recv,
                             ep_event **event);

/** Gives a result's memory back; its handle lives on. Sets `recv` to EP_RECV_INIT, handle kept. */
EP_API void ep_recv_release(ep_recv *recv);

/* ---------------------------------------------------------------- handle */

/** What a dispatch settled, for callers that look inside. Pointers live as long as the handle. */
typedef struct ep_handle_info {
    size_t size;               /**< sizeof(ep_handle_info), set by the caller */
    int32_t num_ranks;         /**< R */
    int32_t topk;              /**< K */
    int64_t num_tokens;        /**< T at this rank */
    int64_t num_rows;          /**< N at this rank */
    int64_t hidden;            /**< H of the call that made it */
    int64_t num_experts;       /**< E */
    int32_t num_local_experts; /**< L */
    ep_row_layout layout;
    const int32_t *rows_between; /**< [R * R] rows that rank i sent to rank j at [i * R + j] */
    const int32_t *send_rank;    /**< [T * K] where this rank's rows went, -1: nowhere.
                                    EP_ROWS_BY_TOKEN:    each token's ranks ascending, then -1;
                                    EP_ROWS_BY_EXPERT: by    top-k place */
    const int32_t *send_row;     /**< [T * K] the row there, beside send_rank */
    const int32_t *source_token; /**< [rows] as in ep_recv */
} ep_handle_info;

/** Fills `info` up to its size. Safe from any thread while the handle is held. */
EP_API ep_status ep_handle_query(const ep_handle *handle, ep_handle_info *info);
/** Drops a handle. Events still running keep what they need of it. NULL is allowed. */
EP_API void ep_handle_release(ep_handle *handle);

/* --------------------------------------------------------------- combine */

typedef struct ep_combine_args {
    size_t size;            /**< sizeof(ep_combine_args) */
    ep_tensor y;            /**< [rows, H] BF16, F16 or F32: expert outputs, rows as received.
                                 In window memory (ep_recv.x or ep_buffer_alloc) peers read them in
                                 place; elsewhere they read them from this process where the system
                                 allows it, else they are copied to the window first. */
    ep_tensor topk_weights; /**< optional. EP_ROWS_BY_TOKEN: [rows, K] F32 at the expert side,
                               summed along over ranks. EP_ROWS_BY_EXPERT: [T, K] F32 at the token's
                                 rank, applied to its rows; not given: those of dispatch, or 1 */
    ep_tensor bias[2];      /**< optional [T, H] of y's dtype, added in float32 after the rows */
    ep_handle *handle;      /**< of the dispatch whose rows these are */
    ep_tensor out;          /**< [T, H] of y's dtype, unit column stride: the caller's memory */
    ep_tensor out_weights;  /**< [T, K] F32 where topk_weights is summed along; else not given */
    ep_event *previous;     /**< done before the call touches any tensor; may be NULL */
    void *stream;
    int32_t num_sms; /**< as in ep_dispatch_args */
} ep_combine_args;

#define EP_COMBINE_ARGS_INIT                                                                       \
    {                                                                                              \
        sizeof(ep_combine_args), EP_TENSOR_NONE, EP_TENSOR_NONE, {EP_TENSOR_NONE, EP_TENSOR_NONE}, \
            NULL, EP_TENSOR_NONE, EP_TENSOR_NONE, NULL, NULL, 0                                    \
    }

/**
 * Brings expert outputs back: out[t] = sum of the rows of token t, in float32,
 * in ascending rank order (EP_ROWS_BY_EXPERT: in top-k order, each times its
 * weight by fused multiply-add), then the biases, rounded once. A token that
 * went nowhere gets its biases or 0. When it returns, y is no longer read.
 * Events and errors as in ep_dispatch.
 */
EP_API ep_status ep_combine(ep_buffer *buffer, const ep_combine_args *args, ep_event **event);

/* -------------------------------------------------------------- backward */

/**
 * Backward of dispatch: grad_x[t] = sum of the gradients of token t's rows,
 * accumulated as ep_combine does, unweighted.
 */
typedef struct ep_dispatch_backward_args {
    size_t size;           /**< sizeof(ep_dispatch_backward_args) */
    ep_tensor grad_recv_x; /**< [rows, H] BF16, F16 or F32 */
    ep_tensor
        grad_recv_weights; /**< optional [rows, K], or [rows, 1] with EP_ROWS_BY_EXPERT, F32 */
    ep_handle *handle;
    ep_tensor grad_x;            /**< out [T, H] of grad_recv_x's dtype */
    ep_tensor grad_topk_weights; /**< out [T, K] F32; given exactly when grad_recv_weights is */
    ep_event *previous;
    void *stream;
    int32_t num_sms; /**< as in ep_dispatch_args */
} ep_dispatch_backward_args;

#define EP_DISPATCH_BACKWARD_ARGS_INIT                                                           \
    {                                                                                            \
        sizeof(ep_dispatch_backward_args), EP_TENSOR_NONE, EP_TENSOR_NONE, NULL, EP_TENSOR_NONE, \
            EP_TENSOR_NONE, NULL, NULL, 0                                                        \
    }

EP_API ep_status ep_dispatch_backward(ep_buffer *buffer, const ep_dispatch_backward_args *args,
                                      ep_event **event);

/**
 * Backward of combine. EP_ROWS_BY_TOKEN: each row gets the gradient of its
 * token, which is a cached dispatch. EP_ROWS_BY_EXPERT: each row gets weight
 * times the gradient, rounded once, and grad_topk_weights[t, k] is the float32
 * dot product of the gradient of t with the expert output of (t, k). The
 * gradient of a bias is grad_out itself.
 */
typedef struct ep_combine_backward_args {
    size_t size;            /**< sizeof(ep_combine_backward_args) */
    ep_tensor grad_out;     /**< [T, H] BF16, F16 or F32 */
    ep_tensor y;            /**< EP_ROWS_BY_EXPERT with grad_topk_weights: the y of the forward */
    ep_tensor topk_weights; /**< EP_ROWS_BY_EXPERT: [T, K] F32 as in the forward call */
    ep_handle *handle;
    ep_tensor grad_topk_weights; /**< out [T, K] F32, optional, EP_ROWS_BY_EXPERT only */
    const ep_allocator *allocator;
    ep_event *previous;
    void *stream;
    int32_t num_sms; /**< as in ep_dispatch_args */
} ep_combine_backward_args;

#define EP_COMBINE_BACKWARD_ARGS_INIT                                                           \
    {                                                                                           \
        sizeof(ep_combine_backward_args), EP_TENSOR_NONE, EP_TENSOR_NONE, EP_TENSOR_NONE, NULL, \
            EP_TENSOR_NONE, NULL, NULL, NULL, 0                                                 \
    }

/** `recv->x` is the gradient [rows, H]; its other tensors are not given, its handle is NULL. */
EP_API ep_status ep_combine_backward(ep_buffer *buffer, const ep_combine_backward_args *args,
                                     ep_recv *recv, ep_event **event);

#ifdef __cplusplus
}
#endif
#endif
