/* SPDX-License-Identifier: MIT */
/*
 * Where the tensors of the demo's calls are: host memory, or that of the rank's
 * GPU. What the demo itself computes it computes on the host; a mirror is the
 * memory that calls see of host memory, which on the CPU is that very memory.
 */
#ifndef APPS_DEMO_MEMORY_H
#define APPS_DEMO_MEMORY_H

#include "gpu.h"

typedef struct demo_memory {
    bool cuda;
    gpu gpu;
} demo_memory;

ep_status demo_memory_open(demo_memory *m, bool cuda, int rank);
void demo_memory_close(demo_memory *m);

/* A mirror of `bytes` of host memory, with its contents. End it before the host memory. */
ep_status demo_mirror(demo_memory *m, void *host, size_t bytes, void **seen);
void demo_mirror_end(demo_memory *m, void *seen);
/* Contents to the mirror and back; both wait for the calls made so far. */
ep_status demo_mirror_put(demo_memory *m, void *seen, const void *host, size_t bytes);
ep_status demo_mirror_get(demo_memory *m, void *host, const void *seen, size_t bytes);

/* A result of calls as the host can read it; false: out of memory. */
bool demo_view(demo_memory *m, ep_tensor *tensor);
void demo_view_end(demo_memory *m, ep_tensor *tensor);

ep_tensor demo_tensor(const demo_memory *m, void *seen, ep_dtype dtype, int64_t rows,
                      int64_t columns);
/* For calls; NULL on the CPU. */
void *demo_stream(const demo_memory *m);
/* Waits until all calls made so far are done. */
ep_status demo_wait(demo_memory *m);

#endif
