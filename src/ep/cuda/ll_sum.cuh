/* SPDX-License-Identifier: MIT */
/* Low latency: outputs stay at the experts' ranks; the tokens' owners read and sum them. */
#ifndef EPI_EP_CUDA_LL_SUM_CUH
#define EPI_EP_CUDA_LL_SUM_CUH

#include "ep/cuda/ll_call.cuh"
#include "ep/cuda/ll_logfmt.cuh"
#include "ep/cuda/ll_verify.cuh"

/* Expert outputs that peers can't read where they are, or that go encoded, to the area. */
static __device__ __noinline__ void epc_pack_outputs(const epc_ll_params *p)
{
    uint8_t *area = epc_area_at(p, p->comm.rank) + p->area.y;
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x),
        item = epc_warp() * (int)gridDim.x + (int)blockIdx.x;
    int64_t stride = (int64_t)p->hidden * 2, before = 0;
    for (int l = 0; l < p->num_local; l++) {
        int count = p->count[l];
        for (; item < before + count; item += warps) {
            int i = (int)(item - before);
            const uint8_t *from = p->y + l * p->y_expert_stride + i * p->y_row_stride;
            int64_t row = (int64_t)l * p->expert_rows + i;
            uint8_t *to = area + row * stride;
            if (p->encode)
                epc_logfmt_encode_row(from, p->hidden, epc_heads_at(p, p->comm.rank, row), to);
            else if ((uint64_t)from % 16 == 0)
                epc_copy_bytes(to, from, (int)stride);
            else
                for (int h = epc_lane(); h < p->hidden; h += EPC_WARP)
                    ((uint16_t *)to)[h] = ((const uint16_t *)from)[h];
        }
        before += count;
    }
}

static __device__ void epc_prepare_outputs(const epc_ll_params *p, const epc_call *call)
{
    if (p->refused)
        epc_fail_call(call->state, EPC_FAIL_REFUSED, p->refused, 0, 0, 0, 0);
    else if (p->y && epc_await_before(call, epc_ll_flag_of(p, EPC_LL_READ)))
        epc_pack_outputs(p);
}

/* Where the outputs are, and that they may be read; by one block. What kernels before or other
   blocks wrote is ahead of the flags, which release it. */
static __device__ void epc_announce_outputs(const epc_ll_params *p, const epc_call *call)
{
    int ranks = p->comm.num_ranks, r = (int)threadIdx.x;
    int i = r - (ranks + EPC_WARP - 1) / EPC_WARP * EPC_WARP; /* warps behind those of the flags */
    if (p->verify && !p->refused)
        epc_ll_seal_outputs(p);
    uint32_t why = p->refused;
    if (p->y && !why && epc_load_gpu(&call->state->fail) != EPC_OK)
        why = epc_why(call);
    if (r < ranks && !epc_is_masked(&p->comm, r))
        epc_raise(call, r, epc_ll_flag_of(p, EPC_LL_Y), why);
    for (; i < ranks * EPC_Y_FIELDS; i += (int)blockDim.x) {
        int f = i % EPC_Y_FIELDS;
        if (i >= 0 && !epc_is_masked(&p->comm, i / EPC_Y_FIELDS))
            epc_store_word((uint64_t *)(epc_area_at(p, i / EPC_Y_FIELDS) + p->area.fields) +
                               p->comm.rank * EPC_Y_FIELDS + f,
                           !why                 ? p->field[f]
                           : f == EPC_Y_ENCODED ? EPC_Y_FAILED
                                                : why,
                           call->epoch);
    }
}

/* What a block does before rows move is divided among its warps, so that no wait holds up another:
   the first ones announce, or make the ring ready, those from here on gather and list. */
#define EPC_GATHERERS 8
#define EPC_LISTERS 16

static __device__ __forceinline__ int epc_thread_from(int warp)
{
    return (int)((threadIdx.x + blockDim.x - warp * EPC_WARP) % blockDim.x);
}

/* Where every rank has its outputs: a thread waits for each word, and for each flag. */
static __device__ bool epc_gather_outputs(const epc_ll_params *p, const epc_call *call,
                                          epc_combine_sources *from, bool ok)
{
    __shared__ uint32_t field[EPC_MAX_RANKS][EPC_Y_FIELDS];
    const uint64_t *words = (const uint64_t *)(epc_area_at(p, p->comm.rank) + p->area.fields);
    int each = EPC_Y_FIELDS + 1;
    for (int i = epc_thread_from(EPC_GATHERERS); i < p->comm.num_ranks * each;
         i += (int)blockDim.x) {
        int r = i / each, f = i % each;
        if (epc_is_masked(&p->comm, r))
            continue;
        if (f < EPC_Y_FIELDS) {
            ok &= epc_wait_word(call, r, words + r * EPC_Y_FIELDS + f, &field[r][f]);
            continue;
        }
        const uint32_t *flag = epc_flag_at(&p->comm, p->comm.rank, r, epc_ll_flag_of(p, EPC_LL_Y));
        if (p->wait_cost && blockIdx.x == 0)
            p->wait_cost[r * p->wait_cost_stride] += epc_time_wait(call, r, flag);
        ok &= epc_wait_flag(call, r, flag, call->epoch);
    }
    if (!__syncthreads_and(ok))
        return false;
    int r = (int)threadIdx.x;
    if (r < p->comm.num_ranks && !epc_is_masked(&p->comm, r)) {
        const uint32_t *f = field[r];
        ok = f[EPC_Y_ENCODED] == (uint32_t)p->encode;
        if (f[EPC_Y_ENCODED] == EPC_Y_FAILED) {
            epc_fail_call(call->state, EPC_FAIL_ABORTED, f[EPC_Y_PLACE], 0, 0, 0, 0);
        } else if (!ok) {
            epc_fail_call(call->state, EPC_FAIL_MISMATCH, EPC_AGREED, (uint32_t)p->comm.rank,
                          (uint32_t)r, (uint32_t)p->encode, f[EPC_Y_ENCODED]);
        }
        int64_t offset = (int64_t)((uint64_t)f[EPC_Y_OFFSET_HI] << 32 | f[EPC_Y_OFFSET_LO]);
        from->y[r] = ok ? epc_memory_at(&p->comm, r, f[EPC_Y_PLACE], offset) : NULL;
        from->stride[r] = f[EPC_Y_STRIDE];
        from->weights[r] = (const float *)(epc_area_at(p, r) + p->area.heads); /* of encoded rows */
    }
    return __syncthreads_and(ok);
}

/* Verify mode: the ids must be those of the dispatch. */
static __device__ __noinline__ void epc_check_id(const epc_ll_params *p, const epc_call *call,
                                                 int t, int k, int id)
{
    int64_t now = epc_id_at(p, t, k);
    if (now != id && !(id < 0 && now >= 0 && now < p->num_experts &&
                       epc_is_masked(&p->comm, p->expert_rank[now])))
        epc_fail_call(call->state, EPC_FAIL_ID, (uint32_t)t, (uint32_t)k, (uint32_t)now,
                      (uint32_t)(now >> 32), 0);
}

/* Where each (token, place) of this block's has its row; false in the threads that could not
   learn it. */
static __device__ bool epc_list_rows(const epc_ll_params *p, const epc_call *call,
                                     epc_entry *entries)
{
    const uint64_t *begin = (const uint64_t *)(epc_area_at(p, p->comm.rank) + p->area.begin);
    epc_call dispatch = *call;
    dispatch.epoch = p->comm.state->ll_epoch[p->slot];
    bool ok = true;
    for (int i = epc_thread_from(EPC_LISTERS);; i += (int)blockDim.x) {
        int t = i / p->topk * (int)gridDim.x + (int)blockIdx.x, k = i % p->topk;
        if (t >= p->num_tokens)
            break;
        int id = p->saved_ids[t * p->topk + k], position = p->position[t * p->topk + k];
        epc_entry entry = -1;
        if (p->verify)
            epc_check_id(p, call, t, k, id);
        if (id >= 0) {
            int rank = p->expert_rank[id], local = p->expert_local[id];
            uint32_t first = 0;
            if (!p->comm.masked || !epc_is_masked(&p->comm, rank)) {
                ok &= epc_wait_word(&dispatch, rank, begin + id, &first);
                int64_t row = (int64_t)first + position;
                if (row < p->expert_rows)
                    entry = (epc_entry)((uint64_t)(uint32_t)rank << 32 |
                                        (uint32_t)((int64_t)local * p->expert_rows + row));
            }
        }
        entries[i] = entry;
    }
    return ok;
}

static __device__ epc_combine_rows epc_ll_rows_of(const epc_ll_params *p,
                                                  const epc_combine_sources *from,
                                                  const epc_entry *entries)
{
    epc_combine_rows rows;
    rows.from = from;
    rows.entries = entries;
    rows.own = 1;
    rows.width = p->topk;
    rows.num_tokens = p->num_tokens;
    rows.hidden = p->hidden;
    rows.weights = p->weights;
    rows.weight_stride = p->weight_stride;
    rows.bias[0] = rows.bias[1] = NULL;
    rows.bias_stride[0] = rows.bias_stride[1] = 0;
    rows.out = p->out;
    rows.out_stride = p->out_stride;
    rows.row_bytes = (int64_t)p->hidden * 2;
    rows.pieces = p->pieces;
    rows.piece_bytes = p->piece_bytes;
    rows.slots = p->slots;
    return rows;
}

/* Sums that do not go through the engine, in functions of their own: so the engine's keep what they
   need in registers. By value for the same reason. */
static __device__ __noinline__ void epc_sum_encoded(epc_combine_rows rows)
{
    epc_combine_encoded(&rows);
}
static __device__ __noinline__ void epc_sum_registers(epc_combine_rows rows)
{
    epc_combine_registers<EPC_BF16>(&rows);
}

static __device__ void epc_sum_outputs(const epc_ll_params *p, const epc_call *call,
                                       epc_combine_sources *from, uint8_t *memory)
{
    int most = (p->num_tokens + (int)gridDim.x - 1) / (int)gridDim.x * p->topk; /* of a block */
    __shared__ epc_ring ring;
    if (p->bulk)
        epc_begin_ring(&ring, p->slots);
    epc_entry *entries = p->entries ? p->entries + (int64_t)blockIdx.x * most : (epc_entry *)memory;
    if (!p->entries)
        memory += (most * (int)sizeof *entries + 127) / 128 * 128;
    bool ok = epc_list_rows(p, call, entries);
    if (!epc_gather_outputs(p, call, from, ok))
        return;
    if (!p->outside) /* else it ends when the others have read */
        epc_let_kernel_behind_come();
    epc_combine_rows rows = epc_ll_rows_of(p, from, entries);
    uint64_t bits = 0;
    EPC_EACH_RANK(r, p->comm.num_ranks)
    if (!epc_is_masked(&p->comm, r))
        bits |= (uint64_t)from->y[r] | from->stride[r];
    if (p->encode)
        epc_sum_encoded(rows);
    else if (p->bulk && bits % 16 == 0)
        epc_combine_ring<EPC_BF16>(&rows, call->state, &ring, memory);
    else
        epc_sum_registers(rows);
    if (p->verify)
        epc_ll_check_outputs(p, rows);
}

#endif
