/* SPDX-License-Identifier: MIT */
/*
 * The part of a window that results live in: first fit over a list of blocks.
 * Local bookkeeping only; memory is backed through the window's commit.
 */
#ifndef EPI_EP_POOL_H
#define EPI_EP_POOL_H

#include "transport/ops.h"

typedef struct epi_block {
    size_t offset, bytes; /* from the window's base; bytes is a multiple of EPI_POOL_ALIGN */
    bool used;
    uint64_t held_until; /* not reused before every peer is past this call; 0: free to reuse */
    struct epi_block *next;
} epi_block;

typedef struct epi_pool {
    epi_window *window;
    size_t start, limit; /* offsets within the window */
    bool address_only;   /* blocks are not backed by memory until somebody does */
    size_t used, peak;
    epi_block *first; /* ordered by offset, without gaps up to the highest used block */
} epi_pool;

#define EPI_POOL_ALIGN 4096

void epi_pool_init(epi_pool *pool, epi_window *window, size_t start, size_t limit,
                   bool address_only);
void epi_pool_destroy(epi_pool *pool);

/* Counts memory of the window outside the list as used, or no longer. */
void epi_pool_count(epi_pool *pool, size_t more, size_t less);

/* Takes `bytes`, backing more of the window if it must. EP_ERR_MEMORY names the bound. */
ep_status epi_pool_take(epi_pool *pool, size_t bytes, size_t *offset);

/* Takes the largest gap that is backed already; *bytes is 0 (and nothing taken) when none is. */
ep_status epi_pool_take_largest(epi_pool *pool, size_t *offset, size_t *bytes);

/* Gives the tail of a taken block back, keeping `bytes`. */
ep_status epi_pool_trim(epi_pool *pool, size_t offset, size_t bytes);

/* False when `offset` is not the start of a taken block. */
bool epi_pool_give(epi_pool *pool, size_t offset);

/* Gives a block back that peers may still write to: reused only after epi_pool_settle. */
void epi_pool_hold(epi_pool *pool, size_t offset, uint64_t epoch);

/* Every peer is past call `epoch`: frees what was held for it or earlier ones. */
void epi_pool_settle(epi_pool *pool, uint64_t epoch);

#endif
