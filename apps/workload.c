/* SPDX-License-Identifier: MIT */
#include "workload.h"

#include <stdlib.h>

/* A stream of its own for every (seed, rank, index). */
static uint64_t stream(const workload *w, int rank, uint64_t index)
{
    uint64_t state = w->seed;
    state = random_next(&state) + (uint64_t)rank;
    state = random_next(&state) + index;
    return random_next(&state);
}

static void traced_routing(const workload *w, int rank, int32_t *ids, float *weights)
{
    size_t k = (size_t)w->topk;
    for (int64_t i = 0; i < w->num_tokens; i++) {
        size_t from = (size_t)((rank * w->num_tokens + i) % w->trace->num_tokens) * k;
        memcpy(ids + (size_t)i * k, w->trace->ids + from, k * sizeof *ids);
        memcpy(weights + (size_t)i * k, w->trace->weights + from, k * sizeof *weights);
    }
}

static void random_weights(uint64_t *state, int topk, float *weights)
{
    float sum = 0;
    for (int k = 0; k < topk; k++) {
        weights[k] = 0.05f + (float)(random_next(state) >> 40) * 0x1p-24f;
        sum += weights[k];
    }
    for (int k = 0; k < topk; k++)
        weights[k] /= sum;
}

static bool random_routing(const workload *w, int rank, int32_t *ids, float *weights)
{
    int64_t num_experts = w->placement ? w->placement->experts : w->num_experts;
    int32_t *order = malloc((size_t)num_experts * sizeof *order);
    if (!order)
        return false;
    for (int32_t e = 0; e < num_experts; e++)
        order[e] = e;
    uint64_t state = stream(w, rank, UINT64_MAX);
    for (int64_t t = 0; t < w->num_tokens; t++) {
        /* The first steps of a shuffle; whatever order it starts from, the choice is uniform. */
        for (int k = 0; k < w->topk; k++) {
            int64_t other = k + (int64_t)(random_next(&state) % (uint64_t)(num_experts - k));
            int32_t chosen = order[other];
            order[other] = order[k];
            order[k] = chosen;
            ids[t * w->topk + k] = chosen;
        }
        random_weights(&state, w->topk, weights + t * w->topk);
    }
    free(order);
    return true;
}

bool workload_routing(const workload *w, int rank, int32_t *ids, float *weights)
{
    if (w->trace)
        traced_routing(w, rank, ids, weights);
    else if (!random_routing(w, rank, ids, weights))
        return false;
    return !w->placement ||
           placement_route(w->placement, w->num_ranks, w->num_tokens, w->topk, ids);
}

void workload_row(const workload *w, int rank, int64_t token, uint16_t *row)
{
    uint64_t state = stream(w, rank, (uint64_t)token);
    uint64_t bits = 0;
    float unit = 1;
    for (int64_t h = 0; h < w->hidden; h++) {
        if (h % 128 == 0)
            unit = 1.0f / (float)(32768 << random_next(&state) % 8);
        if (h % 4 == 0)
            bits = random_next(&state);
        row[h] = bf16_from_float((float)(int16_t)(bits >> h % 4 * 16) * unit);
    }
}
