/* SPDX-License-Identifier: MIT */
/* What a rank has in both modes of `bench ep`: its inputs, and how calls are timed. */
#ifndef APPS_BENCH_RANK_H
#define APPS_BENCH_RANK_H

#include "bench.h"

#include "entrepot/low_latency.h"

typedef struct bench_rank {
    rank_self *self;
    const bench_context *c;
    const bench_options *o;
    bench_rank_result *result;
    ep_buffer *buffer;
    int64_t iteration;            /* negative while warming up */
    int32_t *ids;                 /* [tokens, topk] */
    float *weights;               /* [tokens, topk] */
    uint16_t *x;                  /* [tokens, hidden] BF16 */
    uint16_t *out, *out_ordinary; /* [tokens, hidden] BF16, from outputs in the window and not */
    int32_t *counts;              /* of ep_layout */
    uint8_t *member;
} bench_rank;

#define BENCH_TRY(call)             \
    do {                            \
        ep_status status_ = (call); \
        if (status_ != EP_OK)       \
            return status_;         \
    } while (0)

/* Times one call from a barrier on, in a function whose `b` is the bench_rank. */
#define BENCH_TIMED(phase, call)                     \
    do {                                             \
        BENCH_TRY(ep_group_barrier(b->self->group)); \
        BENCH_TIMED_ON(phase, call);                 \
    } while (0)

/* The same without the barrier, for a call that follows another at once. */
#define BENCH_TIMED_ON(phase, call)       \
    do {                                  \
        span span_ = {clock_ns(), 0};     \
        BENCH_TRY(call);                  \
        span_.end_ns = clock_ns();        \
        bench_rank_note(b, phase, span_); \
    } while (0)

/* Keeps a span, unless the rank is warming up. */
void bench_rank_note(const bench_rank *b, bench_phase phase, span s);

/* Inputs and the buffer. bench_rank_close() also after a failure. */
ep_status bench_rank_open(rank_self *self, bench_rank *b);
/* The same with a configuration of the caller's, whose max_experts is filled in. */
ep_status bench_rank_open_on(rank_self *self, ep_buffer_config *config, bench_rank *b);
void bench_rank_close(bench_rank *b);

/* The layout of this rank's tokens, timed. */
ep_status bench_rank_layout(bench_rank *b);

/* `bytes` of memory for the measurement, 64-byte aligned; free() it. */
void *bench_alloc(size_t bytes);
/* Memory of this rank's outputs, in bytes. */
size_t bench_out_bytes(const bench_options *o);
/* Outputs become what no combine gives. Earlier iterations left the right values where the last one
   writes; --check must not see those. */
void bench_rank_spoil_outputs(bench_rank *b);

/* The stand-in for an expert, as check.h describes it, for `rows` received rows in host memory. */
void bench_expert_rows(const bench_options *o, const ep_recv *recv, int64_t rows, uint16_t *y);
/* That of the low-latency mode, as check_ll.h describes it. */
void bench_ll_experts(const bench_rank *b, const ep_ll_recv *recv, const ep_tensor *y);

/* Notes memory in use, once everything that the calls need is there and nothing that only
   measuring needs. `inputs_outputs`: bytes of the tensors of the calls. Collective. */
ep_status bench_rank_note_memory(bench_rank *b, int64_t inputs_outputs);

#endif
