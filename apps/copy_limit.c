/* SPDX-License-Identifier: MIT */
#include "copy_limit.h"

#include <string.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define CHUNK 16384 /* about a row, as dispatch copies them */

/* Bytes that a rank copies in a round at least. Less is repeated: starting together would take
   longer than copying, and the limit would be too easy to reach. */
#define LEAST_BYTES ((size_t)8 << 20)

static void copy_whole(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
}

static void copy_chunks(void *to, const void *from, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += CHUNK)
        memcpy((char *)to + i, (const char *)from + i, bytes - i < CHUNK ? bytes - i : CHUNK);
}

/* Past the caches, which spares reading what is overwritten. */
static void copy_streaming(void *to, const void *from, size_t bytes)
{
#ifdef __SSE2__
    size_t whole = (uintptr_t)to % 16 == 0 && (uintptr_t)from % 16 == 0 ? bytes / 64 * 64 : 0;
    for (size_t i = 0; i < whole; i += 64) {
        const __m128i *in = (const __m128i *)((const char *)from + i);
        __m128i *out = (__m128i *)((char *)to + i);
        for (int k = 0; k < 4; k++)
            _mm_stream_si128(out + k, _mm_load_si128(in + k));
    }
    _mm_sfence();
    memcpy((char *)to + whole, (const char *)from + whole, bytes - whole);
#else
    memcpy(to, from, bytes);
#endif
}

ep_status copy_limit_measure(rank_self *self, copy_round *rounds, void *a, void *b, size_t bytes)
{
    static void (*const ways[])(void *, const void *, size_t) = {copy_whole, copy_chunks,
                                                                 copy_streaming};
    size_t times = bytes > 0 && bytes < LEAST_BYTES ? (LEAST_BYTES + bytes - 1) / bytes : 1;
    for (int i = 0; i < COPY_ROUNDS; i++) {
        void *to = i & 1 ? a : b, *from = i & 1 ? b : a;
        ep_status status = ep_group_barrier(self->group);
        if (status != EP_OK)
            return status;
        copy_round *round = &rounds[i * self->num_ranks + self->rank];
        round->time.start_ns = clock_ns();
        for (size_t k = 0; k < times && bytes > 0; k++)
            ways[i % 3](to, from, bytes);
        round->time.end_ns = clock_ns();
        round->bytes = (int64_t)(bytes * times);
    }
    return EP_OK;
}

/* Bytes per microsecond of all ranks, from the first one's start to the last one's end. */
static double rate_of_round(const copy_round *ranks, int num_ranks)
{
    int64_t first = ranks[0].time.start_ns, last = ranks[0].time.end_ns, bytes = 0;
    for (int r = 0; r < num_ranks; r++) {
        first = ranks[r].time.start_ns < first ? ranks[r].time.start_ns : first;
        last = ranks[r].time.end_ns > last ? ranks[r].time.end_ns : last;
        bytes += ranks[r].bytes;
    }
    return last > first ? (double)bytes * 1e3 / (double)(last - first) : 0;
}

double copy_limit_rate(const copy_round *rounds, int count, int num_ranks)
{
    double best = 0;
    for (int i = 0; i < count; i++) {
        double rate = rate_of_round(rounds + (size_t)i * (size_t)num_ranks, num_ranks);
        best = rate > best ? rate : best;
    }
    return best;
}
