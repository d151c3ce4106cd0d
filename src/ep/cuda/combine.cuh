/* SPDX-License-Identifier: MIT */
/*
 * Weighted sums of rows that lie in the memory of several ranks, in the order
 * of each token's entries: acc = fma(weight, row, acc), one rounding at the end.
 *
 * Bulk: one warp streams pieces of rows into a ring of slots in shared memory;
 * the other threads own 16 bytes of a piece each and add them up as they come.
 * stream.cuh has another way, for rows that come over links.
 */
#ifndef EPI_EP_CUDA_COMBINE_CUH
#define EPI_EP_CUDA_COMBINE_CUH

#include "ep/cuda/exchange.cuh"
#include "ep/cuda/quantise.cuh"

/* Where each rank has its rows, in shared memory. */
typedef struct epc_combine_sources {
    const uint8_t *y[EPC_MAX_RANKS];
    const float *weights[EPC_MAX_RANKS];
    uint32_t stride[EPC_MAX_RANKS];        /* bytes between rows of y */
    uint32_t weight_stride[EPC_MAX_RANKS]; /* floats between rows of weights */
} epc_combine_sources;

static __device__ __forceinline__ const uint8_t *epc_row_at(const epc_combine_sources *from,
                                                            epc_entry entry)
{
    int rank = (int)(entry >> 32);
    return from->y[rank] + (int64_t)(uint32_t)entry * from->stride[rank];
}

/* Whether the bulk copy engine can read every rank's rows. */
static __device__ bool epc_rows_aligned(const epc_combine_params *p,
                                        const epc_combine_sources *from)
{
    uint64_t bits = 0;
    EPC_EACH_RANK(r, p->comm.num_ranks)
    if (!epc_is_masked(&p->comm, r))
        bits |= (uint64_t)from->y[r] | from->stride[r];
    return bits % 16 == 0;
}

typedef struct epc_combine_rows {
    const epc_combine_sources *from;
    const epc_entry *entries; /* [T, width], or of this block's own tokens */
    int own;                  /* which are then block, block + blocks, ... */
    int width, num_tokens, hidden;
    const float *weights; /* [T, width], or NULL: 1 */
    int64_t weight_stride;
    const uint8_t *bias[2];
    int64_t bias_stride[2];
    uint8_t *out;
    int64_t out_stride;
    int64_t row_bytes;
    int pieces, piece_bytes, slots; /* bulk: slots of the ring hold a piece each */
} epc_combine_rows;

static __device__ epc_combine_rows epc_rows_of(const epc_combine_params *p,
                                               const epc_combine_sources *from)
{
    epc_combine_rows rows;
    rows.from = from;
    rows.entries = p->entries;
    rows.own = 0;
    rows.width = p->width;
    rows.num_tokens = p->num_tokens;
    rows.hidden = p->hidden;
    rows.weights = p->weights;
    rows.weight_stride = p->weight_stride;
    for (int i = 0; i < 2; i++) {
        rows.bias[i] = p->bias[i];
        rows.bias_stride[i] = p->bias_stride[i];
    }
    rows.out = p->out;
    rows.out_stride = p->out_stride;
    rows.row_bytes = (int64_t)p->hidden * (p->dtype == EPC_F32 ? 4 : 2);
    rows.pieces = p->pieces;
    rows.piece_bytes = p->piece_bytes;
    rows.slots = p->slots;
    return rows;
}

static __device__ __forceinline__ const epc_entry *epc_entries_of(const epc_combine_rows *rows,
                                                                  int t)
{
    return rows->entries + (int64_t)(rows->own ? t / (int)gridDim.x : t) * rows->width;
}

static __device__ __forceinline__ float epc_weight_at(const epc_combine_rows *rows, int t, int j)
{
    return rows->weights && t < rows->num_tokens && j < rows->width
               ? rows->weights[t * rows->weight_stride + j]
               : 1.0f;
}

/* What sums start from. Without weights the first row counts as it is, also where it holds -0, and
   so does the first bias of a token that went nowhere. */
static __device__ __forceinline__ float epc_first_sum(const epc_combine_rows *rows, bool any)
{
    bool as_is = any ? !rows->weights : rows->bias[0] || rows->bias[1];
    return as_is ? -0.0f : 0.0f;
}

/* Elements in 16 bytes, and 16 bytes as floats. */
template <int DTYPE> struct epc_vector {
    static const int count = DTYPE == EPC_F32 ? 4 : 8;
    static const int bytes = DTYPE == EPC_F32 ? 4 : 2;
};

template <int DTYPE> static __device__ __forceinline__ void epc_unpack(int4 word, float *v)
{
    if (DTYPE == EPC_F32) {
        v[0] = __int_as_float(word.x), v[1] = __int_as_float(word.y);
        v[2] = __int_as_float(word.z), v[3] = __int_as_float(word.w);
        return;
    }
    epc_unpack2((uint32_t)word.x, DTYPE == EPC_F16, v);
    epc_unpack2((uint32_t)word.y, DTYPE == EPC_F16, v + 2);
    epc_unpack2((uint32_t)word.z, DTYPE == EPC_F16, v + 4 % (2 * epc_vector<DTYPE>::count));
    epc_unpack2((uint32_t)word.w, DTYPE == EPC_F16, v + 6 % (2 * epc_vector<DTYPE>::count));
}

/* Rounds to nearest even; any NaN becomes the one that codec/scalar.h names. */
static __device__ __forceinline__ int epc_pack2(float low, float high, bool f16)
{
    int word;
    if (f16)
        asm("{.reg .b16 a, b;\n cvt.rn.f16.f32 a, %1;\n cvt.rn.f16.f32 b, %2;\n mov.b32 %0, {a, "
            "b};}"
            : "=r"(word)
            : "f"(low), "f"(high));
    else
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

template <int DTYPE> static __device__ __forceinline__ int4 epc_pack(const float *v)
{
    int4 word;
    if (DTYPE == EPC_F32) {
        word.x = __float_as_int(epi_to_f32(v[0])), word.y = __float_as_int(epi_to_f32(v[1]));
        word.z = __float_as_int(epi_to_f32(v[2])), word.w = __float_as_int(epi_to_f32(v[3]));
        return word;
    }
    word.x = epc_pack2(v[0], v[1], DTYPE == EPC_F16);
    word.y = epc_pack2(v[2], v[3], DTYPE == EPC_F16);
    word.z = epc_pack2(v[4 % epc_vector<DTYPE>::count], v[5 % epc_vector<DTYPE>::count],
                       DTYPE == EPC_F16);
    word.w = epc_pack2(v[6 % epc_vector<DTYPE>::count], v[7 % epc_vector<DTYPE>::count],
                       DTYPE == EPC_F16);
    return word;
}

/* Adds the biases to 16 bytes' worth of sums and stores them; the caller's rows may be unaligned.
 */
template <int DTYPE>
static __device__ __forceinline__ void epc_store_sums(const epc_combine_rows *rows, int t,
                                                      int first, float *acc)
{
    const int n = epc_vector<DTYPE>::count;
#pragma unroll
    for (int b = 0; b < 2; b++) {
        if (!rows->bias[b])
            continue;
        const uint8_t *bias = rows->bias[b] + t * rows->bias_stride[b];
#pragma unroll
        for (int i = 0; i < n; i++)
            acc[i] += epc_load_element(bias, DTYPE, first + i);
    }
    uint8_t *out = rows->out + t * rows->out_stride;
    uint8_t *at = out + (int64_t)first * epc_vector<DTYPE>::bytes;
    if ((uint64_t)at % 16 == 0) {
        *(int4 *)at = epc_pack<DTYPE>(acc);
        return;
    }
#pragma unroll
    for (int i = 0; i < n; i++)
        epc_store_element(out, DTYPE, first + i, acc[i]);
}

/* Sixteen bytes of a row that may be unaligned. */
template <int DTYPE>
static __device__ __forceinline__ void epc_load_sixteen(const uint8_t *row, int first, float *v)
{
    const uint8_t *at = row + (int64_t)first * epc_vector<DTYPE>::bytes;
    if ((uint64_t)at % 16 == 0) {
        epc_unpack<DTYPE>(epc_load16(at), v);
        return;
    }
    for (int i = 0; i < epc_vector<DTYPE>::count; i++)
        v[i] = epc_load_element(row, DTYPE, first + i);
}

/* ------------------------------------------------------ through registers */

/* A block takes tokens in turn, a warp 64 x 16 bytes of one at a time, two of each lane's in flight
   per row. */
template <int DTYPE> static __device__ void epc_combine_registers(const epc_combine_rows *rows)
{
    const int n = epc_vector<DTYPE>::count, step = 2 * EPC_WARP * n;
    int parts = (rows->hidden + step - 1) / step;
    int warps = (int)(blockDim.x / EPC_WARP);
    for (int64_t item = epc_warp();; item += warps) {
        int64_t token = item / parts * gridDim.x + blockIdx.x;
        if (token >= rows->num_tokens)
            break;
        int t = (int)token, at = (int)(item % parts) * step + epc_lane() * n;
        const epc_entry *entries = epc_entries_of(rows, t);
        bool any = false;
        float acc[2][n];
        for (int j = 0; j < rows->width; j++)
            any |= entries[j] >= 0;
#pragma unroll
        for (int i = 0; i < n; i++)
            acc[0][i] = acc[1][i] = epc_first_sum(rows, any);
#pragma unroll 4
        for (int j = 0; j < rows->width; j++) {
            epc_entry entry = entries[j];
            if (entry < 0)
                continue;
            float w = rows->weights ? rows->weights[t * rows->weight_stride + j] : 1.0f, v[2][n];
            const uint8_t *row = epc_row_at(rows->from, entry);
#pragma unroll
            for (int u = 0; u < 2; u++)
                if (at + u * EPC_WARP * n < rows->hidden)
                    epc_load_sixteen<DTYPE>(row, at + u * EPC_WARP * n, v[u]);
#pragma unroll
            for (int u = 0; u < 2; u++)
#pragma unroll
                for (int i = 0; i < n; i++)
                    acc[u][i] = fmaf(w, v[u][i], acc[u][i]);
        }
        for (int u = 0; u < 2; u++)
            if (at + u * EPC_WARP * n < rows->hidden)
                epc_store_sums<DTYPE>(rows, t, at + u * EPC_WARP * n, acc[u]);
    }
}

/* ------------------------------------------------------ through the engine */

#if EPC_BULK
#define EPC_MAX_SLOTS 64

/* What the producer says of a slot before its bytes arrive. */
typedef struct epc_slot {
    float weight;
    int item;      /* which piece of which token; -1: no more */
    uint32_t last; /* the item's last row */
    uint32_t none; /* no row at all: a token that went nowhere */
} epc_slot;

typedef struct epc_ring {
    uint64_t full[EPC_MAX_SLOTS], empty[EPC_MAX_SLOTS];
    epc_slot slot[EPC_MAX_SLOTS];
} epc_ring;

static __device__ __forceinline__ uint32_t epc_piece_bytes(const epc_combine_rows *rows,
                                                           int64_t row_bytes, int piece)
{
    int64_t left = row_bytes - (int64_t)piece * rows->piece_bytes;
    return (uint32_t)(left < rows->piece_bytes ? left : rows->piece_bytes);
}

/* Queues the rows in lanes of `valid`, at most `slots` of them; `first` is the ring position of the
 * first. */
static __device__ void epc_queue_rows(const epc_combine_rows *rows, epc_ring *ring, uint8_t *memory,
                                      uint32_t first, unsigned valid, const uint8_t *from,
                                      uint32_t bytes, float weight, int item, bool ends)
{
    if (!(valid >> epc_lane() & 1))
        return;
    uint32_t at = first + (uint32_t)__popc(valid & ((1u << epc_lane()) - 1));
    uint32_t slot = at % (uint32_t)rows->slots, turn = at / (uint32_t)rows->slots;
    epc_mbar_wait(&ring->empty[slot], (turn & 1) ^ 1);
    ring->slot[slot].weight = weight;
    ring->slot[slot].item = item;
    ring->slot[slot].none = 0;
    ring->slot[slot].last = ends && !(valid >> epc_lane() >> 1);
    epc_mbar_expect(&ring->full[slot], bytes);
    uint8_t *to = memory + (int64_t)slot * rows->piece_bytes;
    if (rows->own)
        epc_bulk_load_once(to, from, bytes, &ring->full[slot], epc_evict_first());
    else
        epc_bulk_load(to, from, bytes, &ring->full[slot]);
}

static __device__ void epc_queue_nothing(const epc_combine_rows *rows, epc_ring *ring, uint32_t at,
                                         int item)
{
    if (epc_lane() == 0) {
        uint32_t slot = at % (uint32_t)rows->slots, turn = at / (uint32_t)rows->slots;
        epc_mbar_wait(&ring->empty[slot], (turn & 1) ^ 1);
        ring->slot[slot].item = item;
        ring->slot[slot].none = 1;
        ring->slot[slot].last = 1;
        epc_mbar_arrive(&ring->full[slot]);
    }
    __syncwarp();
}

/* One item's rows: up to `slots` lanes go at once, so that no lane waits for a slot that a later
   lane of its own warp must fill. */
static __device__ __forceinline__ epc_entry epc_entry_at(const epc_combine_rows *rows, int t, int j)
{
    return t < rows->num_tokens && j < rows->width ? epc_entries_of(rows, t)[j] : -1;
}

/* `entry` and `weight` are the lane's of the token's first 32. */
static __device__ uint32_t epc_queue_item(const epc_combine_rows *rows, epc_ring *ring,
                                          uint8_t *memory, uint32_t at, int item, epc_entry entry,
                                          float weight)
{
    int t = item / rows->pieces, piece = item % rows->pieces;
    uint32_t bytes = epc_piece_bytes(rows, rows->row_bytes, piece), start = at;
    for (int first = 0; first < rows->width; first += EPC_WARP) {
        int j = first + epc_lane();
        if (first) {
            entry = epc_entry_at(rows, t, j);
            weight = epc_weight_at(rows, t, j);
        }
        bool more = false; /* entries behind these 32 */
        for (int later = first + EPC_WARP; later < rows->width && !more; later++)
            more = epc_entries_of(rows, t)[later] >= 0;
        unsigned valid = __ballot_sync(EPC_ALL, entry >= 0);
        const uint8_t *from = NULL;
        if (entry >= 0)
            from = epc_row_at(rows->from, entry) + (int64_t)piece * rows->piece_bytes;
        while (valid) {
            unsigned now = valid;
            while (__popc(now) > rows->slots)
                now &= ~(1u << (31 - __clz((int)now)));
            valid &= ~now;
            epc_queue_rows(rows, ring, memory, at, now, from, bytes, weight, item, !valid && !more);
            at += (uint32_t)__popc(now);
            __syncwarp();
        }
    }
    if (at == start)
        epc_queue_nothing(rows, ring, at++, item);
    return at;
}

/* One item's rows as they come; false at the end. */
template <int DTYPE>
static __device__ bool epc_sum_item(const epc_combine_rows *rows, epc_ring *ring,
                                    const uint8_t *memory, uint32_t *at)
{
    const int n = epc_vector<DTYPE>::count;
    int mine = ((int)threadIdx.x - EPC_WARP) * 16, item = 0; /* bytes into the piece */
    bool none = false;
    float acc[n];
#pragma unroll
    for (int i = 0; i < n; i++)
        acc[i] = epc_first_sum(rows, true);
    for (bool last = false; !last; ++*at) {
        uint32_t slot = *at % (uint32_t)rows->slots, turn = *at / (uint32_t)rows->slots;
        epc_mbar_wait(&ring->full[slot], turn & 1);
        epc_slot what = ring->slot[slot];
        last = what.last;
        item = what.item;
        none = what.none;
        if (!what.none &&
            mine < rows->piece_bytes) { /* past the row's end lies what is not stored */
            float v[n];
            epc_unpack<DTYPE>(*(const int4 *)(memory + (int64_t)slot * rows->piece_bytes + mine),
                              v);
#pragma unroll
            for (int i = 0; i < n; i++)
                acc[i] = fmaf(what.weight, v[i], acc[i]);
        }
        __syncwarp();
        if (epc_lane() == 0)
            epc_mbar_arrive(&ring->empty[slot]);
    }
    if (item < 0)
        return false;
    if (none) {
#pragma unroll
        for (int i = 0; i < n; i++)
            acc[i] = epc_first_sum(rows, false);
    }
    int piece = item % rows->pieces;
    if (mine < (int)epc_piece_bytes(rows, rows->row_bytes, piece))
        epc_store_sums<DTYPE>(rows, item / rows->pieces,
                              (piece * rows->piece_bytes + mine) / epc_vector<DTYPE>::bytes, acc);
    return true;
}

/* The next item: of the block's own, or one that nobody has taken. */
static __device__ __forceinline__ int epc_next_item(const epc_combine_rows *rows, epc_state *state,
                                                    uint32_t *ahead)
{
    if (!rows->own)
        return (int)epc_take_next(state, ahead);
    int n = (int)(*ahead)++, pieces = rows->pieces;
    return (n / pieces * (int)gridDim.x + (int)blockIdx.x) * pieces + n % pieces;
}

/* By the warp that brings rows: the next item's entries are on their way while this one's rows are
   queued. */
static __device__ void epc_queue_items(const epc_combine_rows *rows, epc_ring *ring,
                                       epc_state *state, uint8_t *memory)
{
    int items = rows->num_tokens * rows->pieces;
    uint32_t at = 0, ahead = rows->own ? 0 : epc_take_first(state);
    int item = epc_next_item(rows, state, &ahead), t = item / rows->pieces;
    epc_entry entry = epc_entry_at(rows, t, epc_lane());
    float weight = epc_weight_at(rows, t, epc_lane());
    while (item < items) {
        int next = epc_next_item(rows, state, &ahead);
        t = next / rows->pieces;
        epc_entry later = epc_entry_at(rows, t, epc_lane());
        float later_weight = epc_weight_at(rows, t, epc_lane());
        at = epc_queue_item(rows, ring, memory, at, item, entry, weight);
        item = next;
        entry = later;
        weight = later_weight;
    }
    epc_queue_nothing(rows, ring, at, -1);
}

/* By the block's first threads; a barrier of the block is to follow. */
static __device__ __forceinline__ void epc_begin_ring(epc_ring *ring, int slots)
{
    uint32_t consumers = blockDim.x / EPC_WARP - 1;
    for (int s = (int)threadIdx.x; s < slots; s += (int)blockDim.x) {
        epc_mbar_init(&ring->full[s], 1);
        epc_mbar_init(&ring->empty[s], consumers);
        epc_mbar_init_done();
    }
}

template <int DTYPE>
static __device__ void epc_combine_ring(const epc_combine_rows *rows, epc_state *state,
                                        epc_ring *ring, uint8_t *memory)
{
    if (epc_warp() == 0) {
        epc_bulk_fence(); /* rows that ordinary stores of other kernels wrote */
        epc_queue_items(rows, ring, state, memory);
    } else {
        uint32_t at = 0;
        while (epc_sum_item<DTYPE>(rows, ring, memory, &at)) {
        }
    }
    __syncthreads();
}

template <int DTYPE>
static __device__ void epc_combine_bulk(const epc_combine_rows *rows, epc_state *state,
                                        uint8_t *memory)
{
    __shared__ epc_ring ring;
    epc_begin_ring(&ring, rows->slots);
    __syncthreads();
    epc_combine_ring<DTYPE>(rows, state, &ring, memory);
}
#else
typedef struct epc_ring {
    int none;
} epc_ring;
static __device__ __forceinline__ void epc_begin_ring(epc_ring *ring, int slots)
{
    (void)ring;
    (void)slots;
}
template <int DTYPE>
static __device__ void epc_combine_ring(const epc_combine_rows *rows, epc_state *state,
                                        epc_ring *ring, uint8_t *memory)
{
    (void)state;
    (void)ring;
    (void)memory;
    epc_combine_registers<DTYPE>(rows);
}
template <int DTYPE>
static __device__ void epc_combine_bulk(const epc_combine_rows *rows, epc_state *state,
                                        uint8_t *memory)
{
    (void)state;
    (void)memory;
    epc_combine_registers<DTYPE>(rows);
}
#endif

#endif
