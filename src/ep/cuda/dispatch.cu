/* SPDX-License-Identifier: MIT */
/* The dispatch kernel: layout, exchange of headers and counts, rows, completion; one launch. */
#include "ep/cuda/kernels.h"
#include "ep/cuda/movers.cuh"
#include "ep/cuda/verify.cuh"

static __host__ __device__ inline size_t epc_round16(size_t bytes)
{
    return (bytes + 127) / 128 * 128;
}

/* `sums` of all columns' units. */
static __host__ __device__ inline epc_tables epc_tables_at(uint8_t *memory, int ranks, int columns,
                                                           int sums)
{
    epc_tables t;
    size_t at = 0;
    t.headers = (epc_header *)(memory + at);
    at = epc_round16(at + sizeof(epc_header) * ranks);
    t.targets = (epc_target *)(memory + at);
    at = epc_round16(at + sizeof(epc_target) * ranks);
    t.rows_at = (int32_t *)(memory + at);
    at = epc_round16(at + 4 * (size_t)ranks);
    t.matrix = (int32_t *)(memory + at);
    at = epc_round16(at + 4 * (size_t)ranks * ranks);
    t.base = (int32_t *)(memory + at);
    at = epc_round16(at + 4 * (size_t)columns);
    t.total = (int32_t *)(memory + at);
    at = epc_round16(at + 4 * (size_t)columns);
    t.sums = (int32_t *)(memory + at);
    at = epc_round16(at + 4 * (size_t)sums);
    t.rest = memory + at;
    return t;
}

extern "C" size_t epc_dispatch_tables_bytes(int ranks, int columns, int sums)
{
    epc_tables tables = epc_tables_at(NULL, ranks, columns, sums);
    return (size_t)tables.rest;
}

extern "C" size_t epc_layout_bytes(int ranks, int experts, int by_expert, int warps)
{
    size_t columns = by_expert ? (size_t)experts : (size_t)ranks;
    return ((by_expert ? 0 : (size_t)experts) + (size_t)warps * 2 * columns) * sizeof(uint32_t);
}

static __device__ int epc_round_to(int count, int alignment)
{
    return (count + alignment - 1) / alignment * alignment;
}

#define EPC_COUNTS_AHEAD 8 /* loads of counts in flight a thread */

/* One column's counts of all ranks. */
static __device__ bool epc_gather_column(const epc_dispatch_params *p, const epc_call *call,
                                         epc_tables *tables, int column)
{
    const epc_comm *comm = call->comm;
    int ranks = comm->num_ranks, before = 0, total = 0;
    bool ok = true;
    int dst = p->by_expert ? p->expert_rank[column] : column, skip = p->by_expert ? ranks : 0;
    for (int first = 0; first < ranks; first += EPC_COUNTS_AHEAD) {
        uint64_t word[EPC_COUNTS_AHEAD];
#pragma unroll
        for (int i = 0; i < EPC_COUNTS_AHEAD; i++)
            word[i] =
                first + i < ranks
                    ? epc_load_word(epc_counts_at(comm, comm->rank, first + i) + skip + column)
                    : 0;
#pragma unroll
        for (int i = 0; i < EPC_COUNTS_AHEAD; i++) {
            int s = first + i;
            uint32_t count = (uint32_t)word[i];
            if (s >= ranks || epc_is_masked(comm, s))
                continue;
            if ((uint32_t)(word[i] >> 32) != call->epoch)
                ok &= epc_wait_word(call, s, epc_counts_at(comm, comm->rank, s) + skip + column,
                                    &count);
            before += s < comm->rank ? (int)count : 0;
            total += (int)count;
            if (count)
                atomicAdd(&tables->matrix[s * ranks + dst], (int)count);
        }
    }
    tables->base[column] = before;
    tables->total[column] = total;
    return ok;
}

/* Gathers every column's counts. */
static __device__ bool epc_gather_counts(const epc_dispatch_params *p, const epc_call *call,
                                         epc_tables *tables)
{
    int columns = p->by_expert ? p->num_experts : call->comm->num_ranks;
    bool ok = true;
    /* from the last thread down: the first ones gather headers meanwhile */
    for (int column = (int)(blockDim.x - 1 - threadIdx.x); column < columns && ok;
         column += (int)blockDim.x)
        ok &= epc_gather_column(p, call, tables, column);
    if (p->by_expert)
        __threadfence(); /* this rank's own words vouch for the sums in unit_counts */
    return ok;
}

/* First of rank `rank`'s experts in expert_order. */
static __device__ int epc_first_expert(const epc_dispatch_params *p, int rank)
{
    int lower = 0, upper = p->num_experts;
    while (lower < upper) {
        int middle = (lower + upper) / 2;
        if (p->expert_rank[p->expert_order[middle]] < rank)
            lower = middle + 1;
        else
            upper = middle;
    }
    return lower;
}

/* With rows by expert: adds the start of each expert's group, and finds each receiver's rows. */
static __device__ void epc_place_groups(const epc_dispatch_params *p, epc_tables *tables, int ranks)
{
    int r = (int)threadIdx.x;
    if (r >= ranks)
        return;
    int start = 0;
    for (int i = epc_first_expert(p, r); i < p->num_experts; i++) {
        int e = p->expert_order[i];
        if (p->expert_rank[e] != r)
            break;
        tables->base[e] += start;
        start += epc_round_to(tables->total[e], p->alignment);
    }
    tables->rows_at[r] = start;
}

/* Whether some rank can't wait for its window to grow: then none asks for more than it must. */
static __device__ bool epc_any_worst(const epc_call *call, const epc_tables *tables)
{
    bool any = false;
    EPC_EACH_RANK(r, call->comm->num_ranks)
    any |= !epc_is_masked(call->comm, r) && tables->headers[r][EPC_F_WORST];
    return any;
}

/* Where each receiver's arrays are, and whether they fit. The same verdict on every rank. */
static __device__ bool epc_place_rows(const epc_dispatch_params *p, const epc_call *call,
                                      epc_tables *tables)
{
    const epc_comm *comm = call->comm;
    int ranks = comm->num_ranks, r = (int)threadIdx.x, ok = 1;
    if (p->by_expert && !p->cached)
        epc_place_groups(p, tables, ranks);
    if (r < ranks) {
        const uint32_t *header = tables->headers[r];
        int64_t rows = p->by_expert ? tables->rows_at[r] : tables->total[r];
        uint32_t worst = header[EPC_F_WORST];
        if (p->cached)
            rows = p->rows_at[r];
        else if (worst && rows > worst) {
            ok = 0;
            epc_fail_call(call->state, EPC_FAIL_CAPACITY, (uint32_t)r, (uint32_t)rows, 0, worst, 0);
        } else if (worst)
            rows = worst;
        epc_region at = epc_region_of(&p->shape, rows);
        int64_t pieces[EPC_PIECES] = {epc_join(header[EPC_F_BYTES_LO], header[EPC_F_BYTES_HI])};
        for (int i = 1; i < EPC_PIECES; i++)
            pieces[i] = (int64_t)header[EPC_F_PIECES + i - 1] * EPC_PIECE_UNIT;
        bool hurried = epc_any_worst(call, tables);
        if (ok && !epc_is_masked(comm, r) &&
            !epc_has_room(pieces, at.end, rows, hurried ? 0 : p->spare)) {
            ok = 0;
            epc_fail_call(call->state, EPC_FAIL_CAPACITY, (uint32_t)r, (uint32_t)at.end,
                          (uint32_t)(at.end >> 32), hurried ? EPC_CANT_WAIT : 0, (uint32_t)rows);
        }
        tables->rows_at[r] = (int32_t)rows;
        if (!epc_is_masked(comm, r)) {
            uint8_t *region =
                epc_memory_at(comm, r, header[EPC_F_PLACE],
                              epc_join(header[EPC_F_OFFSET_LO], header[EPC_F_OFFSET_HI]));
            epc_target *target = &tables->targets[r];
            target->sources = (int32_t *)region;
            target->x = region + at.x;
            target->scales = (uint32_t *)(region + at.scales);
            target->ids = region + at.ids;
            target->weights = (float *)(region + at.weights);
            target->seals = (epc_seal *)(region + at.checksums);
        }
    }
    return __syncthreads_and(ok);
}

/* Block 0: the small arrays of the result, and what the host wants to know. */
static __device__ void epc_report_counts(const epc_dispatch_params *p, const epc_call *call,
                                         epc_tables *tables, bool fits)
{
    const epc_comm *comm = call->comm;
    int ranks = comm->num_ranks, me = comm->rank;
    int32_t *matrix = epc_report_matrix(p->report), *experts = epc_report_experts(p->report, ranks);
    for (int i = (int)threadIdx.x; i < ranks * ranks; i += (int)blockDim.x)
        p->matrix[i] = matrix[i] = tables->matrix[i];
    for (int r = (int)threadIdx.x; r < ranks; r += (int)blockDim.x)
        p->rows_at[r] = tables->rows_at[r];
    for (int e = (int)threadIdx.x; e < p->num_experts; e += (int)blockDim.x) {
        if (p->expert_rank[e] != me)
            continue;
        uint32_t total = 0, count;
        if (p->by_expert)
            total = (uint32_t)tables->total[e];
        else
            EPC_EACH_RANK(s, ranks)
        if (!epc_is_masked(comm, s) &&
            epc_wait_word(call, s, epc_counts_at(comm, me, s) + ranks + e, &count))
            total += count;
        int local = p->expert_local[e], rounded = epc_round_to((int)total, p->alignment);
        p->expert_tokens[local] = rounded;
        p->expert_filled[local] = (int32_t)total;
        experts[local] = rounded;
        if (p->by_expert) { /* base starts with the group's start, then adds lower ranks' rows */
            int lower = 0;
            EPC_EACH_RANK(s, me)
            if (!epc_is_masked(comm, s) &&
                epc_wait_word(call, s, epc_counts_at(comm, me, s) + ranks + e, &count))
                lower += (int)count;
            p->expert_offset[local] = tables->base[e] - lower;
            if (local == p->num_local - 1)
                p->expert_offset[local + 1] = tables->base[e] - lower + rounded;
        }
    }
    if (threadIdx.x == 0) {
        int rows = 0;
        if (p->by_expert && p->num_local == 0)
            p->expert_offset[0] = 0;
        EPC_EACH_RANK(s, ranks)
        {
            if (!p->by_expert)
                p->source_offset[s] = rows;
            rows += tables->matrix[s * ranks + me];
        }
        if (!p->by_expert)
            p->source_offset[ranks] = rows;
        p->report->num_rows = rows;
        p->report->rows = tables->rows_at[me];
        p->report->fits = fits;
    }
    __threadfence_system();
    __syncthreads();
    if (threadIdx.x == 0)
        *(volatile uint32_t *)&p->report->counted = p->serial;
}

/* Marks rows [first, end) of this rank's region as holding no token; by blocks `block` of `blocks`.
 */
static __device__ void epc_clear_rows(const epc_dispatch_params *p, const epc_target *mine,
                                      int64_t first, int64_t end, int blocks, int block)
{
    int per_row = p->by_expert ? 1 : p->topk;
    int64_t step = (int64_t)blocks * blockDim.x, at = block * (int64_t)blockDim.x + threadIdx.x;
    for (int64_t i = first * per_row + at; p->shape.id_bytes && i < end * per_row; i += step)
        epc_put_id(p, mine, i, -1, 0);
    for (int64_t i = first + at; i < end; i += step)
        mine->sources[i] = -1;
}

/* Groups are padded with zeros, which do no harm in a product. */
static __device__ void epc_zero_rows(const epc_dispatch_params *p, const epc_target *mine,
                                     int64_t first, int64_t end)
{
    uint64_t *x = (uint64_t *)(mine->x + first * p->shape.row_bytes);
    for (int64_t i = threadIdx.x; i < (end - first) * p->shape.row_bytes / 8; i += blockDim.x)
        x[i] = 0;
    uint32_t *scales = mine->scales + first * p->scale_count;
    for (int64_t i = threadIdx.x; i < (end - first) * p->scale_count; i += blockDim.x)
        scales[i] = 0;
}

static __device__ void epc_clear_padding(const epc_dispatch_params *p, const epc_call *call,
                                         epc_tables *tables)
{
    int me = call->comm->rank, blocks = (int)gridDim.x, block = (int)blockIdx.x;
    const epc_target *mine = &tables->targets[me];
    int64_t rows = tables->rows_at[me], start = 0;
    if (!p->by_expert) {
        int64_t used = p->cached ? p->source_offset[call->comm->num_ranks] : tables->total[me];
        epc_clear_rows(p, mine, used, rows, blocks, block);
        return;
    }
    int first = p->cached ? 0 : epc_first_expert(p, me);
    for (int local = 0; local < p->num_local; local++) {
        int64_t filled =
            p->cached ? p->expert_filled[local] : tables->total[p->expert_order[first + local]];
        int64_t end = start + epc_round_to((int)filled, p->alignment);
        if (local % blocks == block && start + filled < end) {
            epc_clear_rows(p, mine, start + filled, end, 1, 0);
            epc_zero_rows(p, mine, start + filled, end);
        }
        start = end;
    }
    epc_clear_rows(p, mine, start, rows, blocks, block);
}

static __device__ void epc_send_rows_registers(const epc_dispatch_params *p,
                                               const epc_tables *tables)
{
    int warp = epc_warp() * (int)gridDim.x + (int)blockIdx.x;
    if (epc_warp() < p->sides)
        epc_send_beside(p, tables, epc_warp(), warp, p->sides * (int)gridDim.x);
    uint32_t ahead = epc_take_first(p->comm.state);
    for (;;) {
        int t = (int)epc_take_next(p->comm.state, &ahead);
        if (t >= p->num_tokens)
            return;
        const uint8_t *x = p->x + t * p->x_stride;
        for (int first = 0; first < p->width; first += EPC_WARP) {
            epc_fan fan = epc_fan_of(p, tables, t, first);
            if (!fan.any)
                continue;
            if (p->quantise)
                epc_quantise_through_registers(p, &fan, tables->targets, x);
            else if (p->weighted)
                epc_move_scaled(p, &fan, tables->targets, x,
                                fan.rank >= 0 && p->row_weight
                                    ? p->row_weight[t * p->row_weight_stride + first + epc_lane()]
                                    : 1);
            else
                epc_move_row(p, &fan, tables->targets, x);
        }
    }
}

/* A word of this rank's header; `refused`: the ids turned out bad. */
static __device__ uint32_t epc_dispatch_field(const epc_dispatch_params *p, uint32_t refused, int f)
{
    switch (f) {
    case EPC_F_REJECT:
        return refused;
    case EPC_F_PLACE:
        return (uint32_t)p->place;
    case EPC_F_OFFSET_LO:
        return (uint32_t)p->offset;
    case EPC_F_OFFSET_HI:
        return (uint32_t)(p->offset >> 32);
    case EPC_F_BYTES_LO:
        return (uint32_t)p->pieces[0];
    case EPC_F_BYTES_HI:
        return (uint32_t)(p->pieces[0] >> 32);
    case EPC_F_WORST:
        return (uint32_t)p->worst;
    default:
        if (f >= EPC_F_PIECES && f < EPC_F_PIECES + EPC_PIECES - 1)
            return (uint32_t)(p->pieces[1 + f - EPC_F_PIECES] / EPC_PIECE_UNIT);
        return f < EPC_AGREED ? p->field[f] : 0;
    }
}

/* By one warp: its lanes hold a word each. */
static __device__ void epc_push_dispatch_header(const epc_dispatch_params *p, const epc_call *call,
                                                uint32_t refused)
{
    static_assert(EPC_NUM_FIELDS <= EPC_WARP, "a lane for each word");
    const epc_comm *comm = call->comm;
    int f = epc_lane();
    if (f >= EPC_NUM_FIELDS)
        return;
    uint32_t value = epc_dispatch_field(p, refused, f);
    EPC_EACH_RANK(r, comm->num_ranks)
    if (!epc_is_masked(comm, r))
        epc_store_word(epc_header_at(comm, r, comm->rank) + f, value, call->epoch);
}

/* Counts that travel, and all ranks' headers and counts; false: the call fails. */
static __device__ bool epc_exchange(const epc_dispatch_params *p, const epc_call *call,
                                    epc_tables *tables)
{
    int ranks = call->comm->num_ranks;
    uint32_t refused = p->reject;
    if (!refused && !p->cached) {
        if (epc_grid_barrier(call))
            epc_push_counts(p, call, tables->sums);
        else
            refused = EPC_WHY(call->comm->rank,
                              epc_load_gpu(&call->state->fail) == EPC_FAIL_ID ? EP_ERR_ARGUMENT
                                                                              : EP_ERR_CORRUPT,
                              0);
    }
    if (blockIdx.x == 0 && epc_warp() == (int)(blockDim.x / EPC_WARP) - 1)
        epc_push_dispatch_header(p, call, refused);
    if (p->reject)
        return false;
    for (int i = (int)threadIdx.x; i < ranks * ranks; i += (int)blockDim.x)
        tables->matrix[i] = 0;
    __syncthreads();
    bool ok = epc_gather_headers(call, p->field, tables->headers);
    if (!p->cached)
        ok = epc_gather_counts(p, call, tables) && ok;
    if (!__syncthreads_and(ok))
        return false;
    bool fits = epc_place_rows(p, call, tables);
    if (blockIdx.x == 0 && !p->cached)
        epc_report_counts(p, call, tables, fits);
    return fits;
}

/* Everything before rows move; false: none do. */
static __device__ bool epc_prepare_rows(const epc_dispatch_params *p, const epc_call *call,
                                        epc_tables *tables)
{
    bool stands = epc_exchange(p, call, tables);
    if (stands)
        epc_clear_padding(p, call, tables);
    return stands;
}

/* Counts this block's tokens in `memory`, which afterwards takes the tables. */
static __device__ void epc_layout(const epc_dispatch_params *p, const epc_call *call,
                                  uint8_t *memory)
{
    if (p->reject || p->cached)
        return;
    epc_count_units(p, call, (uint32_t *)memory);
    __syncthreads();
    epc_put_experts(p, (uint32_t *)memory);
    __syncthreads();
}

#if EPC_BULK
/* The first warps move rows; the ones after take what travels beside them. False: the call fails.
 */
template <bool QUANTISE>
static __device__ bool epc_run_bulk(const epc_dispatch_params *p, const epc_call *call,
                                    epc_tables *tables, uint8_t *memory)
{
    __shared__ uint64_t full[EPC_THREADS / EPC_WARP * EPC_MAX_SLOTS_OF_MOVER];
    int side = epc_warp() - p->movers;
    bool moves = side < 0 && !p->reject;
    epc_mover mover;
    if (moves && p->early)
        mover = epc_open_mover(p, epc_stages(p, tables), full);
    epc_layout(p, call, memory);
    if (moves && !p->early)
        mover = epc_open_mover(p, epc_stages(p, tables), full);
    bool stands = epc_prepare_rows(p, call, tables);
    if (moves && stands)
        epc_move_rows_bulk<QUANTISE>(p, tables, &mover);
    else if (moves)
        epc_close_mover(p, &mover);
    else if (stands && side < p->sides)
        epc_send_beside(p, tables, side, side * (int)gridDim.x + (int)blockIdx.x,
                        p->sides * (int)gridDim.x);
    return stands;
}
#endif

enum { EPC_BY_REGISTERS, EPC_BY_ENGINE, EPC_QUANTISED_BY_ENGINE, EPC_HOW };
/* More than this: the second half of a call. Apart, as all others take what it costs in registers.
 */
#define EPC_SECOND EPC_HOW

static constexpr int epc_threads_of(int how)
{
    return how == EPC_QUANTISED_BY_ENGINE ? EPC_CODING_THREADS : EPC_THREADS;
}

template <int KIND>
__global__ void __launch_bounds__(epc_threads_of(KIND), 1)
    epc_dispatch_kernel(const __grid_constant__ epc_dispatch_params p)
{
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ uint32_t refused;
    constexpr int HOW = KIND % EPC_HOW;
    if (KIND >= EPC_SECOND && p.comm.state->undone == p.comm.state->epoch)
        return epc_skip_call(p.comm.state, p.report, p.serial);
    epc_call call = epc_begin_call(&p.comm, p.timeout_ns);
    int columns = p.by_expert ? p.num_experts : p.comm.num_ranks;
    epc_tables tables = epc_tables_at(memory, p.comm.num_ranks, columns,
                                      p.by_expert || p.cached ? 0 : columns * p.units);
    call.refused = &refused;
    if (threadIdx.x == 0)
        refused = 0;
    if (!p.reject && !p.cached)
        epc_clear_layout(&p, (uint32_t *)memory);
    __syncthreads();
    bool stands = false;
#if EPC_BULK
    if (HOW != EPC_BY_REGISTERS)
        stands = epc_run_bulk<HOW == EPC_QUANTISED_BY_ENGINE>(&p, &call, &tables, memory);
#endif
    if (HOW == EPC_BY_REGISTERS) {
        epc_layout(&p, &call, memory);
        stands = epc_prepare_rows(&p, &call, &tables);
        if (stands)
            epc_send_rows_registers(&p, &tables);
    }
    if (p.verify && stands) {
        epc_tables copy = tables; /* the tables themselves stay in registers */
        epc_send_seals(&p, &copy);
    }
    epc_finish_call(&call, p.report, p.serial, p.verify);
}

typedef void (*epc_dispatch_fn)(epc_dispatch_params);
static const epc_dispatch_fn epc_kernels[] = {epc_dispatch_kernel<EPC_BY_REGISTERS>,
                                              epc_dispatch_kernel<EPC_BY_ENGINE>,
                                              epc_dispatch_kernel<EPC_QUANTISED_BY_ENGINE>,
                                              epc_dispatch_kernel<EPC_SECOND + EPC_BY_REGISTERS>,
                                              epc_dispatch_kernel<EPC_SECOND + EPC_BY_ENGINE>};

extern "C" int epc_dispatch_prepare(int max_shared)
{
    for (epc_dispatch_fn kernel : epc_kernels) {
        cudaError_t error = cudaFuncSetAttribute(
            (const void *)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared);
        if (error != cudaSuccess)
            return (int)error;
    }
    return (int)cudaSuccess;
}

extern "C" int epc_dispatch_launch(const epc_dispatch_params *params, int blocks, size_t shared,
                                   void *stream)
{
    void *arguments[] = {(void *)params};
    int how = !params->bulk      ? EPC_BY_REGISTERS
              : params->quantise ? EPC_QUANTISED_BY_ENGINE
                                 : EPC_BY_ENGINE;
    if (params->second_half) /* gradients are not quantised */
        how += EPC_SECOND;
    return (int)cudaLaunchKernel((const void *)epc_kernels[how], dim3((unsigned)blocks),
                                 dim3((unsigned)epc_threads_of(how)), arguments, shared,
                                 (cudaStream_t)stream);
}
