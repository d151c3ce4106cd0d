/* SPDX-License-Identifier: MIT */
/* Memory and execution for the public calls of entrepot/device.h. */
#include "base/error.h"
#include "device/gpu.h"
#include "device/module.h"

#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call) epi_gpu_check((int)(call), #call)

/* One public call: on the device it names, then back on the caller's. */
#define ON_DEVICE(index, work)                     \
    do {                                           \
        int before_;                               \
        EPI_TRY(epi_gpu_enter((index), &before_)); \
        ep_status status_ = (work);                \
        epi_gpu_leave(before_);                    \
        return status_;                            \
    } while (0)

static ep_status count_devices(int32_t *count)
{
    int found = 0;
    cudaError_t error = cudaGetDeviceCount(&found);
    *count = error == cudaSuccess ? found : 0;
    if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
        cudaGetLastError();
        return EP_OK;
    }
    return epi_gpu_check((int)error, "cudaGetDeviceCount");
}

static ep_status query_device(int32_t index, ep_device_info *info)
{
    struct cudaDeviceProp properties;
    int driver;
    EPI_TRY(CHECK(cudaGetDeviceProperties(&properties, index)));
    EPI_TRY(CHECK(cudaDriverGetVersion(&driver)));
    snprintf(info->name, sizeof info->name, "%.95s", properties.name);
    info->compute_major = properties.major;
    info->compute_minor = properties.minor;
    info->multiprocessors = properties.multiProcessorCount;
    info->memory_bytes = (int64_t)properties.totalGlobalMem;
    info->driver_version = driver;
    return EP_OK;
}

static ep_status device_alloc(int32_t index, size_t bytes, void **memory)
{
    ON_DEVICE(index, epi_gpu_alloc(bytes ? bytes : 1, memory));
}

static ep_status device_free(int32_t index, void *memory)
{
    ON_DEVICE(index, CHECK(cudaFree(memory)));
}

static ep_status copy_and_wait(void *to, const void *from, size_t bytes, void *stream)
{
    EPI_TRY(epi_gpu_copy(to, from, bytes, stream));
    return CHECK(cudaStreamSynchronize((cudaStream_t)stream));
}

static ep_status device_copy(int32_t index, void *to, const void *from, size_t bytes, void *stream)
{
    ON_DEVICE(index, copy_and_wait(to, from, bytes, stream));
}

static ep_status stream_create(int32_t index, void **stream)
{
    ON_DEVICE(index, epi_gpu_stream_create(stream));
}

static ep_status stream_destroy(int32_t index, void *stream)
{
    ON_DEVICE(index, CHECK(cudaStreamDestroy((cudaStream_t)stream)));
}

static ep_status stream_wait(int32_t index, void *stream)
{
    ON_DEVICE(index, CHECK(cudaStreamSynchronize((cudaStream_t)stream)));
}

static ep_status timer_create(int32_t index, void **timer)
{
    ON_DEVICE(index, CHECK(cudaEventCreate((cudaEvent_t *)timer)));
}

static ep_status timer_destroy(int32_t index, void *timer)
{
    ON_DEVICE(index, CHECK(cudaEventDestroy((cudaEvent_t)timer)));
}

static ep_status timer_mark(int32_t index, void *timer, void *stream)
{
    ON_DEVICE(index, epi_gpu_event_record(timer, stream));
}

static ep_status between(void *from, void *to, float *milliseconds)
{
    EPI_TRY(epi_gpu_event_wait(from));
    EPI_TRY(epi_gpu_event_wait(to));
    return CHECK(cudaEventElapsedTime(milliseconds, (cudaEvent_t)from, (cudaEvent_t)to));
}

static ep_status timer_between(int32_t index, void *from, void *to, float *milliseconds)
{
    ON_DEVICE(index, between(from, to, milliseconds));
}

static ep_status graph_begin(int32_t index, void *stream)
{
    ON_DEVICE(index, CHECK(cudaStreamBeginCapture((cudaStream_t)stream,
                                                  cudaStreamCaptureModeThreadLocal)));
}

static ep_status end_capture(void *stream, void **executable)
{
    cudaGraph_t graph;
    EPI_TRY(CHECK(cudaStreamEndCapture((cudaStream_t)stream, &graph)));
    ep_status status = CHECK(cudaGraphInstantiate((cudaGraphExec_t *)executable, graph, 0));
    cudaGraphDestroy(graph);
    return status;
}

static ep_status graph_end(int32_t index, void *stream, void **graph)
{
    ON_DEVICE(index, end_capture(stream, graph));
}

static ep_status graph_launch(int32_t index, void *graph, void *stream)
{
    ON_DEVICE(index, CHECK(cudaGraphLaunch((cudaGraphExec_t)graph, (cudaStream_t)stream)));
}

static ep_status graph_destroy(int32_t index, void *graph)
{
    ON_DEVICE(index, CHECK(cudaGraphExecDestroy((cudaGraphExec_t)graph)));
}

const epi_device_ops epi_module_device_ops = {
    .count = count_devices,
    .query = query_device,
    .alloc = device_alloc,
    .free = device_free,
    .copy = device_copy,
    .stream_create = stream_create,
    .stream_destroy = stream_destroy,
    .stream_wait = stream_wait,
    .timer_create = timer_create,
    .timer_destroy = timer_destroy,
    .timer_mark = timer_mark,
    .timer_between = timer_between,
    .graph_begin = graph_begin,
    .graph_end = graph_end,
    .graph_launch = graph_launch,
    .graph_destroy = graph_destroy,
};
