/* SPDX-License-Identifier: MIT */
/* Where peers find the rows that a combine lets them read: in place, or in a copy in the window. */
#include "ep/cuda/internal.h"

static size_t row_bytes_of(const ep_tensor *tensor)
{
    return (size_t)tensor->shape[1] * ep_dtype_size(tensor->dtype);
}

/* Whether peers reach the tensor as it is. */
static bool reached(const epc_flight *flight, const ep_tensor *tensor, epc_exposed *out)
{
    size_t element = ep_dtype_size(tensor->dtype), stride = (size_t)tensor->stride[0] * element;
    size_t rows = (size_t)tensor->shape[0];
    size_t bytes = rows ? (rows - 1) * stride + row_bytes_of(tensor) : 0;
    *out = (epc_exposed){.memory = tensor->data, .stride = stride};
    return bytes == 0 ||
           epc_locate(flight->owner, tensor->data, bytes, &out->place, &out->offset) ||
           epc_export(flight, tensor->data, bytes, &out->place, &out->offset);
}

/* The flight keeps a block until the call is done. */
static void hold(epc_flight *flight, epc_block *block)
{
    int i = 0;
    while (flight->blocks[i])
        i++;
    flight->blocks[i] = block;
}

static ep_status no_room(const epc_flight *flight, size_t bytes)
{
    const epc_buffer *b = flight->owner;
    return epi_fail(EP_ERR_CAPACITY,
                    "%s: a copy of rows that peers can't reach takes %zu bytes of the window in "
                    "one piece, it has %zu; this call can't wait for it to grow: release results, "
                    "place the rows with ep_buffer_alloc, or create the buffer with window_bytes "
                    "of %zu or more",
                    flight->call, bytes, epc_largest_piece(b), epc_window_bytes(b) + bytes);
}

static ep_status copy(epc_flight *flight, const ep_tensor *tensor, epc_exposed *out)
{
    size_t element = ep_dtype_size(tensor->dtype), row_bytes = row_bytes_of(tensor);
    out->stride = row_bytes;
    return epi_gpu_copy_rows(out->memory, row_bytes, tensor->data,
                             (size_t)tensor->stride[0] * element, row_bytes,
                             (size_t)tensor->shape[0], flight->stream);
}

ep_status epc_expose(epc_flight *flight, const epc_handle *handle, const ep_tensor *const *tensors,
                     int count, size_t sums_bytes, epc_exposed *out, epc_exposed *sums)
{
    epc_buffer *b = flight->owner;
    bool copied[2] = {false, false};
    size_t bytes = epc_padded(sums_bytes);
    for (int i = 0; i < count; i++) {
        copied[i] = !reached(flight, tensors[i], &out[i]);
        if (copied[i])
            bytes += epc_padded((size_t)tensors[i]->shape[0] * row_bytes_of(tensors[i]));
    }
    if (bytes == 0)
        return EP_OK;
    epc_block *block = epc_take_follower(flight, handle, bytes);
    if (!block)
        return no_room(flight, bytes);
    hold(flight, block);
    uint8_t *next = block->memory;
    for (int i = 0; i < count; i++) {
        if (!copied[i])
            continue;
        out[i].memory = next;
        next += epc_padded((size_t)tensors[i]->shape[0] * row_bytes_of(tensors[i]));
        epc_locate(b, out[i].memory, 0, &out[i].place, &out[i].offset);
        EPI_TRY(copy(flight, tensors[i], &out[i]));
    }
    *sums = (epc_exposed){.memory = next};
    epc_locate(b, next, 0, &sums->place, &sums->offset);
    return EP_OK;
}
