/* SPDX-License-Identifier: MIT */
#include "bench_stats.h"

bench_totals bench_sum(const bench_context *c)
{
    const bench_options *o = c->options;
    bench_totals t = {0};
    for (int r = 0; r < o->ranks; r++) {
        int64_t rows = c->results[r].recv_tokens, pairs = c->results[r].pairs;
        t.recv_tokens += rows;
        t.most_recv_tokens = rows > t.most_recv_tokens ? rows : t.most_recv_tokens;
        t.most_pairs = pairs > t.most_pairs ? pairs : t.most_pairs;
        t.inputs_outputs += c->results[r].inputs_outputs;
        t.window_bytes += c->results[r].window_bytes;
        t.resident_bytes += c->results[r].resident_bytes;
    }
    t.bytes_received = t.recv_tokens * bench_row_bytes(o);
    /* A copy of n bytes reads n and writes n; combine reads every row and writes every token. */
    t.combine_bytes = (t.recv_tokens + o->ranks * o->tokens) * o->hidden * 2 / 2;
    return t;
}
