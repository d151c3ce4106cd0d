/* SPDX-License-Identifier: MIT */
/* A low-latency dispatch in progress. */
#ifndef EPI_EP_LL_DISPATCH_H
#define EPI_EP_LL_DISPATCH_H

#include "ep/dispatch.h"
#include "ep/ll.h"

typedef struct epi_ll_dispatch {
    epi_op op;
    ep_ll_recv *recv;
    ep_tensor x, topk_idx, expert_tokens, wait_cost;
    const int32_t *expert_rank;
    epi_ll_shape shape;
    bool setup; /* this call makes the memory of its shape */
    epi_ll *ll; /* held */
    int slot;
    epi_ll_result *result;
    bool described; /* recv holds the result, which is the caller's to release */
} epi_ll_dispatch;

/* Makes a result that holds `ll`. */
ep_status epi_ll_result_new(epi_ll *ll, int slot, uint64_t epoch, int64_t num_tokens,
                            epi_ll_result **result);

/* Fills recv: places are known before rows arrive. From then on it holds the result. */
ep_status epi_ll_describe(epi_ll_dispatch *dispatch);

/* Everybody's tokens can be read: packs this rank's rows and fills the result. */
ep_status epi_ll_receive(epi_ll_dispatch *dispatch);

#endif
