/* SPDX-License-Identifier: MIT */
/* The layer in one process and one piece: no ranks, no exchange, sums in float64. */
#include "demo.h"
#include "progress.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct reference {
    const demo_context *c;
    int64_t tokens; /* of all ranks */
    uint16_t *row;
    float *values; /* [tokens, DEMO_HIDDEN] */
    int32_t *ids;  /* [tokens, DEMO_TOPK] */
    float *weights;
    double *sum;            /* [tokens, DEMO_HIDDEN] */
    float *x, *y, *scratch; /* [most + 1] rows of one expert */
    int64_t *token;
    demo_expert expert;
} reference;

static void reference_free(reference *f)
{
    free(f->row);
    free(f->values);
    free(f->ids);
    free(f->weights);
    free(f->sum);
    free(f->x);
    free(f->y);
    free(f->scratch);
    free(f->token);
    demo_expert_free(&f->expert);
}

static bool route_all(reference *f)
{
    const workload *w = &f->c->load;
    size_t tokens = (size_t)f->tokens, entries = tokens * DEMO_TOPK;
    f->row = malloc(tokens * DEMO_ROW_BF16);
    f->values = malloc(tokens * DEMO_HIDDEN * sizeof *f->values);
    f->ids = malloc(entries * sizeof *f->ids);
    f->weights = malloc(entries * sizeof *f->weights);
    f->sum = calloc(tokens * DEMO_HIDDEN, sizeof *f->sum);
    float *router = demo_router_create(w);
    float *logits = malloc(tokens * (size_t)demo_padded_experts(w) * sizeof *logits);
    bool good = f->row && f->values && f->ids && f->weights && f->sum && router && logits;
    for (int64_t t = 0; good && t < f->tokens; t++)
        workload_row(w, (int)(t / w->num_tokens), t % w->num_tokens, f->row + t * DEMO_HIDDEN);
    if (good)
        demo_route(w, router, f->row, f->tokens, f->values, logits, f->ids, f->weights);
    free(router);
    free(logits);
    return good;
}

static bool alloc_batch(reference *f)
{
    int64_t most = 0, *counts = calloc((size_t)f->c->load.num_experts, sizeof *counts);
    for (int64_t i = 0; counts && i < f->tokens * DEMO_TOPK; i++) {
        int64_t n = ++counts[f->ids[i]];
        most = n > most ? n : most;
    }
    free(counts);
    size_t rows = (size_t)most + 1;
    f->x = malloc(rows * DEMO_HIDDEN * sizeof *f->x);
    f->y = malloc(rows * DEMO_HIDDEN * sizeof *f->y);
    f->scratch = malloc(rows * 2 * DEMO_WIDTH * sizeof *f->scratch);
    f->token = malloc(rows * sizeof *f->token);
    return counts && f->x && f->y && f->scratch && f->token && demo_expert_alloc(&f->expert);
}

static void run_expert(reference *f, int32_t expert)
{
    int64_t n = 0;
    for (int64_t i = 0; i < f->tokens * DEMO_TOPK; i++) {
        if (f->ids[i] == expert) {
            memcpy(f->x + n * DEMO_HIDDEN, f->values + i / DEMO_TOPK * DEMO_HIDDEN,
                   DEMO_HIDDEN * sizeof *f->x);
            f->token[n++] = i;
        }
    }
    demo_expert_fill(&f->c->load, expert, &f->expert);
    demo_expert_apply(&f->expert, f->x, n, f->scratch, f->y);
    for (int64_t i = 0; i < n; i++) {
        double weight = f->weights[f->token[i]];
        double *sum = f->sum + f->token[i] / DEMO_TOPK * DEMO_HIDDEN;
        for (int h = 0; h < DEMO_HIDDEN; h++)
            sum[h] += weight * f->y[i * DEMO_HIDDEN + h];
    }
}

/* 1 - 2 sum(ab) / sum(a^2 + b^2) */
static double difference(const reference *f, const uint16_t *out)
{
    double product = 0, squares = 0;
    for (int64_t i = 0; i < f->tokens * DEMO_HIDDEN; i++) {
        double a = float_from_bf16(out[i]), b = f->sum[i];
        product += a * b;
        squares += a * a + b * b;
    }
    return squares > 0 ? 1 - 2 * product / squares : 0;
}

bool demo_reference(const demo_context *c, demo_check *check)
{
    reference f = {.c = c, .tokens = c->options->ranks * c->options->tokens};
    int64_t start = clock_ns(), experts = c->load.num_experts;
    bool good = route_all(&f) && alloc_batch(&f);
    for (int32_t e = 0; good && e < experts; e++) {
        progress_draw("reference", e, experts);
        run_expert(&f, e);
    }
    progress_clear();
    check->reference_us = (double)(clock_ns() - start) / 1e3;
    for (int wire = 0; good && wire < DEMO_NUM_WIRES; wire++)
        check->difference[wire] = difference(&f, c->out[wire]);
    reference_free(&f);
    return good;
}
