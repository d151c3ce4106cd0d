/* SPDX-License-Identifier: MIT */
/*
 * Low latency: four kernels. A sender puts its tokens once into its own window,
 * narrow as the wire wants them, and pushes one bitmap of tokens per expert to
 * the expert's rank; the receiver reads the rows it wants straight into the
 * packed result. Combine is the mirror: outputs stay at the expert's rank, and
 * the token's owner reads and sums them.
 */
#include "ep/cuda/kernels.h"
#include "ep/cuda/ll_receive.cuh"
#include "ep/cuda/ll_send.cuh"
#include "ep/cuda/ll_sum.cuh"

template <bool MANY>
__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_send_kernel(const __grid_constant__ epc_ll_params p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    epc_await_kernel_ahead();
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_epoch[p.slot] + 1, EPC_LL_ABORT);
    epc_send_tokens<MANY>(&p, &call, (uint32_t *)memory);
    if (!epc_is_last_to_add(&call.state->exited))
        return;
    uint32_t fail = epc_announce(&p, &call, EPC_LL_ROWS);
    if (threadIdx.x == 0) {
        epc_report_end(call.state, p.report, 0);
        call.state->ll_epoch[p.slot] = call.epoch;
        if (fail)
            call.state->ll_failed[p.slot] = call.epoch;
    }
}

template <bool MANY>
__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_recv_kernel(const __grid_constant__ epc_ll_params p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    epc_await_kernel_ahead();
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_epoch[p.slot], EPC_LL_ABORT);
    bool sent = p.comm.state->ll_failed[p.slot] != call.epoch;
    if (sent)
        epc_receive_rows<MANY>(&p, &call, memory);
    else
        epc_leave_empty(&p);
    if (!sent && threadIdx.x == 0 && blockIdx.x == 0) /* the send's report says why: it stands */
        epc_fail_call(call.state, p.report->fail, p.report->detail[0], p.report->detail[1],
                      p.report->detail[2], p.report->detail[3], p.report->detail[4]);
    epc_finish_ll(&p, &call, epc_ll_flag_of(&p, EPC_LL_PULLED), false);
}

/* Both halves in one launch, for calls that no hook divides. */
template <bool MANY>
__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_dispatch_kernel(const __grid_constant__ epc_ll_params p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    epc_await_kernel_ahead();
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_epoch[p.slot] + 1, EPC_LL_ABORT);
    epc_send_tokens<MANY>(&p, &call, (uint32_t *)memory);
    if (epc_is_last_to_add(&call.state->arrived))
        epc_announce(&p, &call, EPC_LL_ROWS);
    __syncthreads(); /* the bitmaps made way for those received */
    epc_receive_rows<MANY>(&p, &call, memory);
    if (epc_finish_ll(&p, &call, epc_ll_flag_of(&p, EPC_LL_PULLED), false) && threadIdx.x == 0)
        call.state->ll_epoch[p.slot] = call.epoch;
}

__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_outputs_kernel(const __grid_constant__ epc_ll_params p)
{
    epc_await_kernel_ahead();
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_combine[p.slot] + 1, EPC_LL_ABORT_Y);
    epc_prepare_outputs(&p, &call);
    if (!epc_is_last_to_add(&call.state->exited))
        return;
    epc_announce_outputs(&p, &call);
    __syncthreads();
    if (threadIdx.x == 0) {
        epc_report_end(call.state, p.report, 0);
        call.state->ll_combine[p.slot] = call.epoch;
    }
}

/* `both`: this launch is the whole call, and announces the outputs too. */
__global__ void __launch_bounds__(EPC_THREADS, 1)
    epc_ll_combine_kernel(const __grid_constant__ epc_ll_params p, int both)
{
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ epc_combine_sources from;
    epc_await_kernel_ahead();
    epc_call call = epc_begin_ll(&p, p.comm.state->ll_combine[p.slot] + both, EPC_LL_ABORT_Y);
    if (both) {
        epc_prepare_outputs(&p, &call);
        bool first = p.y ? epc_is_last_to_add(&call.state->arrived) : blockIdx.x == 0;
        if (first)
            epc_announce_outputs(&p, &call);
    }
    if (p.refused)
        epc_fail_call(call.state, EPC_FAIL_REFUSED, p.refused, 0, 0, 0, 0);
    else
        epc_sum_outputs(&p, &call, &from, memory);
    if (epc_finish_ll(&p, &call, epc_ll_flag_of(&p, EPC_LL_READ), p.outside) && both &&
        threadIdx.x == 0)
        call.state->ll_combine[p.slot] = call.epoch;
}

/* ---------------------------------------------------------------- launches */

static const void *const kernels[] = {
    (const void *)epc_ll_send_kernel<false>, (const void *)epc_ll_recv_kernel<false>,
    (const void *)epc_ll_outputs_kernel, (const void *)epc_ll_combine_kernel,
    (const void *)epc_ll_dispatch_kernel<false>};
/* Of so many tokens and experts that shared memory has no room for all bitmaps. */
static const void *const kernels_of_many[] = {
    (const void *)epc_ll_send_kernel<true>, (const void *)epc_ll_recv_kernel<true>,
    (const void *)epc_ll_outputs_kernel, (const void *)epc_ll_combine_kernel,
    (const void *)epc_ll_dispatch_kernel<true>};

extern "C" size_t epc_ll_tables_bytes(int ranks, int num_local, int words)
{
    size_t pairs = (size_t)ranks * (size_t)num_local;
    return 4 * (2 * pairs + 1 + (size_t)num_local + pairs * (size_t)words);
}

extern "C" int epc_ll_prepare(int max_shared)
{
    const cudaFuncAttribute most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    cudaError_t error = cudaSuccess;
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels && error == cudaSuccess; i++) {
        error = cudaFuncSetAttribute(kernels[i], most, max_shared);
        if (error == cudaSuccess)
            error = cudaFuncSetAttribute(kernels_of_many[i], most, max_shared);
    }
    return (int)error;
}

extern "C" int epc_ll_launch(int which, const epc_ll_params *params, int blocks, size_t shared,
                             void *stream)
{
    int both = which == EPC_LL_COMBINE_BOTH;
    void *arguments[] = {(void *)params, &both};
    const void *kernel = (params->many ? kernels_of_many : kernels)[both ? EPC_LL_COMBINE : which];
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3((unsigned)blocks);
    config.blockDim = dim3(EPC_THREADS);
    config.dynamicSmemBytes = shared;
    config.stream = (cudaStream_t)stream;
    config.attrs = &overlap;
    config.numAttrs = params->overlap != 0;
    return (int)cudaLaunchKernelExC(&config, kernel, arguments);
}
