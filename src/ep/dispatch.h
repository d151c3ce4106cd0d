/* SPDX-License-Identifier: MIT */
/* A dispatch in progress; also the backward of combine, which is one. */
#ifndef EPI_EP_DISPATCH_H
#define EPI_EP_DISPATCH_H

#include "ep/call.h"
#include "ep/handle.h"
#include "ep/region.h"

typedef struct epi_dispatch {
    epi_op op;
    ep_recv *recv;
    ep_handle *handle; /* made here, or the cached one; held */
    bool cached;
    ep_tensor x, scales, topk_idx, topk_weights;
    int64_t num_experts;
    const int32_t *expert_rank;
    ep_wire wire;
    ep_scale scale;
    int64_t num_worst_tokens;
    bool has_allocator;
    ep_allocator allocator;
    epi_experts experts;

    /* backward of combine, by expert */
    bool weighted;               /* rows are scaled by their weight */
    ep_tensor y;                 /* forward's rows, for the weights' gradient */
    ep_tensor grad_topk_weights; /* out */
    epi_exposed exposed;

    ep_dtype wire_dtype;
    epi_row_shape shape;
    epi_region *regions; /* [R] */
    uint64_t *bases;     /* [R] region's offset in each receiver's window */
    bool *needs_room;    /* [R] */
    bool any_room;
    int32_t *counts; /* [R + E] */
    bool has_region, entered;
    size_t region; /* offset of this rank's */
    size_t offered;
    struct epi_owner *owner; /* of the result, until it is the caller's */
    ep_recv result;          /* as soon as it is known what comes */
    bool settled;            /* it is */
    uint8_t *scratch;        /* [parts] one quantised row with its scales */
    size_t scratch_stride;
} epi_dispatch;

/* Arguments, in dispatch_args.c; the message names what is wrong. */
ep_status epi_dispatch_check(const char *call, const ep_buffer *buffer,
                             const ep_dispatch_args *args, const ep_recv *recv);
ep_status epi_combine_backward_check(const char *call, const ep_buffer *buffer,
                                     const ep_combine_backward_args *args);

/* Moves this rank's rows to their places. */
ep_status epi_dispatch_send(epi_dispatch *dispatch);

/* Takes all memory that the result will need, while the call can still be given up on every rank.
 */
ep_status epi_dispatch_reserve(epi_dispatch *dispatch);
void epi_dispatch_unreserve(epi_dispatch *dispatch);

/* It is known where this rank's rows will be: makes the result, and tells the event of it. */
void epi_dispatch_settle(epi_dispatch *dispatch);
/* Everything arrived: checks it in verify mode and completes the result. */
ep_status epi_dispatch_receive(epi_dispatch *dispatch);
/* The end of a call whose result was made: the caller's from now on, or nobody's. */
void epi_dispatch_let_go(epi_dispatch *dispatch, ep_status status);

/* Checksum that travels with a row in verify mode. */
uint64_t epi_row_sum(const void *row, size_t row_bytes, const void *scales, size_t scale_bytes,
                     int32_t token);

/* Gradient of the weights: dot products of grad_out with the forward's rows at their ranks. */
ep_status epi_dispatch_weight_gradient(epi_dispatch *dispatch);

#endif
