/* SPDX-License-Identifier: MIT */
/*
 * Rows through the bulk copy engine. A mover is a warp that brings pieces of rows
 * to slots of shared memory, some ahead, and sends them from there. What is
 * quantised on the way leaves its slot for a slot of codes, so that the next
 * piece comes while these codes go.
 */
#ifndef EPI_EP_CUDA_MOVERS_CUH
#define EPI_EP_CUDA_MOVERS_CUH

#include "ep/cuda/rows.cuh"

#if EPC_BULK
#define EPC_MAX_SLOTS_OF_MOVER 2

typedef struct epc_mover {
    uint8_t *slots;
    uint64_t *full; /* [slots] on which loads complete */
    uint32_t ahead; /* lane 0: an item taken ahead */
    int item;       /* lane s: what slot s holds */
} epc_mover;

/* An item is a piece of a token's row. */
typedef struct epc_item {
    int token, piece;
} epc_item;
static __device__ __forceinline__ int epc_num_items(const epc_dispatch_params *p)
{
    return p->num_tokens * p->row_pieces;
}
static __device__ __forceinline__ epc_item epc_item_of(const epc_dispatch_params *p, int item)
{
    epc_item of = {item, 0};
    if (p->row_pieces > 1) {
        of.token = item / p->row_pieces;
        of.piece = item % p->row_pieces;
    }
    return of;
}

/* Begins to bring an item to `slot`, which nobody reads any more. */
static __device__ __forceinline__ void epc_bring(const epc_dispatch_params *p, epc_mover *mover,
                                                 int slot, int item)
{
    if (epc_lane() == slot)
        mover->item = item;
    if (epc_lane() != 0 || item >= epc_num_items(p))
        return;
    epc_item of = epc_item_of(p, item);
    int64_t offset = (int64_t)of.piece * p->piece_bytes, left = p->load_bytes - offset;
    uint32_t bytes = (uint32_t)(left < p->piece_bytes ? left : p->piece_bytes);
    uint8_t *to = mover->slots + slot * p->slot_bytes;
    epc_bulk_fence_shared(); /* what the warp read there, before what comes now */
    epc_mbar_expect(&mover->full[slot], bytes);
    epc_bulk_load(to, p->x + of.token * p->x_stride + offset, bytes, &mover->full[slot]);
}

static __device__ __forceinline__ void epc_bring_next(const epc_dispatch_params *p,
                                                      epc_mover *mover, int slot)
{
    epc_bring(p, mover, slot, (int)epc_take_next(p->comm.state, &mover->ahead));
}

/* By the movers: the first pieces are on their way before it is known where they go. */
static __device__ epc_mover epc_open_mover(const epc_dispatch_params *p, uint8_t *stages,
                                           uint64_t *full)
{
    epc_mover mover;
    uint32_t first = epc_lane() == 0 ? atomicAdd(&p->comm.state->next, p->slots + 1) : 0;
    mover.slots = stages + (int64_t)epc_warp() * p->stage_bytes;
    mover.full = full + epc_warp() * EPC_MAX_SLOTS_OF_MOVER;
    mover.item = epc_num_items(p);
    if (epc_lane() == 0) {
        for (int slot = 0; slot < p->slots; slot++)
            epc_mbar_init(&mover.full[slot], 1);
        epc_mbar_init_done();
    }
    __syncwarp();
    for (int slot = 0; slot < p->slots; slot++)
        epc_bring(p, &mover, slot, (int)__shfl_sync(EPC_ALL, first, 0) + slot);
    mover.ahead = first + (uint32_t)p->slots;
    return mover;
}

/* The call failed: nothing may arrive in shared memory once the block has gone. */
static __device__ void epc_close_mover(const epc_dispatch_params *p, const epc_mover *mover)
{
    for (int slot = 0; slot < p->slots; slot++)
        if (__shfl_sync(EPC_ALL, mover->item, slot) < epc_num_items(p))
            epc_mbar_wait(&mover->full[slot], 0);
}

/* What goes to each destination of one item. */
typedef struct epc_parcel {
    const uint8_t *bytes, *scales;
    int at, scales_at; /* in the row, and in its scales */
    int count, scales_count;
} epc_parcel;

/* Rows leave the cache first; scales fill lines in part and wait there for their neighbours. */
static __device__ __forceinline__ void epc_send_parcel(const epc_dispatch_params *p,
                                                       const epc_fan *fan,
                                                       const epc_target *targets,
                                                       const epc_parcel *parcel)
{
    /* what the engine takes */
    bool whole = (parcel->scales_at | parcel->scales_count | p->shape.scale_bytes) % 16 == 0;
    if (fan->rank >= 0) {
        const epc_target *to = &targets[fan->rank];
        epc_bulk_store(to->x + fan->row * p->shape.row_bytes + parcel->at, parcel->bytes,
                       (uint32_t)parcel->count, epc_evict_first());
        if (whole && parcel->scales_count)
            epc_bulk_store_kept((uint8_t *)to->scales + (int64_t)fan->row * p->shape.scale_bytes +
                                    parcel->scales_at,
                                parcel->scales, (uint32_t)parcel->scales_count);
    }
    if (whole || !parcel->scales_count)
        return;
    EPC_EACH_TARGET(fan, dst, row)
    {
        uint32_t *to = targets[dst].scales + row * p->scale_count + parcel->scales_at / 4;
        for (int i = epc_lane(); i < parcel->scales_count / 4; i += EPC_WARP)
            to[i] = ((const uint32_t *)parcel->scales)[i];
    }
}

/* A piece as it came. */
static __device__ epc_parcel epc_plain_parcel(const epc_dispatch_params *p, const uint8_t *slot,
                                              int piece)
{
    epc_parcel parcel;
    parcel.bytes = slot;
    parcel.at = piece * p->piece_bytes;
    int left = (int)p->shape.row_bytes - parcel.at;
    parcel.count = left < p->piece_bytes ? left : p->piece_bytes;
    parcel.scales = NULL; /* given scales travel beside the rows */
    parcel.scales_at = parcel.scales_count = 0;
    return parcel;
}

/* Quantises a piece from its slot to `to`. */
static __device__ epc_parcel epc_coded_parcel(const epc_dispatch_params *p, const uint8_t *slot,
                                              uint8_t *to, int piece)
{
    int per_piece = p->piece_bytes / (p->dtype == EPC_F32 ? 4 : 2);
    int word = p->scale_kind == EPC_SCALE_UE8M0 ? 9 : 7; /* log2 of the channels of a word */
    int start = piece * per_piece,
        channels = p->hidden - start < per_piece ? p->hidden - start : per_piece;
    uint32_t *scales = (uint32_t *)(to + per_piece);
    epc_code_piece(slot, p->dtype, channels, to, scales, p->scale_kind);
    epc_parcel parcel;
    parcel.bytes = to;
    parcel.at = start;
    parcel.count = channels;
    parcel.scales = (const uint8_t *)scales;
    parcel.scales_at = start >> word << 2;
    parcel.scales_count = (channels + (1 << word) - 1) >> word << 2;
    return parcel;
}

static __device__ __forceinline__ void epc_send_item(const epc_dispatch_params *p,
                                                     const epc_tables *tables, const epc_fan *fan,
                                                     int token, const epc_parcel *parcel)
{
    epc_send_parcel(p, fan, tables->targets, parcel);
    for (int first = EPC_WARP; first < p->width; first += EPC_WARP) {
        epc_fan more = epc_fan_of(p, tables, token, first);
        epc_send_parcel(p, &more, tables->targets, parcel);
    }
    epc_bulk_commit();
}

/* Sends all that this warp can take. Destinations are found while the item before leaves. */
template <bool QUANTISE>
static __device__ void epc_move_rows_bulk(const epc_dispatch_params *p, const epc_tables *tables,
                                          epc_mover *mover)
{
    int next = __shfl_sync(EPC_ALL, mover->item, 0), slot = 0;
    uint32_t parity = 0;
    epc_item of = epc_item_of(p, next);
    epc_fan fan = epc_fan_of(p, tables, of.token, 0);
    while (next < epc_num_items(p)) {
        int now = slot;
        const uint8_t *from = mover->slots + now * p->slot_bytes;
        epc_parcel parcel;
        epc_mbar_wait(&mover->full[now], parity);
        if (QUANTISE) {
            epc_bulk_wait_read(); /* the last codes have gone */
            __syncwarp();
            parcel = epc_coded_parcel(p, from, mover->slots + p->slots * p->slot_bytes, of.piece);
            epc_bulk_fence_shared(); /* the codes, before the engine reads them */
            __syncwarp();
            epc_bring_next(p, mover, now);
        } else
            parcel = epc_plain_parcel(p, from, of.piece);
        epc_send_item(p, tables, &fan, of.token, &parcel);
        if (++slot == p->slots) {
            slot = 0;
            parity ^= 1;
        }
        next = __shfl_sync(EPC_ALL, mover->item, slot);
        of = epc_item_of(p, next);
        fan = epc_fan_of(p, tables, of.token, 0);
        if (!QUANTISE) {
            epc_bulk_wait_read();
            __syncwarp();
            epc_bring_next(p, mover, now);
        }
    }
    epc_bulk_wait();
    epc_bulk_fence(); /* what the engine wrote, before the word that says so */
}
#endif

#endif
