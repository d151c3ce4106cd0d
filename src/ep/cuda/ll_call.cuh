/* SPDX-License-Identifier: MIT */
/* Low latency on the device: what its calls have in common. */
#ifndef EPI_EP_CUDA_LL_CALL_CUH
#define EPI_EP_CUDA_LL_CALL_CUH

#include "ep/cuda/device.cuh"

static __device__ __forceinline__ uint8_t *epc_area_at(const epc_ll_params *p, int rank)
{
    return p->area_of[rank];
}

static __device__ __forceinline__ uint64_t *epc_bits_at(const epc_ll_params *p, int owner,
                                                        int source, int local)
{
    return (uint64_t *)(epc_area_at(p, owner) + p->area.bits) +
           ((int64_t)source * p->max_local + local) * p->words;
}

/* Words [E] of a source's rows for each expert. */
static __device__ __forceinline__ uint64_t *epc_expert_counts_at(const epc_ll_params *p, int owner,
                                                                 int source)
{
    return (uint64_t *)(epc_area_at(p, owner) + p->area.counts) + (int64_t)source * p->num_experts;
}

/* The head of an encoded output: which of its chunks are coded. */
static __device__ __forceinline__ uint32_t *epc_heads_at(const epc_ll_params *p, int rank,
                                                         int64_t row)
{
    return (uint32_t *)(epc_area_at(p, rank) + p->area.heads + row * p->head_bytes);
}

/* Launches overlap: the blocks of a kernel of a stream can be there before the kernel ahead of it
   has ended, and wait for that here, before they look at anything. */
static __device__ __forceinline__ void epc_await_kernel_ahead(void)
{
#if EPC_BULK
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/* Lets those of the kernel behind this one come. By blocks that no longer wait for other ranks, for
   they may come where another rank's blocks would. */
static __device__ __forceinline__ void epc_let_kernel_behind_come(void)
{
#if EPC_BULK
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ epc_call epc_begin_ll(const epc_ll_params *p, uint32_t epoch, int abort_flag)
{
    epc_call call;
    call.comm = &p->comm;
    call.state = p->comm.state;
    call.epoch = epoch;
    call.abort_flag = EPC_FLAG_LL + p->slot * EPC_LL_FLAGS + abort_flag;
    call.deadline = epc_now_ns() + (uint64_t)p->timeout_ns;
    return call;
}

static __device__ __forceinline__ int epc_ll_flag_of(const epc_ll_params *p, int flag)
{
    return EPC_FLAG_LL + p->slot * EPC_LL_FLAGS + flag;
}

/* By the first threads of a block: every rank's `flag` at the epoch before the call's. */
static __device__ bool epc_await_before(const epc_call *call, int flag)
{
    int r = (int)threadIdx.x;
    bool ok = true;
    if (r < call->comm->num_ranks && !epc_is_masked(call->comm, r))
        ok = epc_wait_flag(call, r, epc_flag_at(call->comm, call->comm->rank, r, flag),
                           call->epoch - 1);
    return __syncthreads_and(ok);
}

/* Ends a kernel: the last block raises `flag` at every rank and reports; true in it. */
static __device__ bool epc_finish_ll(const epc_ll_params *p, const epc_call *call, int flag,
                                     bool wait)
{
    if (!epc_is_last_to_add(&call->state->exited))
        return false;
    uint32_t fail = epc_load_gpu(&call->state->fail);
    int r = (int)threadIdx.x;
    if (fail == EPC_FAIL_ABORTED)
        epc_learn_why(call);
    /* What was overfull all ranks see; what this one found corrupt is its own affair: neither keeps
       others from reading what it sent. */
    bool gave_up = fail != EPC_OK && fail != EPC_FAIL_OVERFLOW && fail != EPC_FAIL_CORRUPT;
    if (r < p->comm.num_ranks && !epc_is_masked(&p->comm, r)) {
        epc_raise(call, r, flag, gave_up ? epc_why(call) : 0);
        if (wait && !gave_up)
            epc_await_peer(call, r, flag);
    }
    __syncthreads();
    if (threadIdx.x == 0)
        epc_report_end(call->state, p->report, p->serial);
    return true;
}

#endif
