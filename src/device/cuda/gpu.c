/* SPDX-License-Identifier: MIT */
#include "device/gpu.h"

#include "base/error.h"

#include <cuda_runtime_api.h>
#include <string.h>

#define CHECK(call) epi_gpu_check((int)(call), #call)

/* Of work that a capture of the caller's must neither record nor forbid. */
#define RELAXED(status, call)                                            \
    do {                                                                 \
        enum cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed; \
        (status) = CHECK(cudaThreadExchangeStreamCaptureMode(&mode_));   \
        if ((status) == EP_OK) {                                         \
            (status) = CHECK(call);                                      \
            cudaThreadExchangeStreamCaptureMode(&mode_);                 \
        }                                                                \
    } while (0)

/* Names the function alone: the arguments' names say nothing to a caller. */
ep_status epi_gpu_check(int code, const char *call)
{
    if (code == cudaSuccess)
        return EP_OK;
    cudaGetLastError(); /* an error that is not sticky must not come up again later */
    int length = (int)strcspn(call, "(");
    ep_status status = code == cudaErrorMemoryAllocation ? EP_ERR_MEMORY
                       : code == cudaErrorNoDevice || code == cudaErrorInsufficientDriver
                           ? EP_ERR_UNSUPPORTED
                           : EP_ERR_DEVICE;
    return epi_fail(status, "%.*s: %s (%s)", length, call, cudaGetErrorString((cudaError_t)code),
                    cudaGetErrorName((cudaError_t)code));
}

ep_status epi_gpu_enter(int index, int *before)
{
    EPI_TRY(CHECK(cudaGetDevice(before)));
    return *before == index ? EP_OK : CHECK(cudaSetDevice(index));
}

void epi_gpu_leave(int before)
{
    cudaSetDevice(before);
}

static ep_status attribute(int index, enum cudaDeviceAttr which, int *value)
{
    return CHECK(cudaDeviceGetAttribute(value, which, index));
}

ep_status epi_gpu_info_of(int index, epi_gpu_info *info)
{
    int major, minor;
    struct cudaDeviceProp properties;
    EPI_TRY(attribute(index, cudaDevAttrComputeCapabilityMajor, &major));
    EPI_TRY(attribute(index, cudaDevAttrComputeCapabilityMinor, &minor));
    EPI_TRY(attribute(index, cudaDevAttrMultiProcessorCount, &info->multiprocessors));
    EPI_TRY(attribute(index, cudaDevAttrMaxSharedMemoryPerBlockOptin, &info->max_shared));
    EPI_TRY(CHECK(cudaGetDeviceProperties(&properties, index)));
    info->compute = 10 * major + minor;
    memcpy(info->uuid, &properties.uuid, sizeof info->uuid);
    return EP_OK;
}

ep_status epi_gpu_alloc(size_t bytes, void **memory)
{
    ep_status status;
    RELAXED(status, cudaMalloc(memory, bytes));
    return status;
}

void epi_gpu_free(void *memory)
{
    cudaFree(memory);
}

ep_status epi_gpu_host_alloc(size_t bytes, void **memory)
{
    EPI_TRY(CHECK(cudaHostAlloc(memory, bytes, cudaHostAllocMapped | cudaHostAllocPortable)));
    memset(*memory, 0, bytes);
    return EP_OK;
}

void epi_gpu_host_free(void *memory)
{
    cudaFreeHost(memory);
}

/* Blocking work on a stream of its own, in a mode that a capture elsewhere does not forbid. */
static ep_status blocking(cudaError_t (*work)(void *, const void *, size_t, cudaStream_t), void *to,
                          const void *from, size_t bytes)
{
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaStream_t stream;
    if (bytes == 0)
        return EP_OK;
    EPI_TRY(CHECK(cudaThreadExchangeStreamCaptureMode(&mode)));
    ep_status status = CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    if (status == EP_OK) {
        status = epi_gpu_check((int)work(to, from, bytes, stream), "cudaMemcpyAsync");
        if (status == EP_OK)
            status = CHECK(cudaStreamSynchronize(stream));
        cudaStreamDestroy(stream);
    }
    cudaThreadExchangeStreamCaptureMode(&mode);
    return status;
}

static cudaError_t copy_work(void *to, const void *from, size_t bytes, cudaStream_t stream)
{
    return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}

static cudaError_t zero_work(void *to, const void *from, size_t bytes, cudaStream_t stream)
{
    (void)from;
    return cudaMemsetAsync(to, 0, bytes, stream);
}

ep_status epi_gpu_put(void *device, const void *host, size_t bytes)
{
    return blocking(copy_work, device, host, bytes);
}

ep_status epi_gpu_get(void *host, const void *device, size_t bytes)
{
    return blocking(copy_work, host, device, bytes);
}

ep_status epi_gpu_zero(void *device, size_t bytes)
{
    return blocking(zero_work, device, NULL, bytes);
}

ep_status epi_gpu_copy(void *to, const void *from, size_t bytes, void *stream)
{
    if (bytes == 0)
        return EP_OK;
    return CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, (cudaStream_t)stream));
}

ep_status epi_gpu_copy_rows(void *to, size_t to_stride, const void *from, size_t from_stride,
                            size_t row_bytes, size_t rows, void *stream)
{
    if (row_bytes == 0 || rows == 0)
        return EP_OK;
    if (to_stride == row_bytes && from_stride == row_bytes)
        return epi_gpu_copy(to, from, row_bytes * rows, stream);
    return CHECK(cudaMemcpy2DAsync(to, to_stride, from, from_stride, row_bytes, rows,
                                   cudaMemcpyDefault, (cudaStream_t)stream));
}

ep_status epi_gpu_event_create(void **event)
{
    return CHECK(cudaEventCreateWithFlags((cudaEvent_t *)event, cudaEventDisableTiming));
}

void epi_gpu_event_destroy(void *event)
{
    if (event)
        cudaEventDestroy((cudaEvent_t)event);
}

ep_status epi_gpu_event_record(void *event, void *stream)
{
    return CHECK(cudaEventRecord((cudaEvent_t)event, (cudaStream_t)stream));
}

ep_status epi_gpu_event_query(void *event)
{
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    EPI_TRY(CHECK(cudaThreadExchangeStreamCaptureMode(&mode)));
    cudaError_t error = cudaEventQuery((cudaEvent_t)event);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error == cudaErrorNotReady ? EP_IN_PROGRESS
                                      : epi_gpu_check((int)error, "cudaEventQuery");
}

ep_status epi_gpu_event_wait(void *event)
{
    ep_status status;
    RELAXED(status, cudaEventSynchronize((cudaEvent_t)event));
    return status;
}

ep_status epi_gpu_stream_wait_event(void *stream, void *event)
{
    return CHECK(cudaStreamWaitEvent((cudaStream_t)stream, (cudaEvent_t)event, 0));
}

ep_status epi_gpu_is_capturing(void *stream, bool *capturing)
{
    enum cudaStreamCaptureStatus status;
    EPI_TRY(CHECK(cudaStreamIsCapturing((cudaStream_t)stream, &status)));
    *capturing = status != cudaStreamCaptureStatusNone;
    return EP_OK;
}

ep_status epi_gpu_stream_create(void **stream)
{
    return CHECK(cudaStreamCreateWithFlags((cudaStream_t *)stream, cudaStreamNonBlocking));
}

void epi_gpu_stream_destroy(void *stream)
{
    if (stream)
        cudaStreamDestroy((cudaStream_t)stream);
}
