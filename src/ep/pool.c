/* SPDX-License-Identifier: MIT */
#include "ep/pool.h"

#include "base/error.h"

#include <stdlib.h>

/* The largest multiple for what is beyond it: no window has so much. */
static size_t round_up(size_t bytes)
{
    if (bytes > SIZE_MAX - EPI_POOL_ALIGN)
        return SIZE_MAX / EPI_POOL_ALIGN * EPI_POOL_ALIGN;
    return (bytes + EPI_POOL_ALIGN - 1) / EPI_POOL_ALIGN * EPI_POOL_ALIGN;
}

void epi_pool_init(epi_pool *pool, epi_window *window, size_t start, size_t limit,
                   bool address_only)
{
    *pool = (epi_pool){
        .window = window, .start = round_up(start), .limit = limit, .address_only = address_only};
}

void epi_pool_destroy(epi_pool *pool)
{
    while (pool->first) {
        epi_block *block = pool->first;
        pool->first = block->next;
        free(block);
    }
}

static void count_used(epi_pool *pool, size_t bytes)
{
    pool->used += bytes;
    if (pool->used > pool->peak)
        pool->peak = pool->used;
}

void epi_pool_count(epi_pool *pool, size_t more, size_t less)
{
    pool->used -= less;
    count_used(pool, more);
}

/* Splits `block` so that it keeps `bytes`; the rest becomes a free block after it. */
static ep_status split(epi_block *block, size_t bytes)
{
    if (block->bytes == bytes)
        return EP_OK;
    epi_block *rest = malloc(sizeof *rest);
    if (!rest)
        return epi_fail(EP_ERR_MEMORY, "out of memory for a window block");
    *rest = (epi_block){
        .offset = block->offset + bytes, .bytes = block->bytes - bytes, .next = block->next};
    block->bytes = bytes;
    block->next = rest;
    return EP_OK;
}

static void merge_free(epi_pool *pool)
{
    epi_block **link = &pool->first;
    while (*link) {
        epi_block *block = *link, *next = block->next;
        if (!block->used && next && !next->used) {
            block->bytes += next->bytes;
            block->next = next->next;
            free(next);
        } else {
            link = &block->next;
        }
    }
}

static epi_block *last_block(const epi_pool *pool)
{
    epi_block *block = pool->first;
    while (block && block->next)
        block = block->next;
    return block;
}

/* Makes the list end with a free block of at least `bytes` that is backed by memory. */
static ep_status grow(epi_pool *pool, size_t bytes)
{
    epi_block *last = last_block(pool);
    size_t end = last ? last->offset + last->bytes : pool->start;
    size_t begin = last && !last->used ? last->offset : end;
    size_t target = bytes < SIZE_MAX - begin ? begin + bytes : SIZE_MAX;
    if (target > pool->limit)
        return epi_fail(EP_ERR_MEMORY,
                        "the window needs %zu bytes; its bound (window_max_bytes) is %zu", target,
                        pool->limit);
    if (!pool->address_only && target > pool->window->committed)
        EPI_TRY(pool->window->transport->ops->window_commit(pool->window, target));
    if (begin != end) {
        if (target > end)
            last->bytes = target - begin;
        return EP_OK;
    }
    epi_block *block = malloc(sizeof *block);
    if (!block)
        return epi_fail(EP_ERR_MEMORY, "out of memory for a window block");
    *block = (epi_block){.offset = begin, .bytes = bytes};
    if (last)
        last->next = block;
    else
        pool->first = block;
    return EP_OK;
}

static ep_status take_block(epi_pool *pool, epi_block *block, size_t bytes)
{
    EPI_TRY(split(block, bytes));
    block->used = true;
    count_used(pool, bytes);
    return EP_OK;
}

static epi_block *first_fit(const epi_pool *pool, size_t bytes)
{
    epi_block *block = pool->first;
    while (block && (block->used || block->bytes < bytes))
        block = block->next;
    return block;
}

ep_status epi_pool_take(epi_pool *pool, size_t bytes, size_t *offset)
{
    bytes = round_up(bytes ? bytes : 1);
    epi_block *block = first_fit(pool, bytes);
    if (!block) {
        EPI_TRY(grow(pool, bytes));
        block = first_fit(pool, bytes);
    }
    EPI_TRY(take_block(pool, block, bytes));
    *offset = block->offset;
    return EP_OK;
}

/* Brings memory that is backed but past the last block under the list. */
static ep_status cover_committed(epi_pool *pool)
{
    epi_block *last = last_block(pool);
    size_t end = last ? last->offset + last->bytes : pool->start;
    size_t committed = pool->window->committed / EPI_POOL_ALIGN * EPI_POOL_ALIGN;
    if (committed > pool->limit)
        committed = pool->limit / EPI_POOL_ALIGN * EPI_POOL_ALIGN;
    if (committed <= end)
        return EP_OK;
    size_t free_tail = last && !last->used ? last->bytes : 0;
    return grow(pool, free_tail + committed - end);
}

ep_status epi_pool_take_largest(epi_pool *pool, size_t *offset, size_t *bytes)
{
    *offset = *bytes = 0;
    EPI_TRY(cover_committed(pool));
    epi_block *largest = NULL;
    for (epi_block *block = pool->first; block; block = block->next)
        if (!block->used && (!largest || block->bytes > largest->bytes))
            largest = block;
    if (!largest)
        return EP_OK;
    EPI_TRY(take_block(pool, largest, largest->bytes));
    *offset = largest->offset;
    *bytes = largest->bytes;
    return EP_OK;
}

static epi_block *find(const epi_pool *pool, size_t offset)
{
    epi_block *block = pool->first;
    while (block && !(block->used && block->offset == offset))
        block = block->next;
    return block;
}

ep_status epi_pool_trim(epi_pool *pool, size_t offset, size_t bytes)
{
    epi_block *block = find(pool, offset);
    bytes = round_up(bytes ? bytes : 1);
    if (!block || bytes >= block->bytes)
        return EP_OK;
    size_t before = block->bytes;
    EPI_TRY(split(block, bytes));
    pool->used -= before - bytes;
    merge_free(pool);
    return EP_OK;
}

bool epi_pool_give(epi_pool *pool, size_t offset)
{
    epi_block *block = find(pool, offset);
    if (!block || block->held_until)
        return false;
    block->used = false;
    pool->used -= block->bytes;
    merge_free(pool);
    return true;
}

void epi_pool_hold(epi_pool *pool, size_t offset, uint64_t epoch)
{
    epi_block *block = find(pool, offset);
    if (block)
        block->held_until = epoch;
}

void epi_pool_settle(epi_pool *pool, uint64_t epoch)
{
    bool changed = false;
    for (epi_block *block = pool->first; block; block = block->next) {
        if (!block->held_until || block->held_until > epoch)
            continue;
        block->held_until = 0;
        block->used = false;
        pool->used -= block->bytes;
        changed = true;
    }
    if (changed)
        merge_free(pool);
}
