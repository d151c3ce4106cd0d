/* SPDX-License-Identifier: MIT */
/*
 * Second half of a dispatch: rows to their final place. A warp takes one token
 * at a time: it reads the row once and writes it to every destination, through
 * registers here, or through the bulk copy engine (movers.cuh).
 */
#ifndef EPI_EP_CUDA_ROWS_CUH
#define EPI_EP_CUDA_ROWS_CUH

#include "ep/cuda/layout.cuh"
#include "ep/cuda/quantise.cuh"

/* Where rows for one receiver go, as seen here. */
typedef struct epc_target {
    uint8_t *x;
    uint32_t *scales;
    uint8_t *ids;
    float *weights;
    int32_t *sources;
    epc_seal *seals; /* verify mode */
} epc_target;

/* A block's view of the call, in shared memory before the rows' stages. */
typedef struct epc_tables {
    epc_header *headers; /* [R] */
    epc_target *targets; /* [R] */
    int32_t *rows_at;    /* [R] rows of each receiver's region */
    int32_t *matrix;     /* [R * R] rows between ranks */
    int32_t *base;       /* [columns] first row of this rank's at the column's receiver */
    int32_t *total;      /* [columns] rows of all ranks */
    int32_t *sums;       /* [columns, units] rows of the units before; by token */
    uint8_t *rest;
} epc_tables;

/* Where an entry sends its token; rank -1: nowhere. */
typedef struct epc_place_of {
    int rank;
    uint32_t row;
} epc_place_of;

static __device__ __forceinline__ epc_place_of epc_find_place(const epc_dispatch_params *p,
                                                              const epc_tables *tables, int t,
                                                              int j)
{
    epc_place_of at = {-1, 0};
    if (t >= p->num_tokens || j >= p->width)
        return at;
    const epc_entry *list = p->cached ? p->entries : p->drafts;
    epc_entry entry = (epc_entry)__ldcg((const long long *)list + (int64_t)t * p->width + j);
    if (entry < 0)
        return at;
    int column = (int)(entry >> 32);
    at.rank = column;
    at.row = (uint32_t)entry;
    if (!p->cached) {
        at.rank = p->by_expert ? p->expert_rank[column] : column;
        int unit = column * p->units + (t >> p->unit_shift);
        at.row += tables->base[column] +
                  (p->by_expert ? __ldcg(&p->unit_counts[unit]) : tables->sums[unit]);
    }
    return at;
}

/* One token's destinations: lane j holds the j-th of at most 32 from some place in its list. */
typedef struct epc_fan {
    int rank;     /* destination; -1: none */
    uint32_t row; /* there */
    unsigned any; /* lanes that send */
} epc_fan;

static __device__ __forceinline__ epc_fan epc_fan_of(const epc_dispatch_params *p,
                                                     const epc_tables *tables, int t, int first)
{
    epc_fan fan;
    epc_place_of at = epc_find_place(p, tables, t, first + epc_lane());
    fan.rank = at.rank;
    fan.row = at.row;
    fan.any = __ballot_sync(EPC_ALL, at.rank >= 0);
    return fan;
}

/* Takes the next destination off `left`, in all lanes; false when there is none. */
static __device__ __forceinline__ bool epc_next_target(const epc_fan *fan, unsigned *left,
                                                       int *rank, int64_t *row)
{
    if (!*left)
        return false;
    int lane = __ffs((int)*left) - 1;
    *left &= *left - 1;
    *rank = __shfl_sync(EPC_ALL, fan->rank, lane);
    *row = __shfl_sync(EPC_ALL, fan->row, lane);
    return true;
}
#define EPC_EACH_TARGET(fan, rank, row) \
    int rank;                           \
    int64_t row;                        \
    for (unsigned left_ = (fan)->any; epc_next_target(fan, &left_, &rank, &row);)

/* ---------------------------------------------------------- beside the rows */

/* A warp's batch of tokens in shared memory: all pairs (token, place), read before any is written.
 */
#define EPC_BATCH_PAIRS 256
typedef struct epc_batch {
    int32_t rank[EPC_BATCH_PAIRS]; /* destination of the pair's entry; -1: none */
    int32_t row[EPC_BATCH_PAIRS];  /* there */
    int32_t id[EPC_BATCH_PAIRS];   /* of the pair's expert: rank above 16 bits of local id, or -1 */
    float weight[EPC_BATCH_PAIRS];
} epc_batch;

static __device__ __forceinline__ epc_batch *epc_batch_at(const epc_tables *tables, int side)
{
    return (epc_batch *)tables->rest + side;
}
/* The movers' stages lie behind the batches. */
static __device__ __forceinline__ uint8_t *epc_stages(const epc_dispatch_params *p,
                                                      const epc_tables *tables)
{
    return tables->rest + (int64_t)p->sides * (int)sizeof(epc_batch);
}

/* Reads a batch, and settles its entries in the handle. */
static __device__ void epc_read_batch(const epc_dispatch_params *p, const epc_tables *tables,
                                      epc_batch *batch, int first, int pairs)
{
#pragma unroll 4
    for (int i = epc_lane(); i < pairs; i += EPC_WARP) {
        int t = first + i / p->topk, k = i % p->topk;
        epc_place_of at = epc_find_place(p, tables, t, k);
        batch->rank[i] = at.rank;
        batch->row[i] = (int)at.row;
        if (p->cached)
            continue; /* no ids, and the entries are what they are */
        p->entries[(int64_t)t * p->topk + k] =
            at.rank < 0 ? EPC_NO_ENTRY : epc_entry_of(at.rank, (int)at.row);
        int id = (int)epc_read_id(p->ids, p->id_bytes, t * p->id_stride + k);
        batch->id[i] = id < 0 ? -1 : p->expert_rank[id] << 16 | p->expert_local[id];
        batch->weight[i] = p->weights ? p->weights[t * p->weight_stride + k] : 0;
    }
    __syncwarp();
}

static __device__ __forceinline__ void epc_put_id(const epc_dispatch_params *p,
                                                  const epc_target *target, int64_t slot, int local,
                                                  float weight)
{
    if (p->id_bytes == 8)
        ((int64_t *)target->ids)[slot] = local;
    else
        ((int32_t *)target->ids)[slot] = local;
    if (p->weights)
        target->weights[slot] = local < 0 ? 0 : weight;
}

/* Ids, weights and source tokens. Lanes of one row lie side by side, and rows that are neighbours
   at the receiver are written at about the same time: memory likes both. */
static __device__ void epc_send_ids(const epc_dispatch_params *p, const epc_tables *tables,
                                    const epc_batch *batch, int first, int pairs)
{
    int per_row = p->by_expert ? 1 : p->topk, lanes = 1; /* a power of two */
    while (lanes < per_row && lanes < EPC_WARP)
        lanes *= 2;
    int k0 = epc_lane() % lanes;
    for (int i = epc_lane() / lanes; i < pairs; i += EPC_WARP / lanes) {
        int rank = batch->rank[i], start = p->by_expert ? i : i / p->topk * p->topk;
        if (rank < 0)
            continue;
        const epc_target *target = &tables->targets[rank];
        for (int k = k0; k < per_row && !p->cached; k += lanes) {
            int id = batch->id[start + k];
            int local = id >= 0 && id >> 16 == rank ? id & 0xffff : -1;
            epc_put_id(p, target, (int64_t)batch->row[i] * per_row + k, local,
                       batch->weight[start + k]);
        }
        if (k0 == 0)
            target->sources[batch->row[i]] = first + i / p->topk;
    }
}

/* Scales that came with the input, of any strides: words [from, from + 64) of `count` tokens, at
   most 4, read before any is written. */
static __device__ __forceinline__ void epc_send_some_scales(const epc_dispatch_params *p,
                                                            const epc_tables *tables,
                                                            const epc_batch *batch, int base,
                                                            int first, int count, int from)
{
    uint32_t word[4][2];
    int at = from + epc_lane();
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int u = 0; u < 2; u++) {
            const uint32_t *scales =
                (const uint32_t *)p->scales + (base + first + i) * p->scale_row;
            if (i < count && at + u * EPC_WARP < p->scale_count)
                word[i][u] = scales[(at + u * EPC_WARP) * p->scale_column];
        }
#pragma unroll
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < p->topk && i < count; k++) {
            int pair = (first + i) * p->topk + k, rank = batch->rank[pair];
            if (rank < 0)
                continue;
            uint32_t *to =
                tables->targets[rank].scales + (int64_t)batch->row[pair] * p->scale_count + at;
#pragma unroll
            for (int u = 0; u < 2; u++)
                if (at + u * EPC_WARP < p->scale_count)
                    to[u * EPC_WARP] = word[i][u];
        }
}

/* All that travels beside the rows, by warp `warp` of `warps`. */
static __device__ void epc_send_beside(const epc_dispatch_params *p, const epc_tables *tables,
                                       int side, int warp, int warps)
{
    epc_batch *batch = epc_batch_at(tables, side);
    int tokens = EPC_BATCH_PAIRS / p->topk < EPC_WARP ? EPC_BATCH_PAIRS / p->topk : EPC_WARP;
    for (int first = warp * tokens; first < p->num_tokens; first += warps * tokens) {
        int count = p->num_tokens - first < tokens ? p->num_tokens - first : tokens;
        epc_read_batch(p, tables, batch, first, count * p->topk);
        epc_send_ids(p, tables, batch, first, count * p->topk);
        for (int i = 0; p->scales && i < count; i += 4)
            for (int from = 0; from < p->scale_count; from += 2 * EPC_WARP)
                epc_send_some_scales(p, tables, batch, first, i, count - i < 4 ? count - i : 4,
                                     from);
        __syncwarp();
    }
}

/* ------------------------------------------------------ through registers */

template <class V>
static __device__ void epc_copy_row(const epc_dispatch_params *p, const epc_fan *fan,
                                    const epc_target *targets, const uint8_t *x)
{
    int64_t count = p->shape.row_bytes / (int64_t)sizeof(V);
    const V *from = (const V *)x;
    int64_t first = 0;
    for (; first + 8 * EPC_WARP <= count; first += 8 * EPC_WARP) { /* 8 loads in flight a lane */
        V v[8];
#pragma unroll
        for (int u = 0; u < 8; u++)
            v[u] = from[first + epc_lane() + u * EPC_WARP];
        EPC_EACH_TARGET(fan, dst, row)
        {
            V *to = (V *)(targets[dst].x + row * p->shape.row_bytes) + first + epc_lane();
#pragma unroll
            for (int u = 0; u < 8; u++)
                to[u * EPC_WARP] = v[u];
        }
    }
    for (; first < count; first += EPC_WARP) {
        int64_t i = first + epc_lane();
        V v = {};
        if (i < count)
            v = from[i];
        EPC_EACH_TARGET(fan, dst, row)
        {
            if (i < count)
                ((V *)(targets[dst].x + row * p->shape.row_bytes))[i] = v;
        }
    }
}

/* Widest access that the row's address and length allow. */
static __device__ void epc_move_row(const epc_dispatch_params *p, const epc_fan *fan,
                                    const epc_target *targets, const uint8_t *x)
{
    uint64_t bits = (uint64_t)x | (uint64_t)p->shape.row_bytes;
    if (bits % 16 == 0)
        epc_copy_row<int4>(p, fan, targets, x);
    else if (bits % 8 == 0)
        epc_copy_row<int2>(p, fan, targets, x);
    else if (bits % 2 == 0)
        epc_copy_row<uint16_t>(p, fan, targets, x);
    else
        epc_copy_row<uint8_t>(p, fan, targets, x);
}

/* Rows times a weight each, rounded once: backward of a combine with rows by expert. */
static __device__ void epc_move_scaled(const epc_dispatch_params *p, const epc_fan *fan,
                                       const epc_target *targets, const uint8_t *x, float weight)
{
    for (int h = epc_lane(); __any_sync(EPC_ALL, h < p->hidden); h += EPC_WARP) {
        float value = h < p->hidden ? epc_load_element(x, p->dtype, h) : 0;
        for (unsigned left = fan->any; left; left &= left - 1) {
            int from = __ffs((int)left) - 1;
            int dst = __shfl_sync(EPC_ALL, fan->rank, from);
            int64_t row = (int64_t)__shfl_sync(EPC_ALL, fan->row, from);
            float w = __shfl_sync(EPC_ALL, weight, from);
            if (h < p->hidden)
                epc_store_element(targets[dst].x + row * p->shape.row_bytes, p->dtype, h,
                                  w * value);
        }
    }
}

/* Quantises on the way, 512 channels of a warp at a time. */
static __device__ void epc_quantise_through_registers(const epc_dispatch_params *p,
                                                      const epc_fan *fan, const epc_target *targets,
                                                      const uint8_t *x)
{
    for (int first = 0; first < p->hidden; first += EPC_QUANT_CHANNELS) {
        epc_codes codes = epc_quantise(x, p->dtype, first, p->hidden, p->scale_kind);
        EPC_EACH_TARGET(fan, dst, row)
        {
            epc_put_codes(&codes, targets[dst].x + row * p->shape.row_bytes, first, p->hidden);
            epc_put_scales(&codes, targets[dst].scales + row * p->scale_count, first, p->hidden,
                           p->scale_kind);
        }
    }
}

#endif
