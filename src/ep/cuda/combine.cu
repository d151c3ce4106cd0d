/* SPDX-License-Identifier: MIT */
/*
 * The combine kernel: each rank reads the rows of its tokens from where the
 * expert ranks have them, and sums in float32 in the order of the send list.
 */
#include "ep/cuda/combine_verify.cuh"
#include "ep/cuda/kernels.h"
#include "ep/cuda/stream.cuh"

#define EPC_WEIGHTS_AHEAD 8 /* loads of weights in flight a thread */

/* Sum of the weights that came back for place k of token t. */
static __device__ float epc_sum_weight(const epc_combine_params *p, const epc_combine_sources *from,
                                       int t, int k)
{
    const epc_entry *entries = p->entries + (int64_t)t * p->width;
    int first = p->by_expert ? k : 0; /* by expert: one weight a row, of the k-th place */
    int end = p->by_expert ? k + 1 : p->width, column = p->by_expert ? 0 : k;
    float sum = 0, w[EPC_WEIGHTS_AHEAD];
    for (; first < end; first += EPC_WEIGHTS_AHEAD) {
        epc_entry entry[EPC_WEIGHTS_AHEAD];
#pragma unroll
        for (int i = 0; i < EPC_WEIGHTS_AHEAD; i++)
            entry[i] = first + i < end ? entries[first + i] : -1;
#pragma unroll
        for (int i = 0; i < EPC_WEIGHTS_AHEAD; i++) {
            int rank = (int)(entry[i] >> 32);
            w[i] = 0;
            if (entry[i] >= 0)
                w[i] = from->weights[rank][(int64_t)(uint32_t)entry[i] * from->weight_stride[rank] +
                                           column];
        }
#pragma unroll
        for (int i = 0; i < EPC_WEIGHTS_AHEAD; i++)
            if (entry[i] >= 0)
                sum += w[i];
    }
    return sum;
}

/* Sums of the weights that travel along, one a thread. */
static __device__ __noinline__ void epc_sum_weights(const epc_combine_params *p,
                                                    const epc_combine_sources *from)
{
    int64_t sums = (int64_t)p->num_tokens * p->topk, step = (int64_t)gridDim.x * blockDim.x;
    for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < sums; i += step) {
        int t = (int)(i / p->topk), k = (int)(i % p->topk);
        p->out_weights[t * p->out_weight_stride + k] = epc_sum_weight(p, from, t, k);
    }
}

/* Dot product of each row with the token's row of `dot`. Half a warp takes a row: the order of the
   sums, 16 lanes and then halves, is that of the CPU path. */
static __device__ void epc_dot_rows(const epc_combine_params *p, const epc_combine_sources *from,
                                    int warp, int warps)
{
    int lane = epc_lane() % 16;
    int64_t pairs = (int64_t)p->num_tokens * p->topk;
    for (int64_t first = 2 * (int64_t)warp; first < pairs; first += 2 * (int64_t)warps) {
        int64_t pair = first + epc_lane() / 16;
        epc_entry e = pair < pairs ? p->entries[pair] : -1;
        int64_t t = pair / p->topk;
        float sum = 0;
        if (e >= 0) {
            const uint8_t *y = epc_row_at(from, e);
            for (int h = lane; h < p->hidden; h += 16)
                sum = fmaf(epc_load_element(p->dot + t * p->dot_stride, p->dtype, h),
                           epc_load_element(y, p->dtype, h), sum);
        }
        for (int half = 8; half; half /= 2)
            sum += __shfl_down_sync(EPC_ALL, sum, half, 16);
        if (lane == 0 && pair < pairs)
            p->out_weights[t * p->out_weight_stride + pair % p->topk] = epi_to_f32(sum);
    }
}

/* Headers, and from them where every rank's rows are. */
static __device__ bool epc_begin_combine(const epc_combine_params *p, const epc_call *call,
                                         epc_header *headers, epc_combine_sources *from)
{
    __shared__ uint32_t mine[EPC_NUM_FIELDS];
    const epc_comm *comm = call->comm;
    if (blockIdx.x == 0) {
        int f = (int)threadIdx.x;
        if (f < EPC_NUM_FIELDS)
            mine[f] = f < EPC_AGREED ? p->field[f] : 0;
        __syncthreads();
        if (f == 0) {
            mine[EPC_F_REJECT] = p->reject;
            mine[EPC_F_PLACE] = (uint32_t)p->place;
            mine[EPC_F_OFFSET_LO] = (uint32_t)p->offset;
            mine[EPC_F_OFFSET_HI] = (uint32_t)(p->offset >> 32);
            mine[EPC_F_STRIDE] = p->stride;
            mine[EPC_F_STRIDE2] = p->stride2;
            mine[EPC_F_PLACE2] = (uint32_t)p->place2;
            mine[EPC_F_OFFSET2_LO] = (uint32_t)p->offset2;
            mine[EPC_F_OFFSET2_HI] = (uint32_t)(p->offset2 >> 32);
            mine[EPC_F_SUMS] = (uint32_t)p->sums_place;
            mine[EPC_F_SUMS_AT] = (uint32_t)(p->sums_offset / EPC_ALIGN);
        }
        __threadfence_system(); /* y, from kernels before, ahead of the words that announce it */
        __syncthreads();
        epc_push_header(call, mine);
    }
    if (p->reject || !__syncthreads_and(epc_gather_headers(call, p->field, headers)))
        return false;
    int r = (int)threadIdx.x;
    if (r < comm->num_ranks && !epc_is_masked(comm, r)) {
        const uint32_t *h = headers[r];
        from->y[r] = epc_memory_at(comm, r, h[EPC_F_PLACE],
                                   epc_join(h[EPC_F_OFFSET_LO], h[EPC_F_OFFSET_HI]));
        from->weights[r] = (const float *)epc_memory_at(
            comm, r, h[EPC_F_PLACE2], epc_join(h[EPC_F_OFFSET2_LO], h[EPC_F_OFFSET2_HI]));
        from->stride[r] = h[EPC_F_STRIDE];
        from->weight_stride[r] = h[EPC_F_STRIDE2];
    }
    __threadfence_system();
    __syncthreads();
    return true;
}

template <int DTYPE, bool STREAMS>
__global__ void __launch_bounds__(STREAMS ? EPC_STREAM_WARPS *EPC_WARP : EPC_THREADS, 1)
    epc_combine_kernel(const __grid_constant__ epc_combine_params p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ epc_combine_sources from;
    __shared__ epc_header headers[EPC_MAX_RANKS];
    epc_call call = epc_begin_call(&p.comm, p.timeout_ns);
    bool begun = epc_begin_combine(&p, &call, headers, &from);
    if (begun) {
        int warps = (int)(blockDim.x / EPC_WARP * gridDim.x);
        int warp = epc_warp() * (int)gridDim.x + (int)blockIdx.x;
        if (p.dot)
            epc_dot_rows(&p, &from, warp, warps);
        else {
            epc_combine_rows rows = epc_rows_of(&p, &from);
            if (!p.bulk || !epc_rows_aligned(&p, &from))
                epc_combine_registers<DTYPE>(&rows);
            else if (STREAMS)
                epc_combine_streams<DTYPE>(&rows, call.state, memory);
            else
                epc_combine_bulk<DTYPE>(&rows, call.state, memory);
            if (p.out_weights)
                epc_sum_weights(&p, &from);
        }
    }
    if (p.verify)
        epc_verify_combine(&p, &call, headers, &from, begun);
    epc_finish_call(&call, p.report, p.serial, false);
}

template <bool STREAMS> static const void *epc_combine_of(int dtype)
{
    return dtype == EPC_BF16  ? (const void *)epc_combine_kernel<EPC_BF16, STREAMS>
           : dtype == EPC_F16 ? (const void *)epc_combine_kernel<EPC_F16, STREAMS>
                              : (const void *)epc_combine_kernel<EPC_F32, STREAMS>;
}

static const void *epc_combine_way(int dtype, bool streams)
{
    return streams ? epc_combine_of<true>(dtype) : epc_combine_of<false>(dtype);
}

extern "C" int epc_combine_prepare(int max_shared)
{
    for (int i = 0; i < 2 * EPC_F32; i++) {
        cudaError_t error =
            cudaFuncSetAttribute(epc_combine_way(EPC_BF16 + i / 2, i % 2),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared);
        if (error != cudaSuccess)
            return (int)error;
    }
    return 0;
}

extern "C" int epc_combine_launch(const epc_combine_params *params, int blocks, size_t shared,
                                  void *stream)
{
    void *arguments[] = {(void *)params};
    return (int)cudaLaunchKernel(epc_combine_way(params->dtype, params->streams),
                                 dim3((unsigned)blocks),
                                 dim3(params->streams ? EPC_STREAM_WARPS * EPC_WARP : EPC_THREADS),
                                 arguments, shared, (cudaStream_t)stream);
}
