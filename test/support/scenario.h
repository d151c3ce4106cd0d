/* SPDX-License-Identifier: MIT */
/*
 * Scenarios: one set of parameters and a seed settle the inputs of every rank
 * and, by the reference, everything that they must get. Built once, before the
 * ranks start; each rank then runs the calls and compares bit for bit.
 */
#ifndef EP_TEST_SCENARIO_H
#define EP_TEST_SCENARIO_H

#include "entrepot/ep.h"
#include "support/random.h"
#include "support/reference.h"

enum token_counts {
    TOKENS_EQUAL,     /* max_tokens everywhere */
    TOKENS_RANDOM,    /* 0..max_tokens */
    TOKENS_SOME_NONE, /* none on odd ranks */
    TOKENS_NONE
};

enum expert_table {
    TABLE_BLOCKS, /* no table is passed */
    TABLE_SHUFFLED,
    TABLE_ALL_ON_LAST /* the other ranks have no expert */
};

enum y_place {
    Y_ORDINARY, /* the caller's memory */
    Y_ALLOC,    /* ep_buffer_alloc */
    Y_RECV      /* written over recv.x, when the dtypes agree */
};

/* Zero means the usual: BF16, I64 ids, alignment 1. */
struct scenario {
    const char *name;
    uint64_t seed;
    int num_ranks;
    int64_t max_tokens;
    enum token_counts tokens;
    int64_t hidden;
    int topk;
    int64_t num_experts;
    enum routing routing;
    enum expert_table table;
    ep_dtype dtype, topk_dtype;
    bool weights;
    ep_wire wire;
    ep_scale scale;
    ep_row_layout layout;
    int32_t alignment;
    int worst; /* 0: no bound; n: the most rows of any rank and n - 1 more */
    ep_dtype y_dtype;
    enum y_place y_place;
    int num_bias;
    bool carry; /* topk_weights given to combine */
    bool allocator;
    bool strided; /* gaps in inputs and outputs, scales transposed */
    bool async;   /* with events, each call after the one before it */
    int num_threads;
    const int64_t *trace; /* [R * max_tokens, K] ids instead of a generated routing */
};

/* Bounds of random scenarios. */
struct scenario_limits {
    int num_ranks; /* 0: random, 1..max_ranks; else exactly */
    int max_ranks;
    int64_t max_tokens, max_hidden, max_experts;
};

/* Any combination of modes that the API allows; `name` must outlive it. */
struct scenario scenario_random(struct rng *rng, const struct scenario_limits *limits,
                                const char *name);

struct scenario_rank {
    struct ref_tokens tokens;
    struct ref_recv recv;
    uint8_t *y;               /* [rows, H] y_dtype; NaN in padding, which nobody may read */
    float *carry;             /* combine's topk_weights: [rows, K] by token, [T, K] by expert */
    uint8_t *bias[2];         /* [T, H] */
    uint8_t *out;             /* expected of combine */
    float *out_carry;         /* expected, by token */
    struct ref_tokens second; /* other rows, same routing, for the cached call */
    struct ref_recv second_recv;
    float *row_grads;    /* grad_recv_weights [rows, columns] */
    uint8_t *grad_x;     /* expected of dispatch backward, whose grad_recv_x is y */
    float *grad_weights; /* expected */
    uint8_t *grad_out;   /* [T, H] */
    uint8_t *grad_rows;  /* expected of combine backward */
    float *dots;         /* expected grad_topk_weights, by expert */
};

struct scenario_data {
    struct scenario sc; /* with the defaults filled in */
    struct ref_world world;
    int32_t *table;
    struct scenario_rank *rank; /* [R] */
};

struct scenario_data *scenario_build(const struct scenario *scenario);
void scenario_free(struct scenario_data *data);

/* Configuration of a buffer that the scenario can run on. */
ep_buffer_config scenario_buffer_config(const struct scenario *scenario);

/* Calls that a scenario can make after its dispatch. */
enum {
    SCENARIO_COMBINE = 1,
    SCENARIO_CACHED = 2,
    SCENARIO_DISPATCH_BACKWARD = 4,
    SCENARIO_COMBINE_BACKWARD = 8,
    SCENARIO_ALL = 15
};

/* Runs layout, dispatch and the calls of the mask on this rank's buffer; 0 when all is as it must
   be. Collective. */
int scenario_run(const struct scenario_data *data, ep_buffer *buffer, int calls);

/* A dispatch whose result is kept while other calls go on. */
struct scenario_live {
    ep_recv recv;
    ep_handle *handle;
    ep_tensor y;
    void *y_window;
    const struct scenario_data *data;
    ep_buffer *buffer;
    int rank;
};

int scenario_dispatch(const struct scenario_data *data, ep_buffer *buffer,
                      struct scenario_live *live);
/* Compares the result again: nothing may have changed since. */
int scenario_recheck(const struct scenario_live *live);
int scenario_follow(struct scenario_live *live, int calls);
void scenario_release(struct scenario_live *live);

#endif
