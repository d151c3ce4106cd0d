/* SPDX-License-Identifier: MIT */
#include "gpu.h"

#include <stdlib.h>
#include <string.h>

#define TRY(call)                   \
    do {                            \
        ep_status status_ = (call); \
        if (status_ != EP_OK)       \
            return status_;         \
    } while (0)

ep_status gpu_open(gpu *g, int rank)
{
    int32_t count = 0;
    memset(g, 0, sizeof *g);
    TRY(ep_device_count(EP_DEVICE_CUDA, &count));
    if (count == 0) {
        ep_device_info info = {.size = sizeof info};
        ep_status status = ep_device_query(EP_DEVICE_CUDA, 0, &info); /* says why */
        return status == EP_OK ? EP_ERR_UNSUPPORTED : status;
    }
    g->index = rank % count;
    return ep_stream_create(EP_DEVICE_CUDA, g->index, &g->stream);
}

void gpu_close(gpu *g)
{
    for (int i = 0; i < GPU_MAX_MARKS; i++)
        ep_timer_destroy(EP_DEVICE_CUDA, g->index, g->mark[i]);
    ep_stream_destroy(EP_DEVICE_CUDA, g->index, g->stream);
    memset(g, 0, sizeof *g);
}

ep_status gpu_new(gpu *g, const void *host, size_t bytes, void **memory)
{
    /* A multiple of 2 MiB has large pages also where peers map it. */
    size_t whole = bytes > (1u << 20) ? (bytes + (2u << 20) - 1) >> 21 << 21 : bytes;
    TRY(ep_device_alloc(EP_DEVICE_CUDA, g->index, whole ? whole : 1, memory));
    return host ? gpu_write(g, *memory, host, bytes) : EP_OK;
}

void gpu_free(gpu *g, void *memory)
{
    ep_device_free(EP_DEVICE_CUDA, g->index, memory);
}

ep_status gpu_write(gpu *g, void *memory, const void *host, size_t bytes)
{
    return ep_device_copy(EP_DEVICE_CUDA, g->index, memory, host, bytes, g->stream);
}

void *gpu_read(gpu *g, const void *memory, size_t bytes)
{
    void *host = malloc(bytes + 1);
    if (host && ep_device_copy(EP_DEVICE_CUDA, g->index, host, memory, bytes, g->stream) != EP_OK) {
        free(host);
        return NULL;
    }
    return host;
}

ep_tensor gpu_tensor(const gpu *g, void *data, ep_dtype dtype, int64_t rows, int64_t columns)
{
    ep_tensor tensor = ep_tensor_2d(data, dtype, rows, columns);
    tensor.device = EP_DEVICE_CUDA;
    tensor.device_index = g->index;
    return tensor;
}

bool gpu_to_host(gpu *g, ep_tensor *tensor)
{
    int64_t elements = tensor->ndim ? 1 : 0;
    for (int i = 0; i < tensor->ndim; i++)
        elements = tensor->shape[i] ? elements + (tensor->shape[i] - 1) * tensor->stride[i] : 0;
    tensor->data = gpu_read(g, tensor->data, (size_t)elements * ep_dtype_size(tensor->dtype));
    tensor->device = EP_DEVICE_CPU;
    return tensor->data != NULL;
}

ep_status gpu_mark(gpu *g, int i)
{
    if (!g->mark[i])
        TRY(ep_timer_create(EP_DEVICE_CUDA, g->index, &g->mark[i]));
    return ep_timer_mark(EP_DEVICE_CUDA, g->index, g->mark[i], g->stream);
}

ep_status gpu_between(gpu *g, int from, int to, double *us)
{
    float milliseconds;
    TRY(ep_timer_between(EP_DEVICE_CUDA, g->index, g->mark[from], g->mark[to], &milliseconds));
    *us = 1e3 * (double)milliseconds;
    return EP_OK;
}

ep_status gpu_wait(gpu *g)
{
    return ep_stream_wait(EP_DEVICE_CUDA, g->index, g->stream);
}

ep_status gpu_copy_limit(gpu *g, rank_self *self, copy_round *rounds, void *a, void *b,
                         size_t bytes)
{
    TRY(ep_group_barrier(self->group));
    for (int i = 0; i < 2 * COPY_ROUNDS; i++) {
        TRY(gpu_mark(g, 0));
        TRY(ep_device_copy(EP_DEVICE_CUDA, g->index, i & 1 ? b : a, i & 1 ? a : b, bytes,
                           g->stream));
        TRY(gpu_mark(g, 1));
        double us;
        TRY(gpu_between(g, 0, 1, &us));
        copy_round *round = &rounds[i * self->num_ranks + self->rank];
        round->time = (span){0, (int64_t)(us * 1e3)};
        round->bytes = (int64_t)bytes;
    }
    return EP_OK;
}
