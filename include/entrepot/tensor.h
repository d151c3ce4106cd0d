/* SPDX-License-Identifier: MIT */
/*
 * Element types and tensor descriptors.
 *
 * A tensor describes memory that somebody else owns: making, copying or
 * dropping a descriptor moves no data and frees nothing.
 */
#ifndef ENTREPOT_TENSOR_H
#define ENTREPOT_TENSOR_H

#include "entrepot/status.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/** Element types. Values are part of the ABI and never renumbered. */
typedef enum ep_dtype {
    EP_DTYPE_NONE = 0,
    EP_BF16 = 1,   /**< bfloat16: 8 exponent bits, 7 mantissa bits */
    EP_F16 = 2,    /**< IEEE binary16 */
    EP_F32 = 3,    /**< IEEE binary32 */
    EP_E4M3 = 4,   /**< FP8 E4M3 "fn": no infinities, largest value 448 */
    EP_I32 = 5,    /**< signed 32-bit integer */
    EP_I64 = 6,    /**< signed 64-bit integer */
    EP_U8 = 7,     /**< unsigned byte; also booleans, 0 or 1 */
    EP_F64 = 8,    /**< IEEE binary64 */
    EP_UE8M0X4 = 9 /**< four power-of-two scales, one exponent byte each, in an int32 */
} ep_dtype;

/** Bytes of one element; 0 for EP_DTYPE_NONE and values that are no dtype. */
EP_API size_t ep_dtype_size(ep_dtype dtype);

/** Name of a dtype as messages print it, such as "BF16"; "?" for other values. */
EP_API const char *ep_dtype_string(ep_dtype dtype);

/** Where memory lies. */
typedef enum ep_device_type { EP_DEVICE_CPU = 0, EP_DEVICE_CUDA = 1 } ep_device_type;

#define EP_TENSOR_MAX_DIMS 4

/**
 * Describes `ndim` dimensions of elements at `data`. Strides count elements.
 * A tensor whose `data` is NULL and whose ndim is 0 means "not given".
 * A tensor with a zero in its shape may have any `data`.
 */
typedef struct ep_tensor {
    void *data;
    ep_dtype dtype;
    int32_t ndim;
    int64_t shape[EP_TENSOR_MAX_DIMS];
    int64_t stride[EP_TENSOR_MAX_DIMS];
    ep_device_type device;
    int32_t device_index;
} ep_tensor;

/** A tensor that is not given. */
#define EP_TENSOR_NONE                                                       \
    {                                                                        \
        NULL, EP_DTYPE_NONE, 0, {0, 0, 0, 0}, {0, 0, 0, 0}, EP_DEVICE_CPU, 0 \
    }

/** Contiguous CPU tensor of one dimension, `n` elements. */
static inline ep_tensor ep_tensor_1d(void *data, ep_dtype dtype, int64_t n)
{
    ep_tensor tensor = EP_TENSOR_NONE;
    tensor.data = data;
    tensor.dtype = dtype;
    tensor.ndim = 1;
    tensor.shape[0] = n;
    tensor.stride[0] = 1;
    return tensor;
}

/** Contiguous row-major CPU tensor of `rows` x `columns` elements. */
static inline ep_tensor ep_tensor_2d(void *data, ep_dtype dtype, int64_t rows, int64_t columns)
{
    ep_tensor tensor = ep_tensor_1d(data, dtype, rows);
    tensor.ndim = 2;
    tensor.shape[1] = columns;
    tensor.stride[0] = columns;
    tensor.stride[1] = 1;
    return tensor;
}

#ifdef __cplusplus
}
#endif
#endif
