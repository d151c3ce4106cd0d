/* SPDX-License-Identifier: MIT */
/*
 * Memory that a call let peers write, after the call has failed here: a rank that comes late still
 * writes there, as nobody has told it otherwise. It is given out again when every rank has been
 * seen in a later call, since a rank's calls run one after the other; a masked rank when it has
 * ended.
 */
#include "ep/cuda/internal.h"

/* Of memory that lies free the part in [start, end), as a block in use; more of it where there is
   no memory to divide it. */
static epc_block *claim(epc_buffer *b, epc_block *block, const uint8_t *start, const uint8_t *end)
{
    if (block->memory < start) {
        epc_block *rest = epc_cut(block, (size_t)(start - block->memory));
        block = rest ? rest : block;
    }
    if (block->memory + block->bytes > end)
        epc_cut(block, (size_t)(end - block->memory));
    epc_use(b, block);
    block->given = true;
    return block;
}

void epc_hold(epc_buffer *b, const uint8_t *memory, size_t bytes, uint32_t call, uint64_t ranks)
{
    const uint8_t *end = memory + bytes;
    if (!bytes || !ranks)
        return;
    pthread_mutex_lock(&b->buffer->pool_lock);
    for (int s = 0; s < b->num_shared; s++)
        for (epc_block *block = b->segments[s].blocks; block; block = block->next) {
            if (block->memory + block->bytes <= memory || block->memory >= end)
                continue;
            if (!block->used)
                block = claim(b, block, memory, end);
            block->writers |= ranks;
            block->failed = call;
            b->holding = true;
        }
    pthread_mutex_unlock(&b->buffer->pool_lock);
}

/* Ranks that are left out and have ended. */
static uint64_t find_ended(const epc_buffer *b)
{
    const ep_group *group = b->buffer->group;
    uint64_t ended = 0;
    for (int r = 0; r < b->num_ranks; r++)
        if (group->masked[r] && !group->transport->ops->peer_alive(group->transport, r))
            ended |= 1ull << r;
    return ended;
}

/* The first block of the segment that was given back and that nobody writes any more. */
static epc_block *find_settled(const epc_buffer *b, int segment)
{
    epc_block *block = b->segments[segment].blocks;
    while (block && !(block->given && !block->writers))
        block = block->next;
    return block;
}

bool epc_settle(epc_buffer *b, uint32_t call, uint64_t ranks)
{
    bool freed = false;
    if (!b->holding)
        return false;
    ranks |= find_ended(b);
    pthread_mutex_lock(&b->buffer->pool_lock);
    b->holding = false;
    for (int s = 0; s < b->num_shared; s++) {
        for (epc_block *block = b->segments[s].blocks; block; block = block->next) {
            if (block->writers && (int32_t)(call - block->failed) > 0)
                block->writers &= ~ranks;
            b->holding |= block->writers != 0;
        }
        for (epc_block *block; (block = find_settled(b, s)); freed = true)
            epc_free(b, block);
    }
    pthread_mutex_unlock(&b->buffer->pool_lock);
    return freed;
}
