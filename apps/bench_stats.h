/* SPDX-License-Identifier: MIT */
/* From spans to the numbers that are reported. */
#ifndef APPS_BENCH_STATS_H
#define APPS_BENCH_STATS_H

#include "bench.h"

/* Median of `values`, which are sorted in place; the mean of the middle two when n is even. */
double median(double *values, size_t n);

/* Median over iterations of the slowest rank, microseconds; -1 when out of memory. */
double bench_phase_us(const bench_context *c, bench_phase phase);

/* Bytes per microsecond that ranks copied together in their best round; 0 when nothing was. */
double bench_copy_rate(const bench_context *c);

typedef struct bench_totals {
    int64_t recv_tokens, bytes_received;
    int64_t combine_bytes; /* rows read and outputs written, as bytes of a copy that does both */
    int64_t inputs_outputs, window_bytes, resident_bytes;
} bench_totals;

bench_totals bench_sum(const bench_context *c);

#endif
