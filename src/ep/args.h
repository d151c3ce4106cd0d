/* SPDX-License-Identifier: MIT */
/* Checks of what callers pass; each failure names the call, the argument, its value and what is
 * allowed. */
#ifndef EPI_EP_ARGS_H
#define EPI_EP_ARGS_H

#include "entrepot/tensor.h"

#include <stdbool.h>

/* "CALL: ARGUMENT is VALUE; it must be ALLOWED" */
ep_status epi_bad(const char *call, const char *argument, int64_t value, const char *allowed);

/* "CALL: ARGUMENT differs: VALUE on rank A, VALUE on rank B" */
ep_status epi_disagree(const char *call, const char *argument, int rank_a, int64_t value_a,
                       int rank_b, int64_t value_b);

/* Copies a struct that begins with its size: smaller ones leave the rest of `full` as it is; larger
   ones must hold zeros past what is known here. */
ep_status epi_args_copy(const char *call, const char *argument, void *full, size_t full_size,
                        const void *given);

/* Fills a result struct up to the size its caller set. */
ep_status epi_result_copy(const char *call, const char *argument, void *given, const void *full,
                          size_t full_size);

/* Streams belong to accelerators; on the CPU there is none to pass. */
ep_status epi_check_no_stream(const char *call, const void *stream);

bool epi_tensor_given(const ep_tensor *tensor);

/* What a tensor must be; rows or columns of -1 are free. */
typedef struct epi_tensor_rule {
    const char *call, *argument;
    int ndim;
    int64_t rows, columns;
    bool free_strides; /* any column stride */
    unsigned dtypes;   /* bit (1 << ep_dtype) of each allowed dtype */
    const char *dtype_names;
    ep_device_type device; /* of the buffer; 0 is EP_DEVICE_CPU */
    int32_t device_index;  /* likewise, of an accelerator */
} epi_tensor_rule;

ep_status epi_tensor_check(const ep_tensor *tensor, const epi_tensor_rule *rule);

#define EPI_FLOAT_DTYPES (1u << EP_BF16 | 1u << EP_F16 | 1u << EP_F32)
#define EPI_INDEX_DTYPES (1u << EP_I32 | 1u << EP_I64)

#endif
