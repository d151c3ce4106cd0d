/* SPDX-License-Identifier: MIT */
/*
 * The copy limit: how fast this machine copies bytes when as many ranks as the
 * measured calls have do nothing else at the same time. Buffers should be the
 * real ones, and warm. Each round is one way of copying in one direction and
 * the best round counts, so the limit is what the machine can do rather than
 * what one way of copying happens to reach.
 */
#ifndef APPS_COPY_LIMIT_H
#define APPS_COPY_LIMIT_H

#include "ranks.h"
#include "span.h"

#define COPY_ROUNDS 6 /* of one copy_limit_measure() */

/* What one rank did in one round. */
typedef struct copy_round {
    span time;
    int64_t bytes;
} copy_round;

/* Copies `bytes` between `a` and `b`, to and fro, COPY_ROUNDS times, which leaves both alike. Fills
   rounds[round * num_ranks + rank] of this rank. Collective. */
ep_status copy_limit_measure(rank_self *self, copy_round *rounds, void *a, void *b, size_t bytes);

/* Bytes per microsecond that all ranks copied together in the best of `count` rounds; 0 when there
   was nothing to copy. */
double copy_limit_rate(const copy_round *rounds, int count, int num_ranks);

#endif
