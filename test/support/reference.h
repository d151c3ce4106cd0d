/* SPDX-License-Identifier: MIT */
/*
 * An independent reference of layout, dispatch, combine and their backwards:
 * given the inputs of every rank it works out, in one place and with plain
 * loops, what each rank must get. It shares no code with src/.
 */
#ifndef EP_TEST_REFERENCE_H
#define EP_TEST_REFERENCE_H

#include "entrepot/ep.h"

#include <stdbool.h>

/* What all ranks agree on. */
struct ref_world {
    int num_ranks;
    int64_t hidden;
    int topk;
    int64_t num_experts;
    const int32_t *expert_rank; /* [E], always given here */
    ep_dtype dtype;             /* of x */
    ep_wire wire;
    ep_scale scale; /* of the scales on the wire, or of those given with an E4M3 x */
    ep_row_layout layout;
    int32_t expert_alignment;
    int64_t num_worst_tokens;
};

/* Inputs of one rank, dense. */
struct ref_tokens {
    int64_t num_tokens;
    uint8_t *x;          /* [T, H] */
    uint8_t *scales;     /* [T, scale words], of an E4M3 x */
    int64_t *topk_idx;   /* [T, K] */
    float *topk_weights; /* [T, K] or NULL */
};

/* Where a received row comes from; source is -1 in padding. */
struct ref_row {
    int source;
    int64_t token;
    int k; /* the top-k place, by expert only */
};

/* What one rank receives, dense. Ids and weights have `columns` columns: K, or 1 by expert. */
struct ref_recv {
    int64_t rows, num_rows;
    int num_local_experts, columns;
    struct ref_row *row; /* [rows] */
    uint8_t *x, *scales; /* padding rows are zero here and undefined in results */
    int64_t *topk_idx;
    float *topk_weights;
    int32_t *source_token;
    int32_t *source_offset; /* [R + 1], by token */
    int32_t *expert_offset; /* [L + 1], by expert */
    int32_t *tokens_per_expert;
    bool overflow; /* more rows than num_worst_tokens: nothing else is filled */
};

ep_dtype ref_wire_dtype(const struct ref_world *world);

/* Local id of each expert at its rank into local[E]; returns how many `rank` has. */
int ref_local_ids(const struct ref_world *world, int rank, int64_t *local);

/* Outputs as of ep_layout, all given. */
void ref_layout(const struct ref_world *world, const struct ref_tokens *mine, int ranks_per_node,
                int32_t *per_rank, int32_t *per_node, int32_t *per_expert, uint8_t *in_rank);

/* What `rank` receives from all ranks' tokens [R]. */
void ref_dispatch(const struct ref_world *world, const struct ref_tokens *tokens, int rank,
                  struct ref_recv *recv);
void ref_recv_free(struct ref_recv *recv);

/* A weighted or plain sum of rows back at their tokens. */
struct ref_combine {
    ep_dtype dtype;            /* of y, biases and out */
    const uint8_t *const *y;   /* [R] each [rows there, H] */
    const float *const *carry; /* [R] each [rows there, columns], summed along; or NULL */
    const float *weights;      /* [T, K] factors of the rows, by expert only; or NULL */
    const uint8_t *bias[2];    /* [T, H] or NULL */
};

/* out [T, H] and, where carry is given, out_carry [T, K] of `rank`. */
void ref_combine(const struct ref_world *world, const struct ref_recv *recv, int rank,
                 int64_t num_tokens, const struct ref_combine *c, uint8_t *out, float *out_carry);

/* Gradients of rows: grad [rows of rank, H] from every rank's grad_out [T, H]. With weights [R]
   each [T, K] (by expert) a row's gradient is rounded weight times grad_out. */
void ref_combine_backward(const struct ref_world *world, const struct ref_recv *recv, int rank,
                          ep_dtype dtype, const uint8_t *const *grad_out,
                          const float *const *weights, uint8_t *grad);

/* grad_topk_weights [T, K] of `rank`, by expert: dot products in the order that codec/rows.h
   documents (16 lanes, then halves). */
void ref_weight_gradients(const struct ref_world *world, const struct ref_recv *recv, int rank,
                          int64_t num_tokens, ep_dtype dtype, const uint8_t *grad_out,
                          const uint8_t *const *y, float *out);

#endif
