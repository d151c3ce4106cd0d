/* SPDX-License-Identifier: MIT */
#include "copy_limit.h"

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

ep_status copy_limit_measure(rank_self *self, span *spans, void *a, void *b, size_t bytes)
{
    for (int i = 0; i < COPY_ROUNDS; i++) {
        void *to = i & 1 ? a : b, *from = i & 1 ? b : a;
        ep_status status = ep_group_barrier(self->group);
        if (status != EP_OK)
            return status;
        span *s = &spans[i * self->num_ranks + self->rank];
        s->start_ns = clock_ns();
        if (bytes > 0)
            (i & 2 ? copy_chunks : copy_whole)(to, from, bytes);
        s->end_ns = clock_ns();
    }
    return EP_OK;
}

double copy_limit_rate(const span *spans, int rounds, int num_ranks, int64_t bytes)
{
    int64_t best = INT64_MAX;
    for (int i = 0; i < rounds; i++) {
        int64_t ns = span_all_ns(spans + (size_t)i * (size_t)num_ranks, num_ranks);
        best = ns < best ? ns : best;
    }
    return best > 0 ? (double)bytes * 1e3 / (double)best : 0;
}
