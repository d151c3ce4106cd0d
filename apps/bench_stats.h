/* SPDX-License-Identifier: MIT */
/* Sums over ranks of what `bench ep` found out. */
#ifndef APPS_BENCH_STATS_H
#define APPS_BENCH_STATS_H

#include "bench.h"

typedef struct bench_totals {
    int64_t recv_tokens, bytes_received;
    int64_t most_recv_tokens, most_pairs; /* of the rank that has most */
    int64_t combine_bytes; /* rows read and outputs written, as bytes of a copy that does both */
    int64_t inputs_outputs, window_bytes, resident_bytes;
} bench_totals;

bench_totals bench_sum(const bench_context *c);

#endif
