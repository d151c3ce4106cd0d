/* SPDX-License-Identifier: MIT */
/* Low latency on the device, host side: the memory that a shape of calls has, and its results. */
#ifndef EPI_EP_CUDA_LL_H
#define EPI_EP_CUDA_LL_H

#include "ep/cuda/internal.h"
#include "ep/ll.h"

/* What ranks must agree on; compared as bytes. */
typedef struct epc_ll_shape {
    int64_t max_tokens, hidden, num_experts, expert_rows, table_sum;
    int32_t topk, wire, scale, overflow;
    uint32_t masked, unused;
} epc_ll_shape;

typedef struct epc_ll_slot {
    struct epc_ll_handle *result; /* that has the slot's memory; NULL: it is free */
    bool used, combined;          /* by a dispatch, by a combine */
    bool summed;                  /* `result` has been combined */
    epc_block *own;               /* x, scales and the small arrays of results */
    uint8_t *x;
    uint32_t *scales;
    int32_t *count, *dropped, *source_token;
    int64_t *range;
} epc_ll_slot;

typedef struct epc_ll {
    epc_ll_shape shape;
    epc_table *table;
    int num_local, max_local, words, scale_count;
    int64_t row_bytes;
    epc_ll_area area;
    epc_block *areas; /* of both slots, one behind the other */
    uint64_t writers; /* ranks that may know of them */
    uint32_t place[EPC_MAX_RANKS];
    int64_t offset[EPC_MAX_RANKS]; /* of slot 0's; slot 1 follows */
    epc_ll_slot slot[2];
    uint64_t calls;
    bool captured; /* by a graph, which may use it at any time */
    struct epc_ll *next;
} epc_ll;

/* A result: what combine needs of it. */
struct epc_ll_handle {
    epi_ll_result *core; /* what the core checks arguments with */
    epi_ll core_shape;
    epc_ll *ll;
    epc_block *block;
    int32_t *ids, *position;
};

static inline int64_t epc_ll_align(int64_t bytes)
{
    return (bytes + EPC_ALIGN - 1) / EPC_ALIGN * EPC_ALIGN;
}

/* Of an output's head in LogFMT-10: a bit for each chunk. */
static inline int64_t epc_ll_head_bytes(int64_t hidden)
{
    int64_t chunk = hidden % 1024 ? 512 : 1024, chunks = (hidden + chunk - 1) / chunk;
    return (chunks + 31) / 32 * 4;
}

/* Whether some expert can get more rows than it has room for, and that is an error. */
static inline bool epc_ll_overflow_fails(const epc_buffer *b, const epc_ll_shape *shape)
{
    return shape->overflow == EP_OVERFLOW_ERROR &&
           shape->expert_rows < shape->max_tokens * b->num_ranks;
}

/* ll_memory.c */
/* Uses the memory there is for the shape, or makes some; then every rank does, as all see the same
   change. *told: where that failed, all know. */
ep_status epc_ll_prepare_memory(epc_buffer *b, const epc_ll_shape *shape, epc_table *table,
                                bool capturing, bool *told);
/* This rank's part of setting memory up, when it refuses the call with the last error. */
void epc_ll_refuse_memory(epc_buffer *b, ep_status status);
/* Gives a result's slot to other results, once. */
void epc_ll_retire(struct epc_ll_handle *own);

/* ll_launch.c */
/* A kernel, its blocks and their shared memory. */
typedef struct epc_ll_kernel {
    int kernel, blocks;
    size_t shared;
} epc_ll_kernel;

/* What a call of the shape in memory tells its kernels. */
void epc_ll_describe(epc_buffer *b, const epc_ll *ll, int slot, epc_flight *flight,
                     epc_ll_params *p);
ep_status epc_ll_start(int which, const epc_ll_params *p, int blocks, size_t shared, void *stream);
/* The whole call at once, or its first half now and its second when a hook asks for it. */
ep_status epc_ll_launch_call(epc_flight *flight, const epc_ll_params *p, epc_ll_kernel whole,
                             epc_ll_kernel first, epc_ll_kernel second, bool hook);
/* Where a dispatch keeps what it counts with: in shared memory, or where that has no room for it,
   on the device. */
typedef struct epc_ll_room {
    size_t send, receive; /* shared memory of the halves */
} epc_ll_room;

ep_status epc_ll_place_tables(epc_buffer *b, epc_ll_params *p, int blocks, epc_ll_room *room);

#endif
