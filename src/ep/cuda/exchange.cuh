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

/* Field `f` of `rank`; false: the call has failed. */
static __device__ bool epc_header_field(const epc_call *call, int rank, int f, uint32_t *value)
{
    return epc_wait_word(call, rank, epc_header_at(call->comm, call->comm->rank, rank) + f, value);
}

/* Some field differs: a rank has refused the call, or ranks disagree. Every thread and every rank
   that sees it comes to the same verdict, by comparing all ranks with the first. */
static __device__ __noinline__ void epc_judge_headers(const epc_call *call)
{
    const epc_comm *comm = call->comm;
    int first = -1;
    uint32_t a = 0, b = 0;
    EPC_EACH_RANK(r, comm->num_ranks)
    {
        if (epc_is_masked(comm, r))
            continue;
        first = first < 0 ? r : first;
        if (!epc_header_field(call, r, EPC_F_REJECT, &a))
            return;
        if (a) {
            epc_fail_call(call->state, EPC_FAIL_ABORTED, a, 0, 0, 0, 0);
            return;
        }
    }
    for (int i = 0; i < comm->num_ranks * EPC_AGREED; i++) {
        int r = i / EPC_AGREED, f = i % EPC_AGREED;
        if (epc_is_masked(comm, r))
            continue;
        if (!epc_header_field(call, first, f, &a) || !epc_header_field(call, r, f, &b))
            return;
        if (a != b) {
            epc_fail_call(call->state, EPC_FAIL_MISMATCH, (uint32_t)f, (uint32_t)first, (uint32_t)r,
                          a, b);
            return;
        }
    }
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
            epc_judge_headers(call);
        }
    }
    return ok;
}

#endif
