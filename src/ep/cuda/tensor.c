/* SPDX-License-Identifier: MIT */
/* Tensors on a buffer's device. */
#include "ep/cuda/internal.h"

ep_tensor epc_tensor(const epc_buffer *b, void *data, ep_dtype dtype, int ndim, int64_t n0,
                     int64_t n1, int64_t n2)
{
    ep_tensor t = EP_TENSOR_NONE;
    t.data = data;
    t.dtype = dtype;
    t.ndim = ndim;
    t.shape[0] = n0;
    t.shape[1] = ndim > 1 ? n1 : 0;
    t.shape[2] = ndim > 2 ? n2 : 0;
    t.stride[ndim - 1] = 1;
    for (int i = ndim - 2; i >= 0; i--)
        t.stride[i] = t.stride[i + 1] * t.shape[i + 1];
    t.device = EP_DEVICE_CUDA;
    t.device_index = b->device;
    return t;
}
