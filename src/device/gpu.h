/* SPDX-License-Identifier: MIT */
/*
 * A GPU as the code of a device module sees it, without the runtime's headers.
 * Implemented in the module's folder; part of the module, not of the core.
 * Failures name the runtime's call.
 */
#ifndef EPI_DEVICE_GPU_H
#define EPI_DEVICE_GPU_H

#include "entrepot/status.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct epi_gpu_info {
    int compute; /* 10 * major + minor */
    int multiprocessors;
    int max_shared; /* bytes of dynamic shared memory a block may have */
    uint8_t uuid[16];
} epi_gpu_info;

/* Reports the runtime's error `code`, 0 being none, of `call`. */
ep_status epi_gpu_check(int code, const char *call);

/* Makes `index` the calling thread's device and returns which was before. */
ep_status epi_gpu_enter(int index, int *before);
void epi_gpu_leave(int before);

ep_status epi_gpu_info_of(int index, epi_gpu_info *info);
ep_status epi_gpu_alloc(size_t bytes, void **memory);
void epi_gpu_free(void *memory);
/* Host memory that kernels see at the same address; zero at first. */
ep_status epi_gpu_host_alloc(size_t bytes, void **memory);
void epi_gpu_host_free(void *memory);
/* Blocking, on a stream of its own: allowed while another stream is being captured. */
ep_status epi_gpu_put(void *device, const void *host, size_t bytes);
ep_status epi_gpu_get(void *host, const void *device, size_t bytes);
ep_status epi_gpu_zero(void *device, size_t bytes);
/* In stream order. */
ep_status epi_gpu_copy(void *to, const void *from, size_t bytes, void *stream);
ep_status epi_gpu_copy_rows(void *to, size_t to_stride, const void *from, size_t from_stride,
                            size_t row_bytes, size_t rows, void *stream);

ep_status epi_gpu_event_create(void **event);
void epi_gpu_event_destroy(void *event);
ep_status epi_gpu_event_record(void *event, void *stream);
/* EP_IN_PROGRESS while the work before the event is not done. */
ep_status epi_gpu_event_query(void *event);
ep_status epi_gpu_event_wait(void *event);
ep_status epi_gpu_stream_wait_event(void *stream, void *event);
ep_status epi_gpu_is_capturing(void *stream, bool *capturing);
ep_status epi_gpu_stream_create(void **stream);
void epi_gpu_stream_destroy(void *stream);

#endif
