/* SPDX-License-Identifier: MIT */
/* What a dispatch settled: where each row went and came from. */
#ifndef EPI_EP_HANDLE_H
#define EPI_EP_HANDLE_H

#include "ep/buffer.h"

struct ep_handle {
    ep_buffer *buffer;
    _Atomic int holders;
    uint64_t id;      /* epoch of the dispatch that made it: the same on every rank */
    int64_t mask_sum; /* of the ranks that were masked then */
    int num_ranks, topk, num_local;
    int64_t num_tokens, num_experts, hidden;
    int64_t num_rows; /* rows that hold a token */
    int64_t rows;     /* rows of the tensors: with padding, or the worst case */
    ep_row_layout layout;
    int32_t alignment;
    ep_dtype topk_dtype;
    int32_t *send_rank, *send_row; /* [T * K], see ep_handle_info */
    int32_t *rows_between;         /* [R * R] */
    int64_t *rows_at;              /* [R] rows of the tensors of each rank */
    int32_t *source_token;         /* [rows], -1 in padding */
    int32_t *source_offset;        /* [R + 1] */
    int32_t *expert_offset;        /* [L + 1], by expert */
    int32_t *expert_rows;          /* [L] rounded up to the alignment */
    int32_t *expert_filled;        /* [L] without padding */
    float *weights;                /* [T * K] of dispatch, by expert; NULL: not given */
    struct epi_ll_result *ll;      /* of the low-latency mode; NULL in the normal mode */
    void *device;                  /* the backend's part; NULL on the CPU */
};

ep_handle *epi_handle_new(ep_buffer *buffer, int64_t num_tokens, int topk);
/* Without arrays, for a result of the low-latency mode, which has its own. */
ep_handle *epi_handle_new_bare(ep_buffer *buffer);
/* Without the arrays that only a CPU dispatch fills. */
ep_handle *epi_handle_of_device(ep_buffer *buffer);
ep_handle *epi_handle_hold(ep_handle *handle);

/* Whether a call of the normal mode can use a handle; with `same_ranks` only while those are masked
   that were when it was made. */
ep_status epi_handle_check(const char *call, const ep_buffer *buffer, const ep_handle *handle,
                           bool same_ranks);

/* Which rank owns an expert, and which of its experts it is. */
typedef struct epi_experts {
    int64_t count;
    int num_local;
    int64_t table_sum; /* tells tables apart; 0 for equal blocks */
    int32_t *rank;     /* [E] */
    int32_t *local;    /* [E] */
} epi_experts;

/* What epi_experts_init would find wrong with a table, or set of these; local. */
ep_status epi_experts_check(const char *call, int64_t count, const int32_t *expert_rank,
                            int num_ranks, int rank, int *num_local, int64_t *table_sum);
ep_status epi_experts_init(epi_experts *experts, const char *call, int64_t count,
                           const int32_t *expert_rank, int num_ranks, int rank);
void epi_experts_free(epi_experts *experts);

/* Entry of a [T, K] tensor of ids. */
static inline int64_t epi_topk_at(const ep_tensor *idx, int64_t token, int k)
{
    int64_t at = token * idx->stride[0] + k;
    return idx->dtype == EP_I32 ? ((const int32_t *)idx->data)[at]
                                : ((const int64_t *)idx->data)[at];
}

/* Checks ids and tells who gets which token: fills send_rank and counts [R + E], rows per rank then
   per expert. `verify` also refuses a row that names an expert twice. Masked ranks get nothing. */
ep_status epi_route(ep_handle *handle, const char *call, const ep_tensor *topk_idx,
                    const epi_experts *experts, const bool *masked, bool verify, int32_t *counts);

/* Places all rows from everybody's counts (counts[s] is that of rank s; NULL: masked). */
ep_status epi_place_rows(ep_handle *handle, const char *call, const epi_experts *experts,
                         const int32_t *const *counts, const ep_tensor *topk_idx,
                         const int64_t *worst);

#endif
