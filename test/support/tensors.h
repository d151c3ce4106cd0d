/* SPDX-License-Identifier: MIT */
/* Tensors of tests: dense or with gaps between the rows, and their comparison. */
#ifndef EP_TEST_TENSORS_H
#define EP_TEST_TENSORS_H

#include "entrepot/tensor.h"
#include "support/reference.h"

/* calloc that ends the test rather than fail, and also serves n = 0. */
void *test_zeros(int64_t n, size_t size);

/*
 * A tensor of its own memory: `gap` elements lie between one row and the next,
 * filled with a pattern that tensor_gaps_intact looks for. Contents are copied
 * from `dense`, or the pattern as well when it is NULL. Free with tensor_free.
 */
ep_tensor tensor_new(ep_dtype dtype, int64_t rows, int64_t columns, int64_t gap, const void *dense);
/* The same with the columns apart and the rows adjacent (a transposed matrix). */
ep_tensor tensor_new_transposed(ep_dtype dtype, int64_t rows, int64_t columns, const void *dense);
/* int64 ids as a tensor of I32 or I64. */
ep_tensor tensor_new_ids(ep_dtype dtype, int64_t rows, int64_t columns, int64_t gap,
                         const int64_t *ids);
void tensor_free(ep_tensor *tensor);

/* Whether nothing was written between the rows of a tensor_new tensor. */
int tensor_gaps_intact(const ep_tensor *tensor);
/* Whether a tensor_new tensor made from NULL is wholly unwritten. */
int tensor_untouched(const ep_tensor *tensor);

/*
 * 0 when `got` has this dtype and shape (columns -1: one dimension) and every
 * element that of `want`, dense, bit for bit (any NaN equals any NaN). Rows whose
 * `row` (may be NULL) has no source are skipped: padding is undefined. Else
 * prints the first difference and returns 1.
 */
int tensor_differs(const char *name, const ep_tensor *got, ep_dtype dtype, int64_t rows,
                   int64_t columns, const void *want, const struct ref_row *row);
/* The same for ids given as int64. */
int tensor_ids_differ(const char *name, const ep_tensor *got, ep_dtype dtype, int64_t rows,
                      int64_t columns, const int64_t *want);
/* 0 when the tensor is not given. */
int tensor_given(const char *name, const ep_tensor *got);

#endif
