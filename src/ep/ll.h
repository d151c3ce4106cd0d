/* SPDX-License-Identifier: MIT */
/*
 * Low latency from inside. A sender puts its tokens once into its own window,
 * narrow as the wire wants them, with the ids beside them, and raises LL_SENT.
 * Each receiver reads from there straight into the packed result. Combine is the
 * mirror: expert outputs stay at the expert's rank, which publishes where its
 * rows of each source begin, and the token's owner reads and sums them.
 *
 * What peers may still read is never written over or freed before DONE says that
 * they have ended the call they read it for.
 */
#ifndef EPI_EP_LL_H
#define EPI_EP_LL_H

#include "entrepot/low_latency.h"
#include "ep/call.h"
#include "ep/handle.h"

#define EPI_LL_MAX_TOKENS (INT64_C(1) << 20)
#define EPI_LL_MAX_ROWS ((int64_t)INT32_MAX) /* of one expert; tensors count them in int32 */

/* What must be equal for memory to be used again; compared as bytes. */
typedef struct epi_ll_shape {
    int64_t max_tokens, hidden, num_experts, expert_rows;
    int64_t table_sum, mask_sum;
    int32_t topk, wire, scale, overflow;
} epi_ll_shape;

/* Head of a slot's shared area. */
typedef struct epi_ll_head {
    uint64_t epoch; /* of the dispatch that filled it */
    int64_t num_tokens;
    uint64_t y_epoch;          /* of the combine that filled the rest */
    uint64_t y_base, y_stride; /* expert outputs in this rank's window; bytes from row to row */
    int64_t y_packed;          /* rows of all experts follow each other; else each expert has S */
    int64_t y_encoded;         /* LogFMT rows */
} epi_ll_head;

/* Offsets in a slot's shared area, which depend on the owner's number of experts. */
typedef struct epi_ll_layout {
    size_t ids;    /* int32 [M, K] global expert ids; negative: no row, see epi_ll_read_ids */
    size_t begin;  /* int32 [L, R] first row of each source within each expert's */
    size_t packed; /* int32 [L] first row of each expert when packed */
    size_t sums;   /* uint64 [M], verify mode */
    size_t rows;   /* [M, H] of the wire */
    size_t scales; /* [M, scale bytes] */
    size_t bytes;
} epi_ll_layout;

/* Rows [L, S] of address space, backed as far as they are used. */
typedef struct epi_ll_rows {
    size_t base, row_bytes; /* offset in the window */
    size_t *backed;         /* [L] bytes backed of each expert */
    size_t total;
} epi_ll_rows;

typedef struct epi_ll_slot {
    _Atomic bool in_use;
    uint64_t epoch;   /* of its last dispatch */
    uint64_t y_epoch; /* of the last combine that let peers read expert outputs */
    size_t area;      /* offset of the shared area in this rank's window */
    epi_ll_rows x, y;
    bool has_y_block;
    size_t y_block, y_block_bytes; /* packed copy of expert outputs */
    uint8_t *scales;               /* [L, S, scale bytes] or by column */
    int32_t *source_token;         /* [L, S] */
    uint64_t *peer_area;           /* [R] offsets in the peers' windows */
} epi_ll_slot;

typedef struct epi_ll {
    ep_buffer *buffer;
    int holders; /* the buffer, calls and results; under pool_lock */
    epi_ll_shape shape;
    epi_experts experts;
    int32_t *local_of; /* [R] experts of each rank */
    size_t row_bytes, scale_bytes;
    size_t row_bound; /* most rows that can arrive in one call */
    epi_ll_slot slot[2];
    uint64_t calls;      /* turns taken; parity picks the slot, the same on every rank; under
                            pool_lock: a hook may end a call while the worker begins another */
    uint64_t last_epoch; /* of the last call that used it */
    struct epi_ll *next; /* in buffer->ll_old */
} epi_ll;

/* One received batch. */
typedef struct epi_ll_result {
    epi_ll *ll; /* held */
    int slot;
    bool retired; /* the slot serves other results, or the call failed: not to be combined */
    bool scales_by_column;
    uint64_t epoch;
    int64_t num_tokens;
    int topk;
    int64_t *range;   /* [L, R] */
    int32_t *ids;     /* [T, K] what this rank's tokens asked for */
    int32_t *count;   /* [L] */
    int32_t *dropped; /* [L] */
    int32_t *packed;  /* [L + 1] sums of count */
    int64_t memory[]; /* of the arrays */
} epi_ll_result;

/* ---- ll_size.c */

epi_ll_layout epi_ll_layout_of(const epi_ll_shape *shape, int num_ranks, int num_local,
                               bool verify);
size_t epi_ll_row_bytes(const epi_ll_shape *shape);
size_t epi_ll_scale_bytes(const epi_ll_shape *shape);
/* Most rows that can arrive at a rank in one call. */
size_t epi_ll_row_bound(const epi_ll_shape *shape, int num_ranks, int num_local);
/* Elements of epi_ll_result.memory. */
size_t epi_ll_result_words(const epi_ll_shape *shape, int num_ranks, int num_local,
                           int64_t num_tokens);

/* ---- ll_memory.c */

/* Memory for a shape; local. Nothing is left on failure. */
ep_status epi_ll_new(ep_buffer *buffer, const char *call, const epi_ll_shape *shape,
                     const int32_t *expert_rank, epi_ll **out);
void epi_ll_hold(epi_ll *ll);
void epi_ll_release(epi_ll *ll);
/* The buffer's memory of now, held; NULL: none. */
epi_ll *epi_ll_current(ep_buffer *buffer);
/* The buffer takes over `ll`, or NULL, and lets go of what it had; results keep theirs. */
void epi_ll_replace(ep_buffer *buffer, epi_ll *ll);
static inline void epi_ll_drop(ep_buffer *buffer)
{
    epi_ll_replace(buffer, NULL);
}
/* The slot of the next dispatch, and taking it. A turn counts from 1. */
int epi_ll_next_slot(epi_ll *ll);
uint64_t epi_ll_take_turn(epi_ll *ll);
/* A dispatch failed: undoes its turn if that was the last one and `undo`, else drops `ll`. */
void epi_ll_end_turn(epi_ll *ll, uint64_t turn, bool undo);
/* Last call that may have used memory which nobody here holds any more; 0: none. */
uint64_t epi_ll_last_old(ep_buffer *buffer);
/* Frees such memory as far as no peer reads it any more. */
void epi_ll_reclaim(ep_buffer *buffer);
/* Frees all that is left; the window goes with it. */
void epi_ll_destroy(ep_buffer *buffer);

/* Backs the first count[l] rows of each expert. */
ep_status epi_ll_back_rows(epi_ll *ll, epi_ll_rows *rows, const int32_t *count);

/* The area of `rank` in slot `slot`, and its layout. */
uint8_t *epi_ll_area(const epi_ll *ll, int slot, int rank);
epi_ll_layout epi_ll_layout_at(const epi_ll *ll, int rank);

/* ---- ll_result.c */

ep_status epi_ll_result_new(epi_ll *ll, int slot, uint64_t epoch, int64_t num_tokens,
                            epi_ll_result **result);
void epi_ll_result_free(epi_ll_result *result);
/* Gives the slot to other results, once. */
void epi_ll_retire(epi_ll_result *result);

/*
 * Ids of a [T, K] tensor, checked, as peers read them. Experts of masked ranks
 * become -1. An expert named twice by one token gets one row: the later place
 * becomes -2 - the earlier one.
 */
ep_status epi_ll_read_ids(const epi_ll *ll, const char *call, const ep_tensor *idx, int32_t *ids);

/* Compares with the ids of dispatch. */
ep_status epi_ll_check_ids(const epi_ll_result *result, const char *call, const ep_tensor *idx);

/* ---- ll_args.c */

ep_status epi_ll_check_dispatch(const ep_buffer *buffer, const ep_ll_dispatch_args *args,
                                const ep_ll_recv *recv, int64_t *table_sum);
ep_status epi_ll_check_combine(const ep_buffer *buffer, const ep_ll_combine_args *args);
ep_status epi_ll_check_handle(const char *call, const ep_buffer *buffer, const ep_handle *handle);

#endif
