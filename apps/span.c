/* SPDX-License-Identifier: MIT */
#include "span.h"

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

static double slowest_us(const span *spans, int num_ranks)
{
    int64_t slowest = 0;
    for (int r = 0; r < num_ranks; r++) {
        int64_t ns = spans[r].end_ns - spans[r].start_ns;
        slowest = ns > slowest ? ns : slowest;
    }
    return (double)slowest / 1e3;
}

double span_median_us(const span *spans, int64_t iterations, int num_ranks)
{
    double *slowest = malloc((size_t)iterations * sizeof *slowest);
    if (!slowest)
        return -1;
    for (int64_t i = 0; i < iterations; i++)
        slowest[i] = slowest_us(spans + i * num_ranks, num_ranks);
    double result = median(slowest, (size_t)iterations);
    free(slowest);
    return result;
}
