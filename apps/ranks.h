/* SPDX-License-Identifier: MIT */
/*
 * Ranks of this command itself: one function on R ranks, which are processes
 * forked from here or threads. For a command that measures or shows something;
 * `entrepot run` starts other programs.
 */
#ifndef APPS_RANKS_H
#define APPS_RANKS_H

#include "entrepot/group.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct rank_self {
    ep_group *group;
    int rank;
    int num_ranks;
    void *context;         /* of ranks_run; what ranks write there must be ranks_shared_alloc'ed */
    _Atomic int64_t *done; /* progress, counted by all ranks together */
    char *message;         /* of the failure, RANK_MESSAGE_MAX bytes */
} rank_self;

#define RANK_MESSAGE_MAX 512

/* What every rank does. When it fails the library's last error is reported, unless
   rank_fail() said something better. */
typedef ep_status (*rank_fn)(rank_self *self);

typedef struct ranks_config {
    const char *command; /* how messages begin */
    const char *what;    /* title of the progress bar */
    int num_ranks;
    bool threads;
    int64_t steps; /* of the bar: what `done` reaches */
} ranks_config;

/* Runs `fn` on every rank until all have returned. EXIT_OK, or EXIT_RUNTIME after a message on
   stderr that names the rank at fault. */
int ranks_run(const ranks_config *config, rank_fn fn, void *context);

/* Notes a failure that is not the library's; returns `status`. */
ep_status rank_fail(rank_self *self, ep_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Memory, zero at first, that ranks and this process share; NULL when there is none. */
void *ranks_shared_alloc(size_t bytes);
void ranks_shared_free(void *memory, size_t bytes);

/* Nanoseconds of the monotonic clock, the same in all ranks. */
int64_t clock_ns(void);

#endif
