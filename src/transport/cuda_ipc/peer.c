/* SPDX-License-Identifier: MIT */
/* Device memory shared by CUDA IPC, between processes and threads of a host. */
#include "transport/peer.h"

#include "base/error.h"
#include "device/gpu.h"
#include "transport/cuda_ipc/process.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <string.h>

#define CHECK(call) epi_gpu_check((int)(call), #call)

/* Calls of the driver, found at run time so that nothing links to it. */
static struct {
    CUresult (*range)(CUdeviceptr *base, size_t *size, CUdeviceptr address);
    CUresult (*attribute)(void *value, CUpointer_attribute which, CUdeviceptr address);
} driver;

static ep_status find(const char *name, void **function)
{
    enum cudaDriverEntryPointQueryResult result;
    EPI_TRY(
        CHECK(cudaGetDriverEntryPointByVersion(name, function, 12000, cudaEnableDefault, &result)));
    return *function ? EP_OK : epi_fail(EP_ERR_UNSUPPORTED, "the CUDA driver has no %s", name);
}

static ep_status load_driver(void)
{
    if (driver.range && driver.attribute)
        return EP_OK;
    EPI_TRY(find("cuMemGetAddressRange", (void **)&driver.range));
    return find("cuPointerGetAttribute", (void **)&driver.attribute);
}

ep_status epi_peer_identify(const void *memory, epi_peer_handle *handle)
{
    CUdeviceptr base;
    size_t size;
    unsigned long long identity = 0;
    EPI_TRY(load_driver());
    CUresult result = driver.range(&base, &size, (CUdeviceptr)(uintptr_t)memory);
    if (result != CUDA_SUCCESS)
        return epi_fail(EP_ERR_UNSUPPORTED, "cuMemGetAddressRange: error %d for %p", (int)result,
                        memory);
    result = driver.attribute(&identity, CU_POINTER_ATTRIBUTE_BUFFER_ID, base);
    if (result != CUDA_SUCCESS)
        return epi_fail(EP_ERR_UNSUPPORTED, "cuPointerGetAttribute: error %d for %p", (int)result,
                        memory);
    memset(handle, 0, sizeof *handle);
    handle->process = epi_process_number();
    handle->base = (uint64_t)base;
    handle->size = size;
    handle->identity = identity;
    return CHECK(cudaGetDevice(&handle->device));
}

ep_status epi_peer_export(const void *memory, epi_peer_handle *handle)
{
    cudaIpcMemHandle_t name;
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed; /* whatever is captured now */
    _Static_assert(sizeof name <= sizeof handle->bytes, "the driver's name fits");
    EPI_TRY(epi_peer_identify(memory, handle));
    EPI_TRY(CHECK(cudaThreadExchangeStreamCaptureMode(&mode)));
    cudaError_t error = cudaIpcGetMemHandle(&name, (void *)(uintptr_t)handle->base);
    cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != cudaSuccess) {
        cudaGetLastError();
        return epi_fail(EP_ERR_UNSUPPORTED, "cudaIpcGetMemHandle: %s", cudaGetErrorString(error));
    }
    memcpy(handle->bytes, &name, sizeof name);
    return EP_OK;
}

static int same_process(const epi_peer_handle *handle)
{
    return handle->process == epi_process_number();
}

/* Ranks as threads: the address is the same, the other device may need permission. */
static ep_status reach_device(int other)
{
    int mine, can;
    EPI_TRY(CHECK(cudaGetDevice(&mine)));
    if (other == mine)
        return EP_OK;
    EPI_TRY(CHECK(cudaDeviceCanAccessPeer(&can, mine, other)));
    if (!can)
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "cudaDeviceCanAccessPeer: device %d can't reach device %d", mine, other);
    cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled) {
        cudaGetLastError();
        return EP_OK;
    }
    return epi_gpu_check((int)error, "cudaDeviceEnablePeerAccess");
}

ep_status epi_peer_open(const epi_peer_handle *handle, void **memory)
{
    if (same_process(handle)) {
        *memory = (void *)(uintptr_t)handle->base;
        return reach_device(handle->device);
    }
    cudaIpcMemHandle_t name;
    enum cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    memcpy(&name, handle->bytes, sizeof name);
    EPI_TRY(CHECK(cudaThreadExchangeStreamCaptureMode(&mode)));
    ep_status status = CHECK(cudaIpcOpenMemHandle(memory, name, cudaIpcMemLazyEnablePeerAccess));
    cudaThreadExchangeStreamCaptureMode(&mode);
    return status;
}

void epi_peer_close(const epi_peer_handle *handle, void *memory)
{
    if (!same_process(handle))
        cudaIpcCloseMemHandle(memory);
}
