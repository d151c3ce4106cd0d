/* SPDX-License-Identifier: MIT */
/* How a call begins: every rank sends every other its header, and all judge the same words. */
#ifndef EPI_EP_CUDA_EXCHANGE_CUH
#define EPI_EP_CUDA_EXCHANGE_CUH

#include "ep/cuda/device.cuh"

/* Headers of all ranks, in shared memory. */
typedef uint32_t epc_header[EPC_NUM_FIELDS];

static __device__ __forceinline__ int64_t epc_join(uint32_t low, uint32_t high)
{
    return (int64_t)((uint64_t)high << 32 | low);
}

static __device__ epc_call epc_begin_call(const epc_comm *comm, int64_t timeout_ns)
{
    epc_call call;
    call.comm = comm;
    call.state = comm->state;
    call.epoch = comm->state->epoch + 1;
    call.rejected = 0;
    call.abort_flag = EPC_FLAG_ABORT;
    call.deadline = epc_now_ns() + (uint64_t)timeout_ns;
    call.refused = NULL;
    return call;
}

/* By one block; `mine` in shared memory. */
static __device__ void epc_push_header(const epc_call *call, const uint32_t *mine)
{
    const epc_comm *comm = call->comm;
    for (int i = (int)threadIdx.x; i < comm->num_ranks * EPC_NUM_FIELDS; i += (int)blockDim.x) {
        int r = i / EPC_NUM_FIELDS, f = i % EPC_NUM_FIELDS;
        if (!epc_is_masked(comm, r))
            epc_store_word(epc_header_at(comm, r, comm->rank) + f, mine[f], call->epoch);
    }
}

/* A field of `rank` differs from this rank's: it has refused the call, or ranks disagree. */
static __device__ __noinline__ void epc_judge_field(const epc_call *call, int rank, int field,
                                                    uint32_t mine, uint32_t other)
{
    const epc_comm *comm = call->comm;
    uint32_t reject = 0;
    if (!epc_wait_word(call, rank, epc_header_at(comm, comm->rank, rank) + EPC_F_REJECT, &reject))
        return;
    if (reject)
        epc_fail_call(call->state, EPC_FAIL_ABORTED, (uint32_t)rank, reject, 0, 0, 0);
    else
        epc_fail_call(call->state, EPC_FAIL_MISMATCH, (uint32_t)field, (uint32_t)comm->rank,
                      (uint32_t)rank, mine, other);
}

/*
 * By every block: gathers all headers into shared memory and compares them with
 * `fields` as they come. To be followed by a barrier of the block; false: the
 * call fails, on every rank.
 */
static __device__ bool epc_gather_headers(const epc_call *call, const uint32_t *fields,
                                          epc_header *headers)
{
    const epc_comm *comm = call->comm;
    bool ok = true;
    for (int i = (int)threadIdx.x; i < comm->num_ranks * EPC_NUM_FIELDS; i += (int)blockDim.x) {
        int r = i / EPC_NUM_FIELDS, f = i % EPC_NUM_FIELDS;
        uint32_t value = 0;
        if (epc_is_masked(comm, r))
            continue;
        ok &= epc_wait_word(call, r, epc_header_at(comm, comm->rank, r) + f, &value);
        headers[r][f] = value;
        uint32_t want = f < EPC_AGREED ? fields[f] : f == EPC_F_REJECT ? 0 : value;
        if (ok && value != want) {
            ok = false;
            epc_judge_field(call, r, f, want, value);
        }
    }
    return ok;
}

#endif
