/* SPDX-License-Identifier: MIT */
/* What dispatch and combine share: mail, agreement, and rows that peers read. */
#ifndef EPI_EP_CALL_H
#define EPI_EP_CALL_H

#include "ep/buffer.h"

/* Copies of more than this go past the caches: whoever reads them next would not find them there,
   and stores need not fetch the lines they overwrite. */
#define EPI_STREAM_BYTES ((size_t)1 << 20)

/* Writes this call's mail to every peer and raises ENTER; then awaits everybody's. `counts` may be
   NULL, then num_counts is 0. */
void epi_call_enter(epi_op *op, const epi_mail *mail, const int32_t *counts, int64_t num_counts);

/* Raises `slot` to this call at every peer. */
void epi_call_notify_all(epi_op *op, int slot);

/* The mail of `source` about this call. */
const epi_mailbox *epi_call_mail(const epi_op *op, int source);

/* Everybody entered: compares what must be equal. The same error on every rank. */
ep_status epi_call_agree(epi_op *op);

/* EP_ERR_MISMATCH names the first argument in which two ranks' mail differs. */
ep_status epi_call_compare(const char *call, int rank_a, const int64_t *a, int rank_b,
                           const int64_t *b);

/* A number that tells sets of masked ranks apart. */
int64_t epi_call_mask_sum(const ep_buffer *buffer);

/* Everybody entered, so everybody is past the call before: frees regions held for late writers. */
void epi_call_settle(epi_op *op);

/* ---- rows in a peer's memory */

/* Rows of this rank's that peers shall read, and the staging copy they may need. */
typedef struct epi_exposed {
    epi_rows_place place;
    const void *own; /* the rows themselves, which this rank reads where they are */
    size_t own_stride;
    bool staged, weights_staged, sums_staged;
    size_t staging, weights_staging, sums_staging; /* offsets of blocks to give back */
} epi_exposed;

/* Makes [rows, H] `tensor` readable by peers. weights: optional [rows, columns] F32. Rows
   [own_begin, own_end) are known to be read by this rank only. */
ep_status epi_expose(ep_buffer *buffer, const ep_tensor *tensor, const ep_tensor *weights,
                     int64_t own_begin, int64_t own_end, epi_exposed *exposed);
void epi_unexpose(ep_buffer *buffer, epi_exposed *exposed);

/* Whether rows of `source` must be fetched before they can be looked at. */
bool epi_reader_must_fetch(const epi_op *op, int source);
/* Address here of a row that need not be fetched; `own` is what this rank exposed. */
const void *epi_reader_row(const epi_op *op, const epi_exposed *own, int source, int64_t row);
/* Fetches `count` rows of one source to `local`. */
ep_status epi_reader_fetch(const epi_op *op, int source, const int32_t *rows, int count,
                           uint8_t *const *local, size_t row_bytes, epi_remote_read *reads);

#endif
