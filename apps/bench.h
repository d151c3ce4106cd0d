/* SPDX-License-Identifier: MIT */
/* What the files of `entrepot bench ep` share. */
#ifndef APPS_BENCH_H
#define APPS_BENCH_H

#include "copy_limit.h"
#include "ranks.h"
#include "span.h"
#include "workload.h"

#include "entrepot/ep.h"

enum { BENCH_MODE_NORMAL, BENCH_MODE_LL };
enum { BENCH_BACKEND_CPU, BENCH_BACKEND_CUDA };
enum { BENCH_WIRE_BF16, BENCH_WIRE_FP8 };
enum { BENCH_RANKS_PROCESSES, BENCH_RANKS_THREADS };
enum { BENCH_BASELINE_NONE, BENCH_BASELINE_MPI };

typedef struct bench_options {
    int mode, backend, wire, ranks_as, baseline;
    int64_t ranks, tokens, hidden, topk, experts, iters, warmup, seed, threads, sms, plan_layer;
    const char *trace_path;     /* NULL: random routing */
    const char *plan_path;      /* NULL: experts in equal blocks */
    const char *trace_out_path; /* NULL: no Chrome trace */
    bool check, json, mps;
} bench_options;

extern const char *const bench_modes[], *const bench_backends[], *const bench_wires[],
                                                                     *const bench_ranks_as[];

/* The calls that are timed. */
typedef enum bench_phase {
    BENCH_LAYOUT,
    BENCH_DISPATCH,
    BENCH_DISPATCH_CACHED,
    BENCH_COMBINE,
    BENCH_COMBINE_ORDINARY,
    BENCH_HOOK_SEND, /* the two parts of a low-latency call */
    BENCH_HOOK_RECV,
    BENCH_COMBINE_HOOK_SEND,
    BENCH_COMBINE_HOOK_RECV,
    BENCH_ROUND_TRIP,     /* of bare notifications */
    BENCH_DISPATCH_GIVEN, /* rows quantised beforehand */
    BENCH_GRAPH_ROUND,    /* dispatch and combine, captured */
    BENCH_NUM_PHASES
} bench_phase;

/* Whether a mode has the phase. */
static inline bool bench_has_phase(const bench_options *o, int phase)
{
    bool cuda = o->backend == BENCH_BACKEND_CUDA, ll = o->mode == BENCH_MODE_LL;
    if (phase == BENCH_DISPATCH_GIVEN)
        return cuda && !ll && o->wire == BENCH_WIRE_FP8;
    if (phase == BENCH_GRAPH_ROUND)
        return cuda && ll;
    if (cuda && (phase == BENCH_LAYOUT || phase >= BENCH_HOOK_SEND))
        return false;
    if (ll)
        return phase != BENCH_DISPATCH_CACHED;
    return phase < BENCH_HOOK_SEND;
}

extern const char *const bench_phase_names[BENCH_NUM_PHASES];

/* What one rank found out; in memory that ranks share. */
typedef struct bench_rank_result {
    int64_t recv_tokens;          /* rows received in one iteration */
    int64_t pairs;                /* (token, expert) pairs for its experts */
    int64_t inputs_outputs;       /* bytes of tensors: x, routing, received rows, y, out */
    int64_t window_bytes;         /* backed by memory in the end */
    int64_t resident_bytes;       /* proportional share of memory, largest */
    char wrong[RANK_MESSAGE_MAX]; /* first thing that --check found wrong; "" for none */
} bench_rank_result;

typedef struct bench_context {
    const bench_options *options;
    workload load;
    bench_rank_result *results; /* [ranks] */
    span *spans;                /* [phase][iteration][rank], see bench_span_at */
    copy_round *copies;         /* [2 * COPY_ROUNDS][rank] */
} bench_context;

static inline span *bench_span_at(const bench_context *c, int phase, int64_t iteration, int rank)
{
    int64_t row = phase * c->options->iters + iteration;
    return &c->spans[row * c->options->ranks + rank];
}

/* Bytes of one dispatched row on the wire: elements and scales. */
static inline int64_t bench_row_bytes(const bench_options *o)
{
    int64_t fp8 = o->hidden + (o->hidden + 127) / 128 * 4;
    return o->wire == BENCH_WIRE_FP8 ? fp8 : o->hidden * 2;
}

#define BENCH_EXCHANGE_MAX 24

/* The numbers of the MPI baseline. */
typedef struct bench_baseline {
    bool present;
    double dispatch_us, combine_us;
    char dispatch_exchange[BENCH_EXCHANGE_MAX]; /* the faster of the ways to exchange rows */
    char combine_exchange[BENCH_EXCHANGE_MAX];
    char library[128]; /* the MPI it ran on */
} bench_baseline;

/* What each rank of a mode does. */
ep_status bench_normal_rank(rank_self *self);
ep_status bench_ll_rank(rank_self *self);
ep_status bench_cuda_rank(rank_self *self);
ep_status bench_cuda_ll_rank(rank_self *self);

/* Runs the MPI baseline with the same shape, seed and routing and keeps the better of this run and
   what `b` holds already. An exit code. */
int bench_run_baseline(const bench_options *o, bench_baseline *b);

/* The same routing without --plan, measured just before. */
typedef struct bench_unplanned {
    bool present;
    double dispatch_us, combine_us;
    int64_t recv_tokens, most_recv_tokens, most_pairs;
} bench_unplanned;

/* Whether this build has the baseline. */
bool bench_baseline_present(void);

/* Prints the results; an exit code. */
int bench_report(const bench_context *c, const bench_baseline *b, const bench_unplanned *u);

/* Writes the spans as Chrome trace events, one track per rank and phase. */
bool bench_write_trace(const bench_context *c);

#endif
