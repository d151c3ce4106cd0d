/* SPDX-License-Identifier: MIT */
/*
 * Accelerators: which there are, their memory and streams. A program that has
 * its own runtime (CUDA, PyTorch) needs none of this: pointers and streams of
 * that runtime are what the other calls take. It serves programs that link
 * nothing of the kind.
 *
 * Support for CUDA is a module, libentrepot_cuda.so, opened by the first call
 * that needs it: beside this library, in ../lib of the program's folder, then
 * where the system looks; EP_CUDA_MODULE of the environment names another file.
 * Every call returns EP_ERR_UNSUPPORTED where there is no module, driver or
 * device, and EP_ERR_DEVICE with the name of the driver's call when one fails.
 * All calls may be made by any thread.
 */
#ifndef ENTREPOT_DEVICE_H
#define ENTREPOT_DEVICE_H

#include "entrepot/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ep_device_info {
    size_t size;           /**< sizeof(ep_device_info), set by the caller */
    char name[96];         /**< as the driver names it */
    int32_t compute_major; /**< compute capability; 8.0 and up are supported */
    int32_t compute_minor;
    int32_t multiprocessors;
    int64_t memory_bytes;
    int32_t driver_version; /**< 1000 * major + 10 * minor of the CUDA it supports */
} ep_device_info;

/** How many devices of a kind there are; 0 without error where support is merely absent. */
EP_API ep_status ep_device_count(ep_device_type type, int32_t *count);
/** Fills `info` up to its size. */
EP_API ep_status ep_device_query(ep_device_type type, int32_t index, ep_device_info *info);

/** Device memory aligned to 256 bytes, contents undefined. Free with ep_device_free(). Calls on a
    buffer of the same device should not run meanwhile: the driver may wait for their kernels. */
EP_API ep_status ep_device_alloc(ep_device_type type, int32_t index, size_t bytes, void **memory);
EP_API ep_status ep_device_free(ep_device_type type, int32_t index, void *memory);
/** Copies `bytes` between host and device memory, either way, after all work in `stream`; returns
    when done. */
EP_API ep_status ep_device_copy(ep_device_type type, int32_t index, void *to, const void *from,
                                size_t bytes, void *stream);

/** A stream that no other one waits for implicitly. */
EP_API ep_status ep_stream_create(ep_device_type type, int32_t index, void **stream);
EP_API ep_status ep_stream_destroy(ep_device_type type, int32_t index, void *stream);
/** Waits until all work in `stream` is done. */
EP_API ep_status ep_stream_wait(ep_device_type type, int32_t index, void *stream);

/** Marks a point in a stream and measures the time between two; milliseconds in float. */
EP_API ep_status ep_timer_create(ep_device_type type, int32_t index, void **timer);
EP_API ep_status ep_timer_destroy(ep_device_type type, int32_t index, void *timer);
EP_API ep_status ep_timer_mark(ep_device_type type, int32_t index, void *timer, void *stream);
/** Waits for both marks. */
EP_API ep_status ep_timer_between(ep_device_type type, int32_t index, void *from, void *to,
                                  float *milliseconds);

/** Records work put into `stream` between the two calls as a graph, to be run again and again. */
EP_API ep_status ep_graph_begin(ep_device_type type, int32_t index, void *stream);
EP_API ep_status ep_graph_end(ep_device_type type, int32_t index, void *stream, void **graph);
EP_API ep_status ep_graph_launch(ep_device_type type, int32_t index, void *graph, void *stream);
EP_API ep_status ep_graph_destroy(ep_device_type type, int32_t index, void *graph);

#ifdef __cplusplus
}
#endif
#endif
