/* SPDX-License-Identifier: MIT */
/* A GPU for commands: memory filled from and read to the host, and time measured in a stream. */
#ifndef APPS_GPU_H
#define APPS_GPU_H

#include "copy_limit.h"
#include "ranks.h"

#include "entrepot/device.h"
#include "entrepot/ep.h"

#include <stdbool.h>

#define GPU_MAX_MARKS 4096

typedef struct gpu {
    int index;
    void *stream;
    void *mark[GPU_MAX_MARKS]; /* points in the stream; made when first used */
    int64_t sms;               /* quota of calls; 0: the default */
} gpu;

/*
 * What a command does before it starts ranks on GPUs: looks whether there are
 * any, from a child, since a process that has touched a device can't fork ranks
 * that do; starts MPS if asked, or warns when ranks have to share a GPU without.
 * False after a message of what is missing and what to do.
 */
bool gpu_prepare(const char *command, int ranks, bool mps);

/* The device of a rank: ranks take turns over those there are. EP_ERR_UNSUPPORTED without any. */
ep_status gpu_open(gpu *g, int rank);
void gpu_close(gpu *g);

/* Device memory with a copy of `bytes` from `host`, or with contents undefined when it is NULL. */
ep_status gpu_new(gpu *g, const void *host, size_t bytes, void **memory);
void gpu_free(gpu *g, void *memory);
/* Host memory with a copy; NULL when out of memory or the copy fails. free() it. */
void *gpu_read(gpu *g, const void *memory, size_t bytes);
ep_status gpu_write(gpu *g, void *memory, const void *host, size_t bytes);

/* Descriptors of device memory. */
ep_tensor gpu_tensor(const gpu *g, void *data, ep_dtype dtype, int64_t rows, int64_t columns);
/* Replaces a tensor's data by a host copy; free(tensor->data). False: out of memory. */
bool gpu_to_host(gpu *g, ep_tensor *tensor);

ep_status gpu_mark(gpu *g, int i);
/* Microseconds between two marks; waits for the later one. */
ep_status gpu_between(gpu *g, int from, int to, double *us);
ep_status gpu_wait(gpu *g);

/* How fast all ranks together copy device memory: `bytes` to and fro between `a` and `b`,
   2 * COPY_ROUNDS times, each noted in rounds[i * num_ranks + rank]. Collective. */
ep_status gpu_copy_limit(gpu *g, rank_self *self, copy_round *rounds, void *a, void *b,
                         size_t bytes);

/*
 * A control daemon of NVIDIA MPS with folders of its own, so that kernels of
 * several processes run at once. Starting sets the environment by which
 * processes forked later find it. Ended by mps_stop, or when this process ends,
 * also when it is killed.
 */
bool mps_start(const char *command); /* false after a message */
void mps_stop(void);
/* Whether a daemon seems to run where processes forked now would look for it. */
bool mps_runs(void);

#endif
