/* SPDX-License-Identifier: MIT */
/* What the files of `entrepot demo` share. */
#ifndef APPS_DEMO_H
#define APPS_DEMO_H

#include "copy_limit.h"
#include "demo_model.h"
#include "ranks.h"
#include "span.h"

#include "entrepot/ep.h"

#define DEMO_ITERATIONS 8 /* of the exchanges, timed; the experts run once per wire */

enum { DEMO_BACKEND_CPU, DEMO_BACKEND_CUDA };
extern const char *const demo_backends[];

typedef struct demo_options {
    int64_t ranks, tokens, seed;
    int backend;
    bool json, mps;
} demo_options;

/* The names of the field: T2 is what happens before experts, T3 the experts, T4 what follows. */
typedef enum demo_phase {
    DEMO_ROUTER,
    DEMO_DISPATCH,
    DEMO_DISPATCH_FP8,
    DEMO_EXPERTS,
    DEMO_COMBINE,
    DEMO_OLD_DISPATCH, /* the traditional path, emulated */
    DEMO_OLD_COMBINE,
    DEMO_NUM_PHASES
} demo_phase;

/* Bytes that a rank copies on a GPU to find the copy limit, at least: fewer take longer to launch
   than to copy. */
#define DEMO_COPY_BYTES ((size_t)128 << 20)

enum { DEMO_WIRE_BF16, DEMO_WIRE_FP8, DEMO_NUM_WIRES };

/* Bytes of a dispatched row. */
#define DEMO_ROW_BF16 (DEMO_HIDDEN * 2)
#define DEMO_ROW_FP8 (DEMO_HIDDEN + DEMO_HIDDEN / 128 * 4)

typedef struct demo_rank_result {
    int64_t rows;     /* received */
    int64_t own_rows; /* of them, from the rank itself */
    int64_t pairs;    /* (token, expert) pairs that its experts computed */
    bool old_agrees;  /* the traditional path gave the same rows and outputs */
    int gpu;          /* its index, with --backend cuda */
    char gpu_name[96];
} demo_rank_result;

typedef struct demo_context {
    const demo_options *options;
    workload load;
    demo_rank_result *results;     /* [ranks] */
    span *spans;                   /* [phase][DEMO_ITERATIONS][ranks] */
    copy_round *copies;            /* [COPY_ROUNDS][ranks] */
    uint16_t *out[DEMO_NUM_WIRES]; /* [ranks * tokens, DEMO_HIDDEN] BF16, of all ranks */
    uint16_t *stage;               /* [ranks][stage_rows, DEMO_HIDDEN]: what the emulated
                                      all-to-all goes through */
    int64_t stage_rows;            /* tokens * ranks: any routing fits */
    int32_t *stage_counts;         /* [ranks * ranks] */
} demo_context;

/* How often the copy limit is measured. */
static inline int demo_copy_rounds(const demo_options *o)
{
    return o->backend == DEMO_BACKEND_CUDA ? 2 * COPY_ROUNDS : COPY_ROUNDS;
}

static inline span *demo_span_at(const demo_context *c, int phase, int iteration, int rank)
{
    return &c->spans[(phase * DEMO_ITERATIONS + iteration) * c->options->ranks + rank];
}

/* How far outputs are from the reference: relative squared differences. */
typedef struct demo_check {
    double difference[DEMO_NUM_WIRES];
    double reference_us;
} demo_check;

/* At most: one BF16 rounding per stage; and E4M3's three bits of mantissa before two layers. */
#define DEMO_TOLERANCE_BF16 1e-5
#define DEMO_TOLERANCE_FP8 3e-3

/* What every rank does. */
ep_status demo_rank(rank_self *self);

/* The same layer in this process, in one piece; false when out of memory. */
bool demo_reference(const demo_context *c, demo_check *check);

/* The traditional path of one rank, see demo_traditional.c. */
typedef struct demo_traditional demo_traditional;
demo_traditional *demo_traditional_create(rank_self *self, const int32_t *ids);
void demo_traditional_free(demo_traditional *t);
/* Rows this rank received, [*num_rows, DEMO_HIDDEN], valid until the next dispatch. Collective. */
ep_status demo_traditional_dispatch(demo_traditional *t, const uint16_t *x, const uint16_t **rows,
                                    int64_t *num_rows);
ep_status demo_traditional_combine(demo_traditional *t, const uint16_t *y, uint16_t *out);

/* Prints the results; an exit code. */
int demo_report(const demo_context *c, const demo_check *check);

#endif
