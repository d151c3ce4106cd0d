/* SPDX-License-Identifier: MIT */
/* This rank's device memory: segments, the first of which begins with the control words, and the
   blocks they are cut into. */
#include "ep/cuda/internal.h"

#include <stdlib.h>
#include <string.h>

#define DEFAULT_BYTES ((size_t)64 << 20)

/* The largest multiple for what is beyond it: no device has so much. */
static size_t round_up(size_t bytes, size_t unit)
{
    if (bytes > SIZE_MAX - unit)
        return SIZE_MAX / unit * unit;
    return (bytes + unit - 1) / unit * unit;
}

/* ---------------------------------------------------------------- blocks */

static epc_block *new_block(uint8_t *memory, size_t bytes, int segment)
{
    epc_block *block = calloc(1, sizeof *block);
    if (block) {
        block->memory = memory;
        block->bytes = bytes;
        block->segment = segment;
    }
    return block;
}

static void merge_with_next(epc_block *block)
{
    epc_block *next = block->next;
    if (!next || next->used || block->used)
        return;
    block->bytes += next->bytes;
    block->next = next->next;
    if (next->next)
        next->next->before = block;
    free(next);
}

epc_block *epc_cut(epc_block *block, size_t bytes)
{
    bytes = round_up(bytes ? bytes : 1, EPC_ALIGN);
    if (bytes >= block->bytes)
        return NULL;
    epc_block *rest = new_block(block->memory + bytes, block->bytes - bytes, block->segment);
    if (!rest)
        return NULL;
    block->bytes = bytes;
    rest->next = block->next;
    rest->before = block;
    if (rest->next)
        rest->next->before = rest;
    block->next = rest;
    return rest;
}

void epc_use(epc_buffer *b, epc_block *block)
{
    block->used = true;
    b->used += block->bytes;
    if (b->used > b->peak)
        b->peak = b->used;
}

/* The smallest free piece that holds `bytes`, in segments [first, end). */
static epc_block *best_fit(epc_buffer *b, size_t bytes, int first, int end)
{
    epc_block *best = NULL;
    for (int s = first; s < end; s++)
        for (epc_block *block = b->segments[s].blocks; block; block = block->next)
            if (!block->used && block->bytes >= bytes && (!best || block->bytes < best->bytes))
                best = block;
    return best;
}

epc_block *epc_take_shared(epc_buffer *b, size_t bytes)
{
    pthread_mutex_lock(&b->buffer->pool_lock);
    epc_block *block = best_fit(b, bytes, 0, b->num_shared);
    if (block) {
        epc_cut(block, bytes);
        epc_use(b, block);
    }
    pthread_mutex_unlock(&b->buffer->pool_lock);
    return block;
}

void epc_free_pieces(const epc_buffer *b, int64_t *pieces, int n)
{
    memset(pieces, 0, (size_t)n * sizeof *pieces);
    pthread_mutex_lock(&b->buffer->pool_lock);
    for (int s = 0; s < b->num_shared; s++)
        for (const epc_block *block = b->segments[s].blocks; block; block = block->next) {
            int64_t bytes = block->used ? 0 : (int64_t)block->bytes;
            for (int i = 0; i < n; i++) /* in its place, the smaller ones one further */
                if (bytes > pieces[i]) {
                    int64_t smaller = pieces[i];
                    pieces[i] = bytes;
                    bytes = smaller;
                }
        }
    pthread_mutex_unlock(&b->buffer->pool_lock);
}

size_t epc_largest_piece(const epc_buffer *b)
{
    int64_t bytes;
    epc_free_pieces(b, &bytes, 1);
    return (size_t)bytes;
}

epc_block *epc_take_largest(epc_buffer *b)
{
    pthread_mutex_lock(&b->buffer->pool_lock);
    epc_block *best = NULL;
    for (int s = 0; s < b->num_shared; s++)
        for (epc_block *block = b->segments[s].blocks; block; block = block->next)
            if (!block->used && (!best || block->bytes > best->bytes))
                best = block;
    if (best)
        epc_use(b, best);
    pthread_mutex_unlock(&b->buffer->pool_lock);
    return best;
}

void epc_trim(epc_buffer *b, epc_block *block, size_t bytes)
{
    pthread_mutex_lock(&b->buffer->pool_lock);
    b->used -= block->bytes;
    epc_block *rest = epc_cut(block, bytes);
    b->used += block->bytes;
    if (rest)
        merge_with_next(rest);
    pthread_mutex_unlock(&b->buffer->pool_lock);
}

epc_block *epc_split(epc_buffer *b, epc_block *block, size_t bytes)
{
    pthread_mutex_lock(&b->buffer->pool_lock);
    epc_block *rest = epc_cut(block, bytes);
    if (rest)
        rest->used = true;
    pthread_mutex_unlock(&b->buffer->pool_lock);
    return rest;
}

void epc_free(epc_buffer *b, epc_block *block)
{
    block->used = block->given = false;
    b->used -= block->bytes;
    merge_with_next(block);
    if (block->before)
        merge_with_next(block->before);
}

void epc_give(epc_buffer *b, epc_block *block)
{
    if (!block)
        return;
    pthread_mutex_lock(&b->buffer->pool_lock);
    if (block->writers)
        block->given = true; /* free once nobody writes there any more */
    else
        epc_free(b, block);
    pthread_mutex_unlock(&b->buffer->pool_lock);
}

epc_block *epc_find(epc_buffer *b, const void *memory)
{
    epc_block *found = NULL;
    pthread_mutex_lock(&b->buffer->pool_lock);
    for (int s = 0; s < 2 * EPC_MAX_SEGMENTS && !found; s++)
        for (epc_block *block = b->segments[s].blocks; block; block = block->next)
            if (block->used && !block->given && block->memory == memory)
                found = block;
    pthread_mutex_unlock(&b->buffer->pool_lock);
    return found;
}

/* ---------------------------------------------------------------- segments */

/* Allocates segment `index`. */
static ep_status add_segment(epc_buffer *b, size_t bytes, int index)
{
    epc_segment *segment = &b->segments[index];
    void *memory;
    bytes = round_up(bytes, EPC_GRANULE);
    EPI_TRY(epi_gpu_alloc(bytes, &memory));
    epc_block *block = new_block(memory, bytes, index);
    if (!block) {
        epi_gpu_free(memory);
        return epi_fail(EP_ERR_MEMORY, "out of memory");
    }
    *segment = (epc_segment){.memory = memory, .bytes = bytes, .blocks = block};
    return EP_OK;
}

/* With room for `bytes`, or more; the window may come to have `most`. */
static ep_status add_own_segment(epc_buffer *b, size_t bytes, size_t most)
{
    size_t total = epc_window_bytes(b), left = total < most ? most - total : 0;
    if (bytes > left)
        return epi_fail(EP_ERR_MEMORY,
                        "the window needs %zu bytes; its bound (window_max_bytes) is %zu",
                        bytes < SIZE_MAX - total ? total + bytes : SIZE_MAX, most);
    if (b->num_own == EPC_MAX_SEGMENTS)
        return epi_fail(
            EP_ERR_MEMORY,
            "the buffer has grown %d times already; create it with a larger window_bytes",
            EPC_MAX_SEGMENTS);
    if (bytes < DEFAULT_BYTES)
        bytes = DEFAULT_BYTES < left ? DEFAULT_BYTES : left;
    EPI_TRY(add_segment(b, bytes, EPC_MAX_SEGMENTS + b->num_own));
    b->num_own++;
    return EP_OK;
}

size_t epc_window_bytes(const epc_buffer *b)
{
    size_t total = 0;
    for (int s = 0; s < 2 * EPC_MAX_SEGMENTS; s++)
        total += b->segments[s].bytes;
    return total;
}

/* Of a shared segment: what peers have of it is reached no more. */
static void unmap_peers(epc_buffer *b, int index)
{
    uint8_t **place = &b->places[index * EPC_MAX_RANKS];
    for (int r = 0; r < b->num_ranks; r++) {
        if (r != b->rank && place[r])
            epi_peer_close(&b->segments[index].peer[r], place[r]);
        place[r] = NULL;
    }
}

static void drop_segment(epc_buffer *b, int index)
{
    epc_segment *segment = &b->segments[index];
    if (index < EPC_MAX_SEGMENTS)
        unmap_peers(b, index);
    for (epc_block *block = segment->blocks, *next; block; block = next) {
        next = block->next;
        free(block);
    }
    epi_gpu_free(segment->memory);
    *segment = (epc_segment){0};
}

static ep_status take(epc_buffer *b, size_t bytes, size_t most, epc_block **out)
{
    bytes = round_up(bytes ? bytes : 1, EPC_ALIGN);
    pthread_mutex_lock(&b->buffer->pool_lock);
    epc_block *piece = best_fit(b, bytes, EPC_MAX_SEGMENTS, 2 * EPC_MAX_SEGMENTS);
    ep_status status = EP_OK;
    if (!piece)
        piece = best_fit(b, bytes, 0, b->num_shared);
    if (!piece) {
        status = add_own_segment(b, bytes, most);
        if (status == EP_OK)
            piece = best_fit(b, bytes, EPC_MAX_SEGMENTS, 2 * EPC_MAX_SEGMENTS);
    }
    if (piece && piece->bytes > bytes) { /* NULL: no memory for the block, so all of it is taken */
        epc_block *end = epc_cut(piece, piece->bytes - bytes);
        piece = end ? end : piece;
    }
    if (piece)
        epc_use(b, piece);
    pthread_mutex_unlock(&b->buffer->pool_lock);
    *out = piece;
    return status;
}

ep_status epc_take(epc_buffer *b, size_t bytes, epc_block **block)
{
    return take(b, bytes, SIZE_MAX, block);
}

ep_status epc_take_within(epc_buffer *b, size_t bytes, epc_block **block)
{
    return take(b, bytes, b->buffer->config.window_max_bytes, block);
}

ep_status epc_put_places(epc_buffer *b)
{
    return epi_gpu_put(b->places_device, b->places, sizeof b->places);
}

/* What ranks tell each other about a segment. */
typedef struct offer {
    int64_t status, bytes;
    epi_peer_handle handle;
    char text[160];
} offer;

static ep_status map_peers(epc_buffer *b, int index, const offer *all)
{
    epc_segment *segment = &b->segments[index];
    for (int r = 0; r < b->num_ranks; r++) {
        uint8_t **place = &b->places[index * EPC_MAX_RANKS + r];
        segment->peer[r] = all[r].handle;
        if (b->buffer->group->masked[r] || !all[r].bytes)
            continue;
        if (r == b->rank)
            *place = segment->memory;
        else
            EPI_TRY(epi_peer_open(&all[r].handle, (void **)place));
    }
    return EP_OK;
}

/* Collective: what every rank says of the segment; fails on all where one says that it failed. */
static ep_status exchange(epc_buffer *b, const char *call, offer *own, offer *all)
{
    if (own->status != EP_OK)
        strncpy(own->text, ep_last_error(), sizeof own->text - 1);
    EPI_TRY(epc_core.allgather(b->buffer->group, own, all, sizeof *own));
    for (int r = 0; r < b->num_ranks; r++)
        if (!b->buffer->group->masked[r] && all[r].status != EP_OK)
            return epi_fail((ep_status)all[r].status, "%s: rank %d: %s", call, r, all[r].text);
    return EP_OK;
}

/* Maps what ranks have offered, on all ranks or on none. Memory that peers have mapped is not
   freed: where one could not, all have unmapped it before anybody goes on. */
static ep_status map_all(epc_buffer *b, const char *call, int index, offer *own, offer *all)
{
    char reason[EPI_ERROR_MAX];
    own->status = map_peers(b, index, all);
    ep_status status = exchange(b, call, own, all);
    if (status == EP_OK)
        return EP_OK;
    strncpy(reason, ep_last_error(), sizeof reason - 1);
    reason[sizeof reason - 1] = 0;
    unmap_peers(b, index);
    exchange(b, call, own, all); /* fails again, after all have come here */
    return epi_fail(status, "%s", reason);
}

/* Collective: shares segment `index`, which may not exist here (bytes 0), on all ranks or on none.
 *any: some rank has one. Past the last index there is none. */
static ep_status share(epc_buffer *b, const char *call, int index, ep_status mine, bool *any)
{
    size_t bytes = mine == EP_OK && index < EPC_MAX_SEGMENTS ? b->segments[index].bytes : 0;
    offer own = {.status = mine, .bytes = (int64_t)bytes},
          *all = calloc((size_t)b->num_ranks, sizeof *all);
    if (!all)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    if (bytes)
        own.status = epi_peer_export(b->segments[index].memory, &own.handle);
    ep_status status = exchange(b, call, &own, all);
    *any = false;
    for (int r = 0; status == EP_OK && r < b->num_ranks; r++)
        *any |= !b->buffer->group->masked[r] && all[r].bytes;
    if (*any)
        status = map_all(b, call, index, &own, all);
    free(all);
    return status;
}

/* What this rank has to give for a growth by `bytes`; none for 0. */
static ep_status add_room(epc_buffer *b, size_t bytes, int index)
{
    size_t total = epc_window_bytes(b), most = b->buffer->config.window_max_bytes;
    if (bytes == 0)
        return EP_OK;
    if (index == EPC_MAX_SEGMENTS)
        return epi_fail(
            EP_ERR_CAPACITY,
            "the window has grown %d times already; create the buffer with a larger window_bytes",
            EPC_MAX_SEGMENTS - 1);
    if (total > most || bytes > most - total)
        return epi_fail(EP_ERR_CAPACITY,
                        "%zu bytes are needed beside the %zu there are; window_max_bytes is %zu",
                        bytes, total, most);
    size_t room = bytes > total ? bytes : total; /* doubles, so that growth ends soon */
    return add_segment(b, room <= most - total ? room : bytes, index);
}

ep_status epc_grow(epc_buffer *b, const char *call, size_t bytes)
{
    int index = b->num_shared;
    bool any;
    ep_status status = share(b, call, index, add_room(b, bytes, index), &any);
    if (status != EP_OK) { /* what no peer reaches is not room */
        if (index < EPC_MAX_SEGMENTS)
            drop_segment(b, index);
        return status;
    }
    if (!any)
        return EP_OK;
    b->num_shared++;
    return epc_put_places(b);
}

bool epc_locate(epc_buffer *b, const void *memory, size_t bytes, int *place, int64_t *offset)
{
    uintptr_t at = (uintptr_t)memory;
    for (int s = 0; s < b->num_shared; s++) {
        uintptr_t start = (uintptr_t)b->segments[s].memory;
        if (at < start || at + bytes > start + b->segments[s].bytes)
            continue;
        *place = s;
        *offset = (int64_t)(at - start);
        return true;
    }
    return false;
}

/* ---------------------------------------------------------------- the window */

static uint8_t *carve(uint8_t **next, size_t bytes)
{
    uint8_t *at = *next;
    *next += round_up(bytes, EPC_ALIGN);
    return at;
}

/* Control words, state and the places lie together: few pages to look up when a call begins. */
static void lay_out_control(epc_buffer *b)
{
    epc_segment *segment = &b->segments[0];
    uint8_t *next = segment->memory;
    carve(&next, epc_control_bytes(b->num_ranks, b->max_experts));
    b->comm.state = (epc_state *)carve(&next, sizeof(epc_state));
    b->places_device = (uint8_t **)carve(&next, sizeof b->places);
    b->control_bytes = (size_t)(next - segment->memory);
    epc_cut(segment->blocks, b->control_bytes);
    segment->blocks->used = true;
}

static size_t control_bytes(const epc_buffer *b)
{
    return epc_control_bytes(b->num_ranks, b->max_experts) + sizeof(epc_state) + sizeof b->places +
           3 * EPC_ALIGN;
}

ep_status epc_window_check(const epc_buffer *b)
{
    return epi_buffer_check_window(&b->buffer->config, control_bytes(b));
}

ep_status epc_window_create(epc_buffer *b)
{
    const char *call = "ep_buffer_create";
    size_t control = control_bytes(b), wanted = b->buffer->config.window_bytes,
           most = b->buffer->config.window_max_bytes - control;
    if (wanted == 0)
        wanted = DEFAULT_BYTES < most ? DEFAULT_BYTES : most;
    ep_status mine = add_segment(b, control + wanted, 0);
    if (mine == EP_OK) {
        lay_out_control(b);
        mine = epi_gpu_zero(b->segments[0].memory, b->control_bytes);
    }
    bool any;
    EPI_TRY(share(b, call, 0, mine, &any));
    b->num_shared = 1;
    b->comm.rank = b->rank;
    b->comm.num_ranks = b->num_ranks;
    b->comm.max_experts = b->max_experts;
    b->comm.places = b->places_device;
    memcpy(b->comm.window, b->places, sizeof b->comm.window);
    return epc_put_places(b);
}

void epc_window_destroy(epc_buffer *b)
{
    for (int s = 0; s < 2 * EPC_MAX_SEGMENTS; s++)
        if (b->segments[s].memory || s < b->num_shared)
            drop_segment(b, s);
}
