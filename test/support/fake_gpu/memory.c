/* SPDX-License-Identifier: MIT */
/* Device memory that is the process's own, and peers' as addresses that nobody may touch. */
#include "base/error.h"
#include "device/gpu.h"
#include "state.h"
#include "transport/peer.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define DEVICE_BYTES ((size_t)64 << 30)
#define PAGE ((size_t)4096)

typedef struct allocation {
    uint8_t *memory;
    size_t bytes;
    uint64_t identity;
    struct allocation *next;
} allocation;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static allocation *allocations;
static uint64_t identities;

static bool has_room(size_t bytes)
{
    size_t most = fake_gpu_state.memory_bytes ? fake_gpu_state.memory_bytes : DEVICE_BYTES;
    return bytes <= most && fake_gpu_state.allocated_bytes <= most - bytes;
}

/* Pages of their own, backed once they are touched: windows of tests may be large. */
static allocation *new_allocation(size_t bytes)
{
    allocation *fresh = malloc(sizeof *fresh);
    void *memory = fresh ? mmap(NULL, (bytes + PAGE - 1) / PAGE * PAGE, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
                         : MAP_FAILED;
    if (memory == MAP_FAILED) {
        free(fresh);
        return NULL;
    }
    *fresh = (allocation){.memory = memory, .bytes = bytes, .identity = ++identities};
    return fresh;
}

ep_status epi_gpu_alloc(size_t bytes, void **memory)
{
    *memory = NULL;
    pthread_mutex_lock(&lock);
    allocation *fresh = bytes && has_room(bytes) ? new_allocation(bytes) : NULL;
    if (fresh) {
        fresh->next = allocations;
        allocations = fresh;
        fake_gpu_state.num_allocations++;
        fake_gpu_state.allocated_bytes += bytes;
        *memory = fresh->memory;
    }
    pthread_mutex_unlock(&lock);
    return fresh ? EP_OK : epi_fail(EP_ERR_MEMORY, "cudaMalloc: out of memory (fake)");
}

/* Of something that was not allocated, or freed before: the program's error. */
void epi_gpu_free(void *memory)
{
    if (!memory)
        return;
    pthread_mutex_lock(&lock);
    allocation **at = &allocations;
    while (*at && (*at)->memory != memory)
        at = &(*at)->next;
    allocation *gone = *at;
    if (!gone)
        abort();
    *at = gone->next;
    fake_gpu_state.num_allocations--;
    fake_gpu_state.allocated_bytes -= gone->bytes;
    pthread_mutex_unlock(&lock);
    munmap(gone->memory, (gone->bytes + PAGE - 1) / PAGE * PAGE);
    free(gone);
}

ep_status epi_gpu_host_alloc(size_t bytes, void **memory)
{
    *memory = calloc(1, bytes);
    return *memory ? EP_OK : epi_fail(EP_ERR_MEMORY, "cudaHostAlloc: out of memory (fake)");
}

void epi_gpu_host_free(void *memory)
{
    free(memory);
}

/* ---------------------------------------------------------------- copies */

ep_status epi_gpu_put(void *device, const void *host, size_t bytes)
{
    memcpy(device, host, bytes);
    return EP_OK;
}

ep_status epi_gpu_get(void *host, const void *device, size_t bytes)
{
    memcpy(host, device, bytes);
    return EP_OK;
}

ep_status epi_gpu_zero(void *device, size_t bytes)
{
    memset(device, 0, bytes);
    return EP_OK;
}

ep_status epi_gpu_copy(void *to, const void *from, size_t bytes, void *stream)
{
    (void)stream;
    if (bytes)
        memcpy(to, from, bytes);
    return EP_OK;
}

ep_status epi_gpu_copy_rows(void *to, size_t to_stride, const void *from, size_t from_stride,
                            size_t row_bytes, size_t rows, void *stream)
{
    (void)stream;
    for (size_t i = 0; i < rows && row_bytes; i++)
        memcpy((char *)to + i * to_stride, (const char *)from + i * from_stride, row_bytes);
    return EP_OK;
}

/* ---------------------------------------------------------------- peers */

ep_status epi_peer_identify(const void *memory, epi_peer_handle *handle)
{
    ep_status status = EP_ERR_UNSUPPORTED;
    memset(handle, 0, sizeof *handle);
    pthread_mutex_lock(&lock);
    for (const allocation *each = allocations; each; each = each->next)
        if ((const uint8_t *)memory >= each->memory &&
            (const uint8_t *)memory < each->memory + each->bytes) {
            handle->base = (uint64_t)(uintptr_t)each->memory;
            handle->size = each->bytes;
            handle->identity = each->identity;
            status = EP_OK;
        }
    pthread_mutex_unlock(&lock);
    return status;
}

ep_status epi_peer_export(const void *memory, epi_peer_handle *handle)
{
    EPI_TRY(epi_peer_identify(memory, handle));
    handle->process = (uint64_t)getpid();
    return EP_OK;
}

/* Addresses, in nobody's use, that fault when they are touched. */
ep_status epi_peer_open(const epi_peer_handle *handle, void **memory)
{
    *memory = NULL;
    if (fake_gpu_state.maps_until_failure && --fake_gpu_state.maps_until_failure == 0)
        return epi_fail(EP_ERR_DEVICE, "cudaIpcOpenMemHandle: invalid argument (fake)");
    *memory =
        mmap(NULL, handle->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*memory == MAP_FAILED) {
        *memory = NULL;
        return epi_fail(EP_ERR_DEVICE, "cudaIpcOpenMemHandle: no addresses (fake)");
    }
    __atomic_fetch_add(&fake_gpu_state.num_mappings, 1, __ATOMIC_RELAXED);
    return EP_OK;
}

void epi_peer_close(const epi_peer_handle *handle, void *memory)
{
    if (munmap(memory, handle->size) != 0)
        abort(); /* not one of those */
    __atomic_fetch_sub(&fake_gpu_state.num_mappings, 1, __ATOMIC_RELAXED);
}
