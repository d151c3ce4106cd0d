/* SPDX-License-Identifier: MIT */
#include "bench_stats.h"

#include <stdlib.h>

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double median(double *values, size_t n)
{
    qsort(values, n, sizeof *values, compare);
    return n % 2 ? values[n / 2] : (values[n / 2 - 1] + values[n / 2]) / 2;
}

double bench_phase_us(const bench_context *c, bench_phase phase)
{
    size_t n = (size_t)c->options->iters;
    double *slowest = malloc(n * sizeof *slowest);
    if (!slowest)
        return -1;
    for (size_t i = 0; i < n; i++) {
        slowest[i] = 0;
        for (int r = 0; r < c->options->ranks; r++) {
            const bench_span *s = bench_span_at(c, phase, (int64_t)i, r);
            double us = (double)(s->end_ns - s->start_ns) / 1e3;
            slowest[i] = us > slowest[i] ? us : slowest[i];
        }
    }
    double result = median(slowest, n);
    free(slowest);
    return result;
}

bench_totals bench_sum(const bench_context *c)
{
    const bench_options *o = c->options;
    bench_totals t = {0};
    for (int r = 0; r < o->ranks; r++) {
        t.recv_tokens += c->results[r].recv_tokens;
        t.inputs_outputs += c->results[r].inputs_outputs;
        t.window_bytes += c->results[r].window_bytes;
        t.resident_bytes += c->results[r].resident_bytes;
    }
    t.bytes_received = t.recv_tokens * bench_row_bytes(o);
    /* A copy of n bytes reads n and writes n; combine reads every row and writes every token. */
    t.combine_bytes = (t.recv_tokens + o->ranks * o->tokens) * o->hidden * 2 / 2;
    return t;
}

double bench_copy_rate(const bench_context *c)
{
    int64_t ranks = c->options->ranks, best = INT64_MAX;
    for (int i = 0; i < BENCH_COPY_ROUNDS; i++) {
        const bench_span *s = c->copies + i * ranks;
        int64_t first = INT64_MAX, last = 0;
        for (int64_t r = 0; r < ranks; r++) {
            first = s[r].start_ns < first ? s[r].start_ns : first;
            last = s[r].end_ns > last ? s[r].end_ns : last;
        }
        best = last - first < best ? last - first : best;
    }
    return best > 0 ? (double)bench_sum(c).bytes_received * 1e3 / (double)best : 0;
}
