/* SPDX-License-Identifier: MIT */
#include "demo_memory.h"

#include <stdlib.h>
#include <string.h>

ep_status demo_memory_open(demo_memory *m, bool cuda, int rank)
{
    m->cuda = cuda;
    return cuda ? gpu_open(&m->gpu, rank) : EP_OK;
}

void demo_memory_close(demo_memory *m)
{
    if (m->cuda)
        gpu_close(&m->gpu);
}

ep_status demo_mirror(demo_memory *m, void *host, size_t bytes, void **seen)
{
    if (m->cuda)
        return gpu_new(&m->gpu, host, bytes, seen);
    *seen = host;
    return EP_OK;
}

void demo_mirror_end(demo_memory *m, void *seen)
{
    if (m->cuda)
        gpu_free(&m->gpu, seen);
}

ep_status demo_mirror_put(demo_memory *m, void *seen, const void *host, size_t bytes)
{
    return m->cuda ? gpu_write(&m->gpu, seen, host, bytes) : EP_OK;
}

ep_status demo_mirror_get(demo_memory *m, void *host, const void *seen, size_t bytes)
{
    if (!m->cuda)
        return EP_OK;
    return ep_device_copy(EP_DEVICE_CUDA, m->gpu.index, host, seen, bytes, m->gpu.stream);
}

bool demo_view(demo_memory *m, ep_tensor *tensor)
{
    return !m->cuda || gpu_to_host(&m->gpu, tensor);
}

void demo_view_end(demo_memory *m, ep_tensor *tensor)
{
    if (m->cuda)
        free(tensor->data);
    tensor->data = NULL;
}

ep_tensor demo_tensor(const demo_memory *m, void *seen, ep_dtype dtype, int64_t rows,
                      int64_t columns)
{
    return m->cuda ? gpu_tensor(&m->gpu, seen, dtype, rows, columns)
                   : ep_tensor_2d(seen, dtype, rows, columns);
}

void *demo_stream(const demo_memory *m)
{
    return m->cuda ? m->gpu.stream : NULL;
}

ep_status demo_wait(demo_memory *m)
{
    return m->cuda ? gpu_wait(&m->gpu) : EP_OK;
}
