/* SPDX-License-Identifier: MIT */
/*
 * The copy limit: how fast this machine copies the bytes that ranks receive,
 * when as many ranks do nothing else at the same time. Buffers are the real
 * ones, and warm. Each round is one way of copying in one direction; the report
 * takes the best, so the limit is what the machine can do rather than what one
 * way of copying happens to reach.
 */
#include "bench.h"

#include <string.h>

#define CHUNK 16384 /* about a row, as dispatch copies them */

static void copy_whole(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
}

static void copy_chunks(void *to, const void *from, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += CHUNK)
        memcpy((char *)to + i, (const char *)from + i, bytes - i < CHUNK ? bytes - i : CHUNK);
}

ep_status bench_copy(rank_self *self, const bench_context *c, int first_round, void *a, void *b,
                     size_t bytes)
{
    for (int i = 0; i < BENCH_COPY_ROUNDS / 2; i++) {
        void *to = i & 1 ? a : b, *from = i & 1 ? b : a;
        ep_status status = ep_group_barrier(self->group);
        if (status != EP_OK)
            return status;
        bench_span *span = &c->copies[(first_round + i) * self->num_ranks + self->rank];
        span->start_ns = clock_ns();
        if (bytes > 0)
            (i & 2 ? copy_chunks : copy_whole)(to, from, bytes);
        span->end_ns = clock_ns();
    }
    return EP_OK;
}
