/* SPDX-License-Identifier: MIT */
/*
 * Where the tokens of a batch go, without a call that other ranks take part in.
 * Each block counts for a few experts, ranks or nodes and looks at all ids, so
 * that nothing must be zero before and no block waits for another.
 */
#include "ep/cuda/device.cuh"
#include "ep/cuda/kernels.h"

#define EPC_COLUMNS 32 /* experts, ranks or nodes of a block */

static __device__ __forceinline__ int64_t epc_id_at(const epc_layout_params &p, int64_t token,
                                                    int k)
{
    int64_t at = token * p.stride + k;
    return p.wide ? ((const int64_t *)p.ids)[at] : ((const int32_t *)p.ids)[at];
}

/* An id that is out of range counts nowhere, nor does one whose rank is. */
static __device__ __forceinline__ int epc_rank_of_id(const epc_layout_params &p, int64_t id)
{
    if (id < 0 || id >= p.num_experts)
        return -1;
    int rank = p.expert_rank ? p.expert_rank[id] : (int)id / (p.num_experts / p.num_ranks);
    return rank < p.num_ranks ? rank : -1;
}

static __device__ void epc_count_experts(const epc_layout_params &p, int first, int *count)
{
    for (int64_t t = threadIdx.x; t < p.tokens; t += blockDim.x)
        for (int k = 0; k < p.topk; k++) {
            int64_t column = epc_id_at(p, t, k) - first;
            if (column >= 0 && column < EPC_COLUMNS)
                atomicAdd(count + column, 1);
        }
}

/* Bit c: the token goes to column first + c, which is `ranks` ranks. */
static __device__ uint32_t epc_columns_of(const epc_layout_params &p, int64_t token, int first,
                                          int ranks)
{
    uint32_t mask = 0;
    for (int k = 0; k < p.topk; k++) {
        int rank = epc_rank_of_id(p, epc_id_at(p, token, k));
        int column = rank / ranks - first;
        if (rank >= 0 && column >= 0 && column < EPC_COLUMNS)
            mask |= 1u << column;
    }
    return mask;
}

/* Each token once a column, however many of its experts are there. */
static __device__ void epc_count_columns(const epc_layout_params &p, int first, int width,
                                         int ranks, int *count, uint8_t *in_rank)
{
    int mine = 0;
    for (int64_t base = epc_warp() * EPC_WARP; base < p.tokens; base += blockDim.x) {
        int64_t token = base + epc_lane();
        uint32_t mask = token < p.tokens ? epc_columns_of(p, token, first, ranks) : 0;
        for (int c = 0; c < width; c++) {
            if (in_rank && token < p.tokens)
                in_rank[token * p.num_ranks + first + c] = mask >> c & 1;
            uint32_t lanes = __ballot_sync(EPC_ALL, mask >> c & 1);
            mine += c == epc_lane() ? __popc(lanes) : 0;
        }
    }
    if (mine)
        atomicAdd(count + epc_lane(), mine);
}

/* What the rows of the grid count. */
enum { EPC_OF_RANKS, EPC_OF_EXPERTS, EPC_OF_NODES };

__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_layout_kernel(const __grid_constant__ epc_layout_params p)
{
    __shared__ int count[EPC_COLUMNS];
    int of = (int)blockIdx.y, ranks = of == EPC_OF_NODES ? p.ranks_per_node : 1;
    int columns = of == EPC_OF_EXPERTS ? p.num_experts : p.num_ranks / ranks;
    int *out = of == EPC_OF_EXPERTS ? p.per_expert : of == EPC_OF_RANKS ? p.per_rank : p.per_node;
    uint8_t *in_rank = of == EPC_OF_RANKS ? p.in_rank : NULL;
    int first = (int)blockIdx.x * EPC_COLUMNS, width = min(EPC_COLUMNS, columns - first);
    if (width <= 0 || (!out && !in_rank))
        return;
    if (threadIdx.x < EPC_COLUMNS)
        count[threadIdx.x] = 0;
    __syncthreads();
    if (of == EPC_OF_EXPERTS)
        epc_count_experts(p, first, count);
    else
        epc_count_columns(p, first, width, ranks, count, in_rank);
    __syncthreads();
    if (out && (int)threadIdx.x < width)
        out[first + threadIdx.x] = count[threadIdx.x];
}

extern "C" int epc_layout_prepare(void)
{
    cudaFuncAttributes unused; /* asking loads a kernel */
    return (int)cudaFuncGetAttributes(&unused, (const void *)epc_layout_kernel);
}

extern "C" int epc_layout_launch(const epc_layout_params *params, void *stream)
{
    int most = params->num_ranks > params->num_experts ? params->num_ranks : params->num_experts;
    dim3 grid((unsigned)((most + EPC_COLUMNS - 1) / EPC_COLUMNS), params->per_node ? 3 : 2);
    void *arguments[] = {(void *)params};
    return (int)cudaLaunchKernel((const void *)epc_layout_kernel, grid, dim3(EPC_THREADS),
                                 arguments, 0, (cudaStream_t)stream);
}
