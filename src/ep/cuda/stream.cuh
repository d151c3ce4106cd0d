/* SPDX-License-Identifier: MIT */
/*
 * The sums of combine.cuh through the bulk copy engine. Each warp streams rows
 * through a ring of its own in shared memory: an item, one piece of a token's
 * rows, comes row by row and is added up in registers, while rows of the warp's
 * next items are on their way. A warp waits for nobody but the engine, so a row
 * from far away, or the counter's answer, holds up one warp only.
 */
#ifndef EPI_EP_CUDA_STREAM_CUH
#define EPI_EP_CUDA_STREAM_CUH

#include "ep/cuda/combine.cuh"

#if EPC_BULK
#define EPC_STEPS (EPC_STREAM_PIECE / EPC_WARP / 16) /* 16 bytes of each lane in a piece */

/* What a slot holds. */
typedef struct __align__(16) epc_held
{
    float weight;
    int token, piece;
    uint16_t last; /* the item's last row */
    uint16_t none; /* no row at all: a token that went nowhere */
}
epc_held;

/* An item, and the lane's of 32 of the token's entries. */
typedef struct epc_stream_item {
    int token, piece;
    epc_entry entry;
    float weight;
} epc_stream_item;

typedef struct epc_stream {
    uint8_t *memory; /* [slots, EPC_STREAM_PIECE] */
    epc_held *held;  /* [slots] */
    uint64_t *full;  /* [slots], on which loads complete */
    int put, queued; /* slot to fill next, and how many are filled */

    epc_stream_item item; /* whose rows are being queued */
    int first;            /* of the entries that lanes hold */
    unsigned left;        /* lanes whose rows are not queued yet */
    bool more, any;       /* entries behind those that lanes hold; any queued yet */
    const uint8_t *from;  /* the lane's row, at the piece */

    epc_stream_item next; /* its entries are on their way */
    uint32_t ahead;       /* lane 0: an item taken behind it */
} epc_stream;

static __device__ __forceinline__ void epc_read_entry(const epc_combine_rows *rows,
                                                      epc_stream_item *item, int first)
{
    int j = first + epc_lane();
    item->entry = epc_entry_at(rows, item->token, j);
    item->weight = epc_weight_at(rows, item->token, j);
}

static __device__ __forceinline__ void epc_take_item(const epc_combine_rows *rows, epc_state *state,
                                                     epc_stream *stream)
{
    uint32_t n = epc_take_next(state, &stream->ahead);
    stream->next.token = (int)(n / (uint32_t)rows->pieces);
    stream->next.piece = (int)(n % (uint32_t)rows->pieces);
    epc_read_entry(rows, &stream->next, 0);
}

/* Looks at the entries that lanes hold. */
static __device__ __forceinline__ void epc_face_entries(const epc_combine_rows *rows,
                                                        epc_stream *stream)
{
    const epc_stream_item *item = &stream->item;
    stream->left = __ballot_sync(EPC_ALL, item->entry >= 0);
    stream->more = false;
    for (int j = stream->first + EPC_WARP; j < rows->width && !stream->more; j++)
        stream->more = epc_entry_at(rows, item->token, j) >= 0;
    if (item->entry >= 0)
        stream->from =
            epc_row_at(rows->from, item->entry) + (int64_t)item->piece * EPC_STREAM_PIECE;
}

/* Finds rows to queue, or an item that has none; false: no more items. */
static __device__ __forceinline__ bool epc_find_rows(const epc_combine_rows *rows, epc_state *state,
                                                     epc_stream *stream)
{
    while (!stream->left) {
        if (stream->more) {
            stream->first += EPC_WARP;
            epc_read_entry(rows, &stream->item, stream->first);
        } else {
            if (stream->next.token >= rows->num_tokens)
                return false;
            stream->item = stream->next;
            stream->first = 0;
            stream->any = false;
            epc_take_item(rows, state, stream);
        }
        epc_face_entries(rows, stream);
        if (!stream->left && !stream->more && !stream->any)
            break;
    }
    return true;
}

static __device__ __forceinline__ uint32_t epc_stream_bytes(const epc_combine_rows *rows, int piece)
{
    int64_t left = rows->row_bytes - (int64_t)piece * EPC_STREAM_PIECE;
    return (uint32_t)(left < EPC_STREAM_PIECE ? left : EPC_STREAM_PIECE);
}

/* The lane whose turn it is has the engine bring its row. */
static __device__ __forceinline__ void epc_queue_row(const epc_combine_rows *rows,
                                                     epc_stream *stream)
{
    int slot = stream->put;
    bool none = !stream->left, mine = epc_lane() == (none ? 0 : __ffs((int)stream->left) - 1);
    stream->left &= stream->left - 1;
    stream->any = true;
    if (mine) {
        const epc_stream_item *item = &stream->item;
        uint32_t bytes = none ? 0 : epc_stream_bytes(rows, item->piece);
        epc_held held = {item->weight, item->token, item->piece, !stream->left && !stream->more,
                         none};
        stream->held[slot] = held;
        epc_mbar_expect(&stream->full[slot], bytes);
        if (!none)
            epc_bulk_load(stream->memory + slot * EPC_STREAM_PIECE, stream->from, bytes,
                          &stream->full[slot]);
    }
    stream->put = slot + 1 == rows->slots ? 0 : slot + 1;
    stream->queued++;
}

template <int DTYPE> struct epc_sums {
    float of[EPC_STEPS][epc_vector<DTYPE>::count];
};

template <int DTYPE>
static __device__ __forceinline__ void epc_set_sums(epc_sums<DTYPE> *sums, float value)
{
#pragma unroll
    for (int s = 0; s < EPC_STEPS; s++)
#pragma unroll
        for (int i = 0; i < epc_vector<DTYPE>::count; i++)
            sums->of[s][i] = value;
}

template <int DTYPE>
static __device__ __forceinline__ void epc_add_row(epc_sums<DTYPE> *sums, const uint8_t *row,
                                                   float weight)
{
#pragma unroll
    for (int s = 0; s < EPC_STEPS; s++) { /* past the row's end lies what is not stored */
        float v[epc_vector<DTYPE>::count];
        epc_unpack<DTYPE>(((const int4 *)row)[s * EPC_WARP + epc_lane()], v);
#pragma unroll
        for (int i = 0; i < epc_vector<DTYPE>::count; i++)
            sums->of[s][i] = fmaf(weight, v[i], sums->of[s][i]);
    }
}

template <int DTYPE>
static __device__ __forceinline__ void epc_store_item(const epc_combine_rows *rows,
                                                      const epc_held *held, epc_sums<DTYPE> *sums)
{
    int64_t at = (int64_t)held->piece * EPC_STREAM_PIECE + epc_lane() * 16;
#pragma unroll
    for (int s = 0; s < EPC_STEPS; s++, at += EPC_WARP * 16)
        if (at < rows->row_bytes)
            epc_store_sums<DTYPE>(rows, held->token, (int)(at / epc_vector<DTYPE>::bytes),
                                  sums->of[s]);
}

template <int DTYPE>
static __device__ void epc_sum_stream(const epc_combine_rows *rows, epc_state *state,
                                      epc_stream *stream)
{
    const float start = epc_first_sum(rows, true);
    epc_sums<DTYPE> sums;
    epc_set_sums(&sums, start);
    for (uint32_t slot = 0, parity = 0;;) {
        while (stream->queued < rows->slots && epc_find_rows(rows, state, stream))
            epc_queue_row(rows, stream);
        if (!stream->queued)
            return;
        epc_mbar_wait(&stream->full[slot], parity);
        epc_held held = stream->held[slot];
        if (!held.none)
            epc_add_row(&sums, stream->memory + slot * EPC_STREAM_PIECE, held.weight);
        else
            epc_set_sums(&sums, epc_first_sum(rows, false));
        __syncwarp(); /* all have read the slot: it is free */
        stream->queued--;
        if (++slot == (uint32_t)rows->slots) {
            slot = 0;
            parity ^= 1;
        }
        if (!held.last)
            continue;
        epc_store_item(rows, &held, &sums);
        epc_set_sums(&sums, start);
    }
}

/* The block's shared memory: all warps' slots, then what they hold, then barriers. */
template <int DTYPE>
static __device__ void epc_combine_streams(const epc_combine_rows *rows, epc_state *state,
                                           uint8_t *memory)
{
    int slots = EPC_STREAM_WARPS * rows->slots, mine = epc_warp() * rows->slots;
    epc_held *held = (epc_held *)(memory + slots * EPC_STREAM_PIECE);
    epc_stream stream = {};
    stream.memory = memory + mine * EPC_STREAM_PIECE;
    stream.held = held + mine;
    stream.full = (uint64_t *)(held + slots) + mine;
    if (epc_lane() < rows->slots)
        epc_mbar_init(&stream.full[epc_lane()], 1);
    epc_mbar_init_done();
    epc_bulk_fence(); /* rows that ordinary stores of other kernels wrote */
    __syncwarp();
    stream.ahead = epc_take_first(state);
    epc_take_item(rows, state, &stream);
    epc_sum_stream<DTYPE>(rows, state, &stream);
    __syncthreads();
}
#else
template <int DTYPE>
static __device__ void epc_combine_streams(const epc_combine_rows *rows, epc_state *state,
                                           uint8_t *memory)
{
    (void)state;
    (void)memory;
    epc_combine_registers<DTYPE>(rows);
}
#endif

#endif
