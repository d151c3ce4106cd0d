/* SPDX-License-Identifier: MIT */
/*
 * Allocations of the caller's that peers read in place. A rank offers one in
 * memory that all processes see; peers map it when they next come by; once all
 * have, combine names it instead of copying. Nobody waits for anybody.
 */
#include "ep/cuda/internal.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

enum { UNSEEN, MAPPED, REFUSED };

/* What a rank shows the others, behind the control words of its part of the shared memory. */
typedef struct board {
    _Atomic uint32_t count; /* release: the handles before are complete */
    epi_peer_handle handle[EPC_MAX_EXPORTS];
    _Atomic uint8_t seen[EPC_MAX_RANKS][EPC_MAX_EXPORTS]; /* by this rank, of each rank's */
} board;

typedef struct epc_exports {
    epi_window *window;
    size_t offset;
    bool off; /* EP_CUDA_EXPORT=0: always copy */
    bool refused[EPC_MAX_EXPORTS];
    epi_peer_handle open[EPC_MAX_RANKS][EPC_MAX_EXPORTS];
    uint64_t not_exportable[16]; /* identities of allocations that can't be shared; a ring */
    int next;
} epc_exports;

static board *board_of(const epc_buffer *b, int rank)
{
    return (board *)(b->exports->window->peer[rank] + b->exports->offset);
}

ep_status epc_exports_create(epc_buffer *b)
{
    const char *off = getenv("EP_CUDA_EXPORT");
    size_t offset = (epi_control_bytes(b->num_ranks) + 63) / 64 * 64;
    b->exports = calloc(1, sizeof *b->exports);
    if (!b->exports)
        return epi_fail(EP_ERR_MEMORY, "ep_buffer_create: out of memory");
    b->exports->offset = offset;
    b->exports->off = off && strcmp(off, "0") == 0;
    return epc_core.shared_create(b->buffer->group, offset + sizeof(board), &b->exports->window);
}

void epc_exports_destroy(epc_buffer *b)
{
    epc_exports *exports = b->exports;
    if (!exports)
        return;
    for (int r = 0; r < b->num_ranks; r++)
        for (int i = 0; i < EPC_MAX_EXPORTS; i++) {
            uint8_t *memory = b->places[(EPC_MAX_SEGMENTS + i) * EPC_MAX_RANKS + r];
            if (memory && r != b->rank)
                epi_peer_close(&exports->open[r][i], memory);
        }
    if (exports->window)
        epc_core.shared_destroy(exports->window);
    free(exports);
    b->exports = NULL;
}

static void map_one(epc_buffer *b, int rank, int index)
{
    epc_exports *exports = b->exports;
    const epi_peer_handle *handle = &board_of(b, rank)->handle[index];
    uint8_t **place = &b->places[(EPC_MAX_SEGMENTS + index) * EPC_MAX_RANKS + rank];
    exports->open[rank][index] = *handle;
    bool mapped = epi_peer_open(handle, (void **)place) == EP_OK;
    /* The device's copy first: the owner's next call may name the place. */
    mapped = mapped && epc_put_places(b) == EP_OK;
    atomic_store_explicit(&board_of(b, b->rank)->seen[rank][index], mapped ? MAPPED : REFUSED,
                          memory_order_release);
}

void epc_exports_visit(epc_buffer *b)
{
    const board *mine = board_of(b, b->rank);
    for (int r = 0; r < b->num_ranks; r++) {
        if (r == b->rank || b->buffer->group->masked[r])
            continue;
        uint32_t count = atomic_load_explicit(&board_of(b, r)->count, memory_order_acquire);
        for (uint32_t i = 0; i < count && i < EPC_MAX_EXPORTS; i++)
            if (atomic_load_explicit(&mine->seen[r][i], memory_order_relaxed) == UNSEEN)
                map_one(b, r, (int)i);
    }
}

/* Whether every peer has mapped this rank's export `index`. */
static bool all_mapped(epc_buffer *b, uint32_t index)
{
    bool mapped = !b->exports->refused[index];
    for (int r = 0; r < b->num_ranks && mapped; r++) {
        if (r == b->rank || b->buffer->group->masked[r])
            continue;
        uint8_t seen =
            atomic_load_explicit(&board_of(b, r)->seen[b->rank][index], memory_order_acquire);
        b->exports->refused[index] |= seen == REFUSED;
        mapped = seen == MAPPED;
    }
    return mapped;
}

static bool known_not_exportable(epc_exports *exports, uint64_t identity)
{
    for (size_t i = 0; i < sizeof exports->not_exportable / sizeof *exports->not_exportable; i++)
        if (exports->not_exportable[i] == identity)
            return true;
    return false;
}

static void offer(epc_buffer *b, const void *memory, const epi_peer_handle *found)
{
    epc_exports *exports = b->exports;
    board *mine = board_of(b, b->rank);
    uint32_t index = atomic_load_explicit(&mine->count, memory_order_relaxed);
    if (index == EPC_MAX_EXPORTS)
        return;
    epi_peer_handle handle;
    if (epi_peer_export(memory, &handle) != EP_OK) {
        exports->not_exportable[exports->next++ % 16] = found->identity;
        return;
    }
    mine->handle[index] = handle;
    b->places[(EPC_MAX_SEGMENTS + index) * EPC_MAX_RANKS + (uint32_t)b->rank] =
        (uint8_t *)(uintptr_t)handle.base;
    if (epc_put_places(b) == EP_OK)
        atomic_store_explicit(&mine->count, index + 1, memory_order_release);
}

bool epc_export(epc_buffer *b, const void *memory, size_t bytes, int *place, int64_t *offset)
{
    epi_peer_handle found;
    const board *mine = board_of(b, b->rank);
    if (b->exports->off || epi_peer_identify(memory, &found) != EP_OK || !found.identity ||
        known_not_exportable(b->exports, found.identity))
        return false;
    uint64_t at = (uint64_t)(uintptr_t)memory;
    if (at + bytes > found.base + found.size)
        return false;
    uint32_t count = atomic_load_explicit(&mine->count, memory_order_relaxed), i = 0;
    while (i < count &&
           (mine->handle[i].base != found.base || mine->handle[i].identity != found.identity))
        i++;
    if (i == count) {
        offer(b, memory, &found);
        if (b->num_ranks > 1)
            return false; /* peers have yet to come by */
        count = atomic_load_explicit(&mine->count, memory_order_relaxed);
    }
    if (i >= count || !all_mapped(b, i))
        return false;
    *place = EPC_MAX_SEGMENTS + (int)i;
    *offset = (int64_t)(at - found.base);
    return true;
}
