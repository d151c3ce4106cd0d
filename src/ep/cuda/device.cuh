/* SPDX-License-Identifier: MIT */
/* Device-side building blocks: words between ranks, bounded waits, grid barrier, bulk copies. */
#ifndef EPI_EP_CUDA_DEVICE_CUH
#define EPI_EP_CUDA_DEVICE_CUH

#include "entrepot/status.h"
#include "ep/cuda/shared.h"

#include <cuda_runtime.h>

#define EPC_WARP 32
#define EPC_ALL 0xffffffffu
#define EPC_EACH_RANK(r, n) for (int r = 0; r < (n); r++)

static __device__ __forceinline__ int epc_lane(void)
{
    return (int)(threadIdx.x % EPC_WARP);
}
static __device__ __forceinline__ int epc_warp(void)
{
    return (int)(threadIdx.x / EPC_WARP);
}

static __device__ __forceinline__ uint64_t epc_now_ns(void)
{
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

/* ------------------------------------------------ words between ranks */

static __device__ __forceinline__ void epc_store_word(void *word, uint32_t value, uint32_t epoch)
{
    uint64_t both = (uint64_t)epoch << 32 | value;
    asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(word), "l"(both) : "memory");
}
static __device__ __forceinline__ uint64_t epc_load_word(const void *word)
{
    uint64_t both;
    asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(both) : "l"(word) : "memory");
    return both;
}
static __device__ __forceinline__ void epc_store_flag(void *flag, uint32_t epoch)
{
    asm volatile("st.release.sys.global.b32 [%0], %1;" ::"l"(flag), "r"(epoch) : "memory");
}
static __device__ __forceinline__ uint32_t epc_load_flag(const void *flag)
{
    uint32_t epoch;
    asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(epoch) : "l"(flag) : "memory");
    return epoch;
}
static __device__ __forceinline__ uint32_t epc_load_gpu(const uint32_t *word)
{
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}
/* Counts this block among those that have come; what the blocks counted before wrote is then
   visible. */
static __device__ __forceinline__ uint32_t epc_count_in(uint32_t *word, uint32_t add)
{
    uint32_t before;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "l"(word), "r"(add)
                 : "memory");
    return before;
}
/* At or past, modulo 2^32. */
static __device__ __forceinline__ bool epc_reached(uint32_t have, uint32_t want)
{
    return (int32_t)(have - want) >= 0;
}

/* Memory that other ranks write during this kernel, or that other SMs wrote before a barrier. */
static __device__ __forceinline__ int4 epc_load16(const void *p)
{
    int4 v;
    asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.s32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
static __device__ __forceinline__ int2 epc_load8(const void *p)
{
    int2 v;
    asm volatile("ld.relaxed.gpu.global.v2.s32 {%0,%1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(p)
                 : "memory");
    return v;
}

/* Memory of a rank: a place and an offset there. */
static __device__ __forceinline__ uint8_t *epc_memory_at(const epc_comm *comm, int rank,
                                                         uint32_t place, int64_t offset)
{
    return (place ? comm->places[place * EPC_MAX_RANKS + rank] : comm->window[rank]) + offset;
}
/* A flag or header word of `source` in the window of `rank`. */
static __device__ __forceinline__ uint32_t *epc_flag_at(const epc_comm *comm, int rank, int source,
                                                        int flag)
{
    return (uint32_t *)(comm->window[rank] + epc_flags_offset(source)) + flag;
}
static __device__ __forceinline__ uint64_t *epc_header_at(const epc_comm *comm, int rank,
                                                          int source)
{
    return (uint64_t *)(comm->window[rank] + epc_header_offset(comm->num_ranks, source));
}
static __device__ __forceinline__ uint64_t *epc_counts_at(const epc_comm *comm, int rank,
                                                          int source)
{
    return (uint64_t *)(comm->window[rank] +
                        epc_counts_offset(comm->num_ranks, comm->max_experts, source));
}
static __device__ __forceinline__ bool epc_is_masked(const epc_comm *comm, int rank)
{
    return comm->masked >> rank & 1;
}

/* ------------------------------------------------------- bounded waits */

/* What a kernel knows of the call it runs. */
typedef struct epc_call {
    const epc_comm *comm;
    epc_state *state;
    uint32_t epoch;
    int abort_flag; /* of the sources' flags, the one that says "given up" */
    uint64_t deadline;
    uint32_t *refused; /* in shared memory: this block found bad ids; NULL: it looks at none */
} epc_call;

/* The first failure of a call is the one reported. */
static __device__ __noinline__ void epc_fail_call(epc_state *state, uint32_t fail, uint32_t d0,
                                                  uint32_t d1, uint32_t d2, uint32_t d3,
                                                  uint32_t d4)
{
    if (atomicCAS(&state->fail, EPC_OK, fail) != EPC_OK)
        return;
    state->detail[0] = d0;
    state->detail[1] = d1;
    state->detail[2] = d2;
    state->detail[3] = d3;
    state->detail[4] = d4;
    __threadfence();
}

/* By the last block, when the call was given up by a rank that had left it before this one looked:
   its word may still be there. Apart from the wait, which has no registers to spare. */
static __device__ __noinline__ void epc_learn_why(const epc_call *call)
{
    uint32_t *why = call->state->detail;
    if (threadIdx.x == 0 && *why >> 8 == EP_ERR_ABORTED) {
        uint64_t word = epc_load_word(
            epc_flag_at(call->comm, call->comm->rank, (int)(*why & 0xff), call->abort_flag));
        if ((uint32_t)(word >> 32) == call->epoch)
            *why = (uint32_t)word;
    }
    __syncthreads();
}

/* The word that tells others why this rank gives the call up; once its blocks have come. */
static __device__ __noinline__ uint32_t epc_why(const epc_call *call)
{
    const epc_state *state = call->state;
    uint32_t rank = (uint32_t)call->comm->rank;
    switch (epc_load_gpu(&state->fail)) {
    case EPC_FAIL_ABORTED:
    case EPC_FAIL_REFUSED:
        return state->detail[0];
    case EPC_FAIL_TIMEOUT:
        return EPC_WHY(rank, EP_ERR_TIMEOUT, __ffsll((long long)state->late));
    case EPC_FAIL_ID:
        return EPC_WHY(rank, EP_ERR_ARGUMENT, 0);
    case EPC_FAIL_MISMATCH:
        return EPC_WHY(rank, EP_ERR_MISMATCH, 0);
    case EPC_FAIL_DUPLICATE:
    case EPC_FAIL_CORRUPT:
        return EPC_WHY(rank, EP_ERR_CORRUPT, 0);
    default:
        return EPC_WHY(rank, EP_ERR_CAPACITY, 0);
    }
}

/* Whether `source` has given the call up, and then fails it here. */
static __device__ __noinline__ bool epc_heed_abort(const epc_call *call, int source)
{
    uint64_t word =
        epc_load_word(epc_flag_at(call->comm, call->comm->rank, source, call->abort_flag));
    if ((uint32_t)(word >> 32) != call->epoch)
        return false;
    epc_fail_call(call->state, EPC_FAIL_ABORTED, (uint32_t)word, 0, 0, 0, 0);
    return true;
}

/* Looked at now and then while waiting for `source`: false ends the wait. */
static __device__ __noinline__ bool epc_may_wait(const epc_call *call, int source)
{
    if (epc_load_gpu(&call->state->fail) != EPC_OK)
        return false;
    /* Also whoever gave up while waiting for the same rank: a rank at a time, as the clock goes. */
    uint32_t other = (uint32_t)epc_now_ns() >> 10 & (EPC_MAX_RANKS - 1);
    if (other < (uint32_t)call->comm->num_ranks && !epc_is_masked(call->comm, (int)other) &&
        epc_heed_abort(call, (int)other))
        return false;
    if (epc_heed_abort(call, source))
        return false;
    if (epc_now_ns() < call->deadline)
        return true;
    atomicOr((unsigned long long *)&call->state->late, 1ull << source);
    epc_fail_call(call->state, EPC_FAIL_TIMEOUT, 0, 0, 0, 0, 0);
    return false;
}

/* Waits for the word of `source` that carries the call's epoch. */
static __device__ bool epc_wait_word(const epc_call *call, int source, const uint64_t *word,
                                     uint32_t *value)
{
    for (int spins = 1;; spins++) {
        uint64_t both = epc_load_word(word);
        uint32_t epoch = (uint32_t)(both >> 32);
        if (epoch == call->epoch) {
            *value = (uint32_t)both;
            return true;
        }
        if (epoch && epc_reached(epoch, call->epoch)) { /* the source has gone on without us */
            epc_fail_call(call->state, EPC_FAIL_ABORTED, EPC_WHY(source, EP_ERR_ABORTED, 0), 0, 0,
                          0, 0);
            return false;
        }
        if (spins % 256 == 0 && !epc_may_wait(call, source))
            return false;
    }
}

/* Until the flag has come to `epoch`, the call's or the one before. */
static __device__ bool epc_wait_flag(const epc_call *call, int source, const uint32_t *flag,
                                     uint32_t epoch)
{
    for (int spins = 1; !epc_reached(epc_load_flag(flag), epoch); spins++)
        if (spins % 64 == 0 && !epc_may_wait(call, source))
            return false;
    return true;
}

/* Ns that this thread waits until `epoch`, a flag or the upper half of a word, has come; a wait for
   it follows, which has the last word. The clock is read in the loop: lanes of a warp go on from
   it together, and after it each would book the time of the slowest. */
static __device__ __noinline__ int64_t epc_time_wait(const epc_call *call, int source,
                                                     const uint32_t *epoch)
{
    uint64_t since = epc_now_ns(), now = since;
    for (int spins = 1; !epc_reached(epc_load_flag(epoch), call->epoch); spins++) {
        now = epc_now_ns();
        if (spins % 64 == 0 && !epc_may_wait(call, source))
            break;
    }
    return (int64_t)(now - since);
}

/* All blocks of the grid, once per call; false when some block has refused it. */
static __device__ bool epc_grid_barrier(const epc_call *call)
{
    __shared__ uint32_t arrived; /* blocks below, blocks that refused above 16 bits */
    __syncthreads();
    if (threadIdx.x == 0) {
        bool refused = call->refused && *call->refused;
        epc_count_in(&call->state->arrived, refused ? 1u << 16 | 1 : 1);
        do /* our own grid: always arrives */
            arrived = epc_load_gpu(&call->state->arrived);
        while ((arrived & 0xffff) < gridDim.x);
    }
    __syncthreads();
    return arrived >> 16 == 0;
}

/* Takes the next piece of work for this warp: blocks that are slow take fewer. One is always taken
   ahead, so that nobody waits for the answer. Lane 0 holds `ahead`. */
static __device__ __forceinline__ uint32_t epc_take_next(epc_state *state, uint32_t *ahead)
{
    uint32_t mine = __shfl_sync(EPC_ALL, *ahead, 0);
    if (epc_lane() == 0)
        *ahead = atomicAdd(&state->next, 1);
    return mine;
}
static __device__ __forceinline__ uint32_t epc_take_first(epc_state *state)
{
    return epc_lane() == 0 ? atomicAdd(&state->next, 1) : 0;
}

/* ------------------------------------------------------------ call ends */

/* Tells the host how the call ended and makes the state ready for the next one. */
static __device__ void epc_report_end(epc_state *state, epc_report *report, uint32_t serial)
{
    uint32_t fail = epc_load_gpu(&state->fail);
    if (fail) {
        for (int i = 0; i < 6; i++)
            report->detail[i] = state->detail[i];
        report->late = state->late;
        __threadfence_system();
        state->fail = EPC_OK;
        state->late = 0;
    }
    state->arrived = 0;
    state->exited = 0;
    state->next = 0;
    if (serial || fail)
        *(volatile uint64_t *)&report->done =
            (uint64_t)fail << 32 | serial; /* both words at once */
}

/* True in all threads of the last block to come here; what other blocks wrote is then visible.
   Only flags raised after it tell other ranks: a block releases to its own device, and the flags,
   which release to all, pass that on. */
static __device__ bool epc_is_last_to_add(uint32_t *counter)
{
    __shared__ uint32_t last;
    __syncthreads();
    if (threadIdx.x == 0)
        last = epc_count_in(counter, 1) == gridDim.x - 1;
    __syncthreads();
    return last;
}

/* One thread a rank: tells rank r that this one is done with `flag`, or `why` it gave the call up.
   The flag releases that word as well. */
static __device__ void epc_raise(const epc_call *call, int r, int flag, uint32_t why)
{
    if (why)
        epc_store_word(epc_flag_at(call->comm, r, call->comm->rank, call->abort_flag), why,
                       call->epoch);
    epc_store_flag(epc_flag_at(call->comm, r, call->comm->rank, flag), call->epoch);
}

/* Waits at the end of a call for rank r's `flag`. No other failure cuts this wait short: the rank
   may still be using memory of ours. */
static __device__ void epc_await_peer(const epc_call *call, int r, int flag)
{
    const uint32_t *word = epc_flag_at(call->comm, call->comm->rank, r, flag);
    for (int spins = 1; !epc_reached(epc_load_flag(word), call->epoch); spins++) {
        if (spins % 64 || epc_now_ns() < call->deadline)
            continue;
        atomicOr((unsigned long long *)&call->state->late, 1ull << r);
        epc_fail_call(call->state, EPC_FAIL_TIMEOUT, 0, 0, 0, 0, 0);
        return;
    }
    /* Done and given up at once: what it should have written may be missing. */
    epc_heed_abort(call, r);
}

/* By the last block: tells every rank that this one is done, waits for the same word of every rank,
   and reports. Apart, so that what comes before keeps its registers. */
static __device__ __noinline__ void epc_end_call(const epc_call *call, epc_report *report,
                                                 uint32_t serial, bool more)
{
    const epc_comm *comm = call->comm;
    /* A failure that every rank sees alike ends in step; one that only this rank sees tells the
       others to stop waiting. */
    uint32_t fail = epc_load_gpu(&call->state->fail);
    bool alone = fail == EPC_FAIL_TIMEOUT || fail == EPC_FAIL_ABORTED;
    if (fail == EPC_FAIL_ABORTED)
        epc_learn_why(call);
    int r = (int)threadIdx.x;
    if (r < comm->num_ranks && !epc_is_masked(comm, r)) {
        epc_raise(call, r, EPC_FLAG_DONE, alone ? epc_why(call) : 0);
        if (!alone)
            epc_await_peer(call, r, EPC_FLAG_DONE);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        fail = epc_load_gpu(&call->state->fail);
        epc_report_end(call->state, report, more && fail == EPC_OK ? 0 : serial);
        call->state->epoch = call->epoch;
        if (fail)
            call->state->failed = call->epoch;
        if (alone || fail == EPC_FAIL_MISMATCH)
            call->state->undone = call->epoch;
    }
}

/* Every thread of a normal call's kernel calls this last; `more`: only a failure is reported, as
   the kernel behind reports the rest. */
static __device__ void epc_finish_call(const epc_call *call, epc_report *report, uint32_t serial,
                                       bool more)
{
    if (epc_is_last_to_add(&call->state->exited))
        epc_end_call(call, report, serial, more);
}

/* Instead of the second half of a call whose first half was undone on every rank: no call. */
static __device__ __noinline__ void epc_skip_call(epc_state *state, epc_report *report,
                                                  uint32_t serial)
{
    if (epc_is_last_to_add(&state->exited) && threadIdx.x == 0)
        epc_report_end(state, report, serial);
}

/* ------------------------------------------- bulk copy engine (SM90 and up) */

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define EPC_BULK 1
static __device__ __forceinline__ uint32_t epc_shared(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}
static __device__ __forceinline__ void epc_mbar_init(uint64_t *bar, uint32_t count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(epc_shared(bar)), "r"(count)
                 : "memory");
}
static __device__ __forceinline__ void epc_mbar_init_done(void)
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
static __device__ __forceinline__ void epc_mbar_expect(uint64_t *bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(epc_shared(bar)),
                 "r"(bytes)
                 : "memory");
}
static __device__ __forceinline__ void epc_mbar_arrive(uint64_t *bar)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(epc_shared(bar)) : "memory");
}
static __device__ __forceinline__ void epc_mbar_wait(uint64_t *bar, uint32_t parity)
{
    uint32_t done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(epc_shared(bar)), "r"(parity)
                     : "memory");
    } while (!done);
}
static __device__ __forceinline__ void epc_bulk_load(void *shared, const void *global,
                                                     uint32_t bytes, uint64_t *bar)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(epc_shared(shared)),
        "l"(global), "r"(bytes), "r"(epc_shared(bar))
        : "memory");
}
/* What nobody reads again leaves the cache first. */
static __device__ __forceinline__ void epc_bulk_load_once(void *shared, const void *global,
                                                          uint32_t bytes, uint64_t *bar,
                                                          uint64_t policy)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(epc_shared(shared)),
                 "l"(global), "r"(bytes), "r"(epc_shared(bar)), "l"(policy)
                 : "memory");
}
/* Rows are more than the caches hold: what is written leaves them first. */
static __device__ __forceinline__ uint64_t epc_evict_first(void)
{
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
static __device__ __forceinline__ void epc_bulk_store(void *global, const void *shared,
                                                      uint32_t bytes, uint64_t policy)
{
    asm volatile(
        "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
            global),
        "r"(epc_shared(shared)), "r"(bytes), "l"(policy)
        : "memory");
}
/* What fills lines only in part waits in the cache for its neighbours. */
static __device__ __forceinline__ void epc_bulk_store_kept(void *global, const void *shared,
                                                           uint32_t bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(epc_shared(shared)), "r"(bytes)
                 : "memory");
}
static __device__ __forceinline__ void epc_bulk_commit(void)
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* Until this thread's bulk stores have read shared memory. */
static __device__ __forceinline__ void epc_bulk_wait_read(void)
{
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
/* Until they have written. */
static __device__ __forceinline__ void epc_bulk_wait(void)
{
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
/* Between ordinary accesses of shared or global memory and those of the engine: as slow as a fence
   of the whole device. */
static __device__ __forceinline__ void epc_bulk_fence(void)
{
    asm volatile("fence.proxy.async;" ::: "memory");
}
/* Between those of shared memory only. */
static __device__ __forceinline__ void epc_bulk_fence_shared(void)
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#else
#define EPC_BULK 0
#endif

#endif
