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
    int64_t agreed[EPI_NUM_AGREED];
    bool scales_by_column;
    bool setup; /* this call makes the memory of its shape */
    epi_ll *ll; /* held; NULL before there is any */
    int slot;
    uint64_t turn;     /* of ll->calls, once its slot is taken */
    ep_handle *handle; /* held, once sent */
} epi_ll_dispatch;

/* The result that will be the caller's. */
static inline epi_ll_result *epi_ll_result_of(const epi_ll_dispatch *dispatch)
{
    return dispatch->handle->ll;
}

/* Fills recv, which holds the result from then on: places are known before rows arrive. */
void epi_ll_describe(epi_ll_dispatch *dispatch);

/* Everybody's tokens can be read: packs this rank's rows and fills the result. */
ep_status epi_ll_receive(epi_ll_dispatch *dispatch);

#endif
