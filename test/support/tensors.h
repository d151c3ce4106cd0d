/* SPDX-License-Identifier: MIT */
/* Tensors of tests: dense or with gaps between the rows, and their comparison. */
#ifndef EP_TEST_TENSORS_H
#define EP_TEST_TENSORS_H

#include "entrepot/device.h"
#include "entrepot/tensor.h"
#include "support/reference.h"

/* calloc that ends the test rather than fail, and also serves n = 0. */
void *test_zeros(int64_t n, size_t size);

/*
 * Where this thread's tensors are: host memory, until a rank chooses a device.
 * The device is that of EP_TEST_DEVICE ("cuda"), rank r's being the r-th, over
 * and over where there are fewer; the choice is undone by test_device_leave.
 * Comparisons below read device memory for themselves.
 */
struct test_device {
    ep_device_type type;
    int index;
    void *stream;
};
extern _Thread_local struct test_device test_device;
int test_device_wanted(void);
/* Transport of a group whose ranks use the test's device: that of EP_TEST_TRANSPORT, or shm. A
   process that has used a device can't fork ranks that do: one kind of ranks a program. Without a
   device it is `otherwise`. */
const char *test_transport(const char *otherwise);
ep_status test_device_enter(int rank);
void test_device_leave(void);
void *test_memory_new(size_t bytes);
void test_memory_free(void *memory);
/* Copies `bytes` of host memory to memory of the test's device. */
void test_memory_write(void *to, const void *from, size_t bytes);

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
