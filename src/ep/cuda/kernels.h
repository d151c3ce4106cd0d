/* SPDX-License-Identifier: MIT */
/* The kernels as host code starts them. Return values are cudaError_t. */
#ifndef EPI_EP_CUDA_KERNELS_H
#define EPI_EP_CUDA_KERNELS_H

#include "ep/cuda/shared.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Shared memory of a dispatch: its tables, then either the layout's words or the rows' stages. */
size_t epc_dispatch_tables_bytes(int ranks, int columns, int sums);
size_t epc_layout_bytes(int ranks, int experts, int by_expert, int warps);

/* Loads the kernel, so that no launch has to while a peer's kernel waits. */
int epc_dispatch_prepare(int max_shared);
int epc_dispatch_launch(const epc_dispatch_params *params, int blocks, size_t shared, void *stream);

int epc_combine_prepare(int max_shared);
int epc_combine_launch(const epc_combine_params *params, int blocks, size_t shared, void *stream);

/* Verify mode: behind a dispatch, in place of whose end the report is written; before a combine. */
int epc_verify_prepare(void);
int epc_check_rows_launch(const epc_dispatch_params *params, int blocks, void *stream);
int epc_seal_rows_launch(const epc_seal_params *params, int blocks, void *stream);

/* Halves of a call, and whole calls. */
enum {
    EPC_LL_SEND,
    EPC_LL_RECEIVE,
    EPC_LL_OUTPUTS,
    EPC_LL_COMBINE,
    EPC_LL_DISPATCH,
    EPC_LL_COMBINE_BOTH
};
/* A block's tables in a receive; `words` of a bitmap, or of the marks of one that is not in them. A
   send needs 4 bytes for each (expert of the block, word). */
size_t epc_ll_tables_bytes(int ranks, int num_local, int words);
int epc_ll_prepare(int max_shared);
int epc_ll_launch(int which, const epc_ll_params *params, int blocks, size_t shared, void *stream);

/* Where the tokens of a batch go; see ep_layout_on_stream. */
typedef struct epc_layout_params {
    const void *ids;
    int64_t tokens, stride; /* of the ids, in elements */
    int32_t topk, wide;     /* ids a token; whether they are of 8 bytes */
    int32_t num_experts, num_ranks, ranks_per_node;
    const int32_t *expert_rank;
    int32_t *per_rank, *per_node, *per_expert;
    uint8_t *in_rank;
} epc_layout_params;
int epc_layout_prepare(void);
int epc_layout_launch(const epc_layout_params *params, void *stream);

#ifdef __cplusplus
}
#endif
#endif
