/* SPDX-License-Identifier: MIT */
/* Tests of CUDA buffers alone: a rank with its buffer, and small calls on it. */
#ifndef EP_TEST_CUDA_H
#define EP_TEST_CUDA_H

#include "entrepot/low_latency.h"

#include "support/ranks.h"
#include "support/tensors.h"

#include <stdbool.h>

/* Whether there is a device, found out in a process of its own: ranks are forked later. Also makes
   CUDA the device of this program's tensors. */
bool cuda_present(void);

/* One rank of a test: every token goes to every expert, and each rank has one expert. */
struct cuda_rank {
    ep_group *group;
    ep_buffer *buffer;
    int rank, num_ranks;
    int64_t num_tokens, hidden;
    ep_tensor x, ids;
};

/* `window_bytes` as in ep_buffer_config. The rows of `x` tell token and rank. */
int cuda_open(ep_group *group, size_t window_bytes, int verify, int64_t num_tokens, int64_t hidden,
              struct cuda_rank *rank);
void cuda_close(struct cuda_rank *rank);

/* Dispatches x; `worst` is num_worst_tokens, `handle` makes it cached. */
ep_status cuda_dispatch(struct cuda_rank *rank, int64_t worst, ep_handle *handle, ep_recv *recv,
                        ep_event **event);
/* Arguments of a low-latency dispatch of x, and of a combine of a dispatch's rows as they are into
   x's place: a test changes what it is about. */
ep_ll_dispatch_args cuda_ll_dispatch_args(const struct cuda_rank *rank);
ep_combine_args cuda_combine_args(const struct cuda_rank *rank, const ep_recv *recv);
/* Releases result and handle of a dispatch. */
void cuda_drop(ep_recv *recv);
/* Whether row i of `rows` is that of token i % T of rank i / T. */
int cuda_rows_differ(const struct cuda_rank *rank, const ep_tensor *rows);
/* Reads device memory. */
void cuda_read(const struct cuda_rank *rank, void *to, const void *from, size_t bytes);
/* Whether the last error of this thread holds every one of `parts`, which NULL ends. */
bool cuda_says(const char *const *parts);
#define CUDA_SAYS(...) cuda_says((const char *const[]){__VA_ARGS__, NULL})

#endif
