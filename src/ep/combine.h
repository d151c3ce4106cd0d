/* SPDX-License-Identifier: MIT */
/* A combine in progress; also the backward of dispatch, which is one. */
#ifndef EPI_EP_COMBINE_H
#define EPI_EP_COMBINE_H

#include "ep/call.h"
#include "ep/handle.h"

typedef struct epi_combine {
    epi_op op;
    ep_handle *handle; /* held */
    ep_tensor y, bias[2], out;
    ep_tensor row_weights;  /* [rows, K] or [rows, 1] at the expert side, brought along */
    ep_tensor out_weights;  /* [T, K] */
    ep_tensor topk_weights; /* [T, K] applied here; by expert */
    bool weighted;
    epi_exposed exposed;
    struct epi_reduce_part *parts; /* [team parts] */
} epi_combine;

/* Sums every token's rows into out. */
ep_status epi_combine_reduce(epi_combine *combine);
ep_status epi_combine_new_parts(epi_combine *combine);
void epi_combine_free_parts(epi_combine *combine);

#endif
