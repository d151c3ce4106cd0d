/* SPDX-License-Identifier: MIT */
/*
 * Allocations of the caller's that peers read in place. A rank offers one in
 * memory that all processes see; peers map it when they next come by; once all
 * have, combine names it instead of copying. Nobody waits for anybody.
 */
#include "ep/cuda/internal.h"

#include <stdatomic.h>
#include <stdlib.h>

#define IDLE_CALLS 256 /* an export that this many calls did not use may make way for another */

/* What a rank shows the others, behind the control words of its part of the shared memory. An entry
   can be replaced: its version is odd meanwhile, and another even number after. */
typedef struct board {
    _Atomic uint32_t count; /* of entries that were ever used */
    _Atomic uint32_t version[EPC_MAX_EXPORTS];
    epi_peer_handle handle[EPC_MAX_EXPORTS];
    /* By this rank, of each rank's: the version it has mapped, one more where it could not; 0: none
     */
    _Atomic uint32_t seen[EPC_MAX_RANKS][EPC_MAX_EXPORTS];
} board;

typedef struct epc_exports {
    epi_window *window;
    size_t offset;
    bool captured[EPC_MAX_EXPORTS]; /* by a graph, which may use it at any time */
    bool refused[EPC_MAX_EXPORTS];
    uint32_t used[EPC_MAX_EXPORTS]; /* serial of the last call that used it */
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
    size_t offset = (epi_control_bytes(b->num_ranks) + 63) / 64 * 64;
    b->exports = calloc(1, sizeof *b->exports);
    if (!b->exports)
        return epi_fail(EP_ERR_MEMORY, "ep_buffer_create: out of memory");
    b->exports->offset = offset;
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

static uint8_t **place_of(epc_buffer *b, int rank, uint32_t index)
{
    return &b->places[(EPC_MAX_SEGMENTS + index) * EPC_MAX_RANKS + (uint32_t)rank];
}

/* Maps version `version` of a peer's entry in place of what was there before. */
static void map_one(epc_buffer *b, int rank, uint32_t index, uint32_t version)
{
    epc_exports *exports = b->exports;
    board *theirs = board_of(b, rank);
    epi_peer_handle handle = theirs->handle[index];
    uint8_t **place = place_of(b, rank, index);
    atomic_thread_fence(memory_order_acquire);
    if (atomic_load_explicit(&theirs->version[index], memory_order_relaxed) != version)
        return; /* replaced meanwhile: the next visit */
    if (*place)
        epi_peer_close(&exports->open[rank][index], *place);
    *place = NULL;
    exports->open[rank][index] = handle;
    bool mapped = epi_peer_open(&handle, (void **)place) == EP_OK;
    if (!mapped)
        *place = NULL;
    /* The device's copy first: the owner's next call may name the place. */
    mapped = epc_put_places(b) == EP_OK && mapped;
    atomic_store_explicit(&board_of(b, b->rank)->seen[rank][index], mapped ? version : version + 1,
                          memory_order_release);
}

void epc_exports_visit(epc_buffer *b)
{
    const board *mine = board_of(b, b->rank);
    for (int r = 0; r < b->num_ranks; r++) {
        if (r == b->rank || b->buffer->group->masked[r])
            continue;
        board *theirs = board_of(b, r);
        uint32_t count = atomic_load_explicit(&theirs->count, memory_order_acquire);
        for (uint32_t i = 0; i < count && i < EPC_MAX_EXPORTS; i++) {
            uint32_t version = atomic_load_explicit(&theirs->version[i], memory_order_acquire);
            uint32_t seen = atomic_load_explicit(&mine->seen[r][i], memory_order_relaxed);
            if (version % 2 == 0 && (seen & ~1u) != version)
                map_one(b, r, i, version);
        }
    }
}

/* Whether every peer has mapped this rank's export `index`. */
static bool all_mapped(epc_buffer *b, uint32_t index)
{
    uint32_t version =
        atomic_load_explicit(&board_of(b, b->rank)->version[index], memory_order_relaxed);
    bool mapped = !b->exports->refused[index];
    for (int r = 0; r < b->num_ranks && mapped; r++) {
        if (r == b->rank || b->buffer->group->masked[r])
            continue;
        uint32_t seen =
            atomic_load_explicit(&board_of(b, r)->seen[b->rank][index], memory_order_acquire);
        b->exports->refused[index] |= seen == version + 1;
        mapped = seen == version;
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

/* Whether kernels may be reading the entry, or can in time to come. */
static bool in_use(const epc_buffer *b, uint32_t index)
{
    const epc_exports *exports = b->exports;
    bool used = exports->captured[index] || exports->used[index] == b->serial;
    for (const epc_flight *flight = b->flights; flight && !used; flight = flight->next)
        used = flight->serial == exports->used[index];
    return used;
}

/* The entry for a new allocation: of memory that is gone, since this one lies there, or none's yet,
   or the one not used for longest. EPC_MAX_EXPORTS: all are in use. */
static uint32_t choose_entry(const epc_buffer *b, const epi_peer_handle *found)
{
    const board *mine = board_of(b, b->rank);
    const epc_exports *exports = b->exports;
    uint32_t count = atomic_load_explicit(&mine->count, memory_order_relaxed);
    uint32_t longest = IDLE_CALLS, best = EPC_MAX_EXPORTS;
    for (uint32_t i = 0; i < count; i++) {
        const epi_peer_handle *handle = &mine->handle[i];
        if (in_use(b, i))
            continue;
        if (found->base < handle->base + handle->size && handle->base < found->base + found->size)
            return i;
        uint32_t idle = b->serial - exports->used[i];
        if (idle > longest) {
            longest = idle;
            best = i;
        }
    }
    return count < EPC_MAX_EXPORTS ? count : best;
}

/* Returns its entry, or EPC_MAX_EXPORTS when there is none or it can't be shared. */
static uint32_t offer(epc_buffer *b, const void *memory, const epi_peer_handle *found)
{
    epc_exports *exports = b->exports;
    board *mine = board_of(b, b->rank);
    uint32_t i = choose_entry(b, found);
    epi_peer_handle handle;
    if (i == EPC_MAX_EXPORTS)
        return i;
    if (epi_peer_export(memory, &handle) != EP_OK) {
        exports->not_exportable[exports->next++ % 16] = found->identity;
        return EPC_MAX_EXPORTS;
    }
    uint32_t version = atomic_load_explicit(&mine->version[i], memory_order_relaxed);
    atomic_store_explicit(&mine->version[i], version + 1, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    mine->handle[i] = handle;
    exports->refused[i] = false;
    exports->used[i] = b->serial;
    *place_of(b, b->rank, i) = (uint8_t *)(uintptr_t)handle.base;
    if (epc_put_places(b) != EP_OK)
        exports->refused[i] = true;
    atomic_store_explicit(&mine->version[i], version + 2, memory_order_release);
    if (i == atomic_load_explicit(&mine->count, memory_order_relaxed))
        atomic_store_explicit(&mine->count, i + 1, memory_order_release);
    return i;
}

bool epc_export(const epc_flight *flight, const void *memory, size_t bytes, int *place,
                int64_t *offset)
{
    epc_buffer *b = flight->owner;
    epi_peer_handle found;
    const board *mine = board_of(b, b->rank);
    if (!b->exporting || epi_peer_identify(memory, &found) != EP_OK || !found.identity ||
        known_not_exportable(b->exports, found.identity))
        return false;
    uint64_t at = (uint64_t)(uintptr_t)memory;
    if (at + bytes > found.base + found.size)
        return false;
    uint32_t count = atomic_load_explicit(&mine->count, memory_order_relaxed), i = 0;
    while (i < count &&
           (mine->handle[i].base != found.base || mine->handle[i].identity != found.identity))
        i++;
    if (i == count)
        i = offer(b, memory, &found);
    if (i == EPC_MAX_EXPORTS)
        return false;
    b->exports->used[i] = b->serial;
    if (!all_mapped(b, i)) /* peers that have yet to come by */
        return false;
    b->exports->captured[i] |= flight->serial == 0;
    *place = EPC_MAX_SEGMENTS + (int)i;
    *offset = (int64_t)(at - found.base);
    return true;
}
