/* SPDX-License-Identifier: MIT */
/* The region of a receiver's window that holds one call's rows and what travels along. */
#ifndef EPI_EP_REGION_H
#define EPI_EP_REGION_H

#include "entrepot/ep.h"

#include <stdbool.h>

/* What a row consists of, in bytes; the same on every rank. */
typedef struct epi_row_shape {
    size_t row, scales, ids, weights, sum;
} epi_row_shape;

/* Offsets of the arrays within the region; each starts on a 256-byte boundary. */
typedef struct epi_region {
    size_t x, scales, ids, weights, source, sums, bytes;
} epi_region;

epi_region epi_region_of(const epi_row_shape *shape, int64_t rows);

/* Row shape of a dispatch; `ids` is 0 in cached mode, topk is 1 by expert. */
epi_row_shape epi_row_shape_of(ep_dtype wire, int64_t hidden, ep_scale scale, int topk,
                               size_t topk_bytes, bool weights, bool verify);

#endif
