/* SPDX-License-Identifier: MIT */
/* Spans of time, and what is made of those of many ranks and iterations. */
#ifndef APPS_SPAN_H
#define APPS_SPAN_H

#include <stddef.h>
#include <stdint.h>

typedef struct span {
    int64_t start_ns, end_ns; /* of clock_ns() */
} span;

/* Median over iterations of the slowest rank, microseconds; spans [iterations][num_ranks].
   -1 when out of memory. */
double span_median_us(const span *spans, int64_t iterations, int num_ranks);

/* Median of `values`, which are sorted in place; the mean of the middle two when n is even. */
double median(double *values, size_t n);

#endif
