/* SPDX-License-Identifier: MIT */
/* Kernels of verify mode: what a dispatch received, and the seals of what a combine lets read. */
#include "ep/cuda/checksum.cuh"
#include "ep/cuda/exchange.cuh"
#include "ep/cuda/kernels.h"

/* Where a row of the result belongs. */
typedef struct epc_origin {
    bool used;
    int source; /* by token; -1: not known */
    bool first; /* of its source's */
} epc_origin;

/* The last i with offset[i] <= row. */
static __device__ int epc_find_group(const int32_t *offset, int count, int64_t row)
{
    int low = 0, high = count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (offset[middle] <= row)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

static __device__ epc_origin epc_origin_of(const epc_dispatch_params *p, int64_t row)
{
    epc_origin origin = {false, -1, true};
    int ranks = p->comm.num_ranks;
    if (p->by_expert) {
        int local = p->num_local ? epc_find_group(p->expert_offset, p->num_local, row) : 0;
        origin.used =
            p->num_local && row - p->expert_offset[local] < (int64_t)p->expert_filled[local];
    } else if (row < p->source_offset[ranks]) {
        origin.used = true;
        origin.source = epc_find_group(p->source_offset, ranks, row);
        origin.first = row == p->source_offset[origin.source];
    }
    return origin;
}

/* One bit of a row is wrong, as a test wants it. */
static __device__ void epc_flip(uint8_t *row, int64_t bytes)
{
    __syncwarp();
    if (epc_lane() == 0)
        row[bytes / 2] ^= 4;
    __syncwarp();
}

static __device__ void epc_check_row(const epc_dispatch_params *p, const epc_region *at,
                                     int64_t row)
{
    epc_origin origin = epc_origin_of(p, row);
    const int32_t *tokens = (const int32_t *)p->region;
    uint8_t *x = p->region + at->x + row * p->shape.row_bytes;
    if (!origin.used)
        return;
    if (row == p->flip - 1)
        epc_flip(x, p->shape.row_bytes);
    epc_seal seal = ((const epc_seal *)(p->region + at->checksums))[row];
    int32_t token = tokens[row], before = origin.first ? -1 : tokens[row - 1];
    uint64_t sum = epc_sum_row(x, p->shape.row_bytes,
                               (const uint32_t *)(p->region + at->scales) + row * p->scale_count, 1,
                               p->scale_count, token);
    if (epc_lane() != 0)
        return;
    int source = origin.source >= 0 ? origin.source : seal.rank;
    if (sum != seal.sum || source != seal.rank)
        epc_fail_call(p->comm.state, EPC_FAIL_CORRUPT, (uint32_t)row, (uint32_t)source,
                      EPC_CORRUPT_ROW, (uint32_t)token, 0);
    else if (!p->by_expert && token <= before) /* so none is missing, and none there twice */
        epc_fail_call(p->comm.state, EPC_FAIL_CORRUPT, (uint32_t)row, (uint32_t)source,
                      EPC_CORRUPT_ORDER, (uint32_t)token, (uint32_t)before);
}

/* Behind the dispatch, which left the report open for it. */
__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_check_rows_kernel(const __grid_constant__ epc_dispatch_params p)
{
    epc_call call = epc_begin_call(&p.comm, p.timeout_ns);
    bool whole = p.comm.state->failed != p.comm.state->epoch;
    int64_t rows = whole ? p.rows_at[p.comm.rank] : 0;
    epc_region at = epc_region_of(&p.shape, rows);
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x);
    for (int64_t row = epc_warp() * (int)gridDim.x + (int)blockIdx.x; row < rows; row += warps)
        epc_check_row(&p, &at, row);
    if (epc_is_last_to_add(&call.state->exited) && threadIdx.x == 0)
        epc_report_end(call.state, p.report, whole ? p.serial : 0);
}

__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_seal_rows_kernel(const __grid_constant__ epc_seal_params p)
{
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x);
    for (int64_t i = epc_warp() * (int)gridDim.x + (int)blockIdx.x; i < p.rows; i += warps) {
        uint8_t *row = p.y + i * p.stride;
        uint64_t sum = epc_sum_bytes(row, p.row_bytes);
        if (epc_lane() == 0)
            p.sums[i] = sum;
        if (i == p.flip - 1)
            epc_flip(row, p.row_bytes);
    }
}

extern "C" int epc_verify_prepare(void)
{
    cudaFuncAttributes unused; /* asking loads a kernel */
    cudaError_t error = cudaFuncGetAttributes(&unused, (const void *)epc_check_rows_kernel);
    if (error == cudaSuccess)
        error = cudaFuncGetAttributes(&unused, (const void *)epc_seal_rows_kernel);
    return (int)error;
}

static int epc_start(const void *kernel, int blocks, void *params, void *stream)
{
    void *arguments[] = {params};
    return (int)cudaLaunchKernel(kernel, dim3((unsigned)blocks), dim3(EPC_THREADS), arguments, 0,
                                 (cudaStream_t)stream);
}

extern "C" int epc_check_rows_launch(const epc_dispatch_params *params, int blocks, void *stream)
{
    return epc_start((const void *)epc_check_rows_kernel, blocks, (void *)params, stream);
}

extern "C" int epc_seal_rows_launch(const epc_seal_params *params, int blocks, void *stream)
{
    return epc_start((const void *)epc_seal_rows_kernel, blocks, (void *)params, stream);
}
