/* SPDX-License-Identifier: MIT */
#include "demo_model.h"

#include "vector.h"

#include <math.h>
#include <stdlib.h>

#define ROWS_AT_ONCE 4 /* rows that share each weight that is loaded */

static void *alloc_floats(size_t count)
{
    return aligned_alloc(64, (count * sizeof(float) + 63) & ~(size_t)63);
}

/* y [n, out] = x [n, in] times a tiled matrix. */
WIDEST_VECTORS
static void multiply(const float *tiles, int64_t in, int64_t out, const float *x, int64_t n,
                     float *y)
{
    for (int64_t tile = 0; tile < out / DEMO_TILE; tile++) {
        const float *weights = tiles + tile * in * DEMO_TILE;
        for (int64_t row = 0; row < n; row += ROWS_AT_ONCE) {
            float sum[ROWS_AT_ONCE][DEMO_TILE] = {{0}};
            const float *from[ROWS_AT_ONCE];
            for (int64_t r = 0; r < ROWS_AT_ONCE; r++) /* the last row again where rows end */
                from[r] = x + (row + r < n ? row + r : n - 1) * in;
            for (int64_t i = 0; i < in; i++) {
                for (int r = 0; r < ROWS_AT_ONCE; r++) {
                    for (int c = 0; c < DEMO_TILE; c++)
                        sum[r][c] += from[r][i] * weights[i * DEMO_TILE + c];
                }
            }
            for (int64_t r = 0; r < ROWS_AT_ONCE && row + r < n; r++)
                memcpy(y + (row + r) * out + tile * DEMO_TILE, sum[r], sizeof sum[r]);
        }
    }
}

/* Random weights that keep the size of what passes through. */
static void fill_random(uint64_t seed, uint64_t which, int64_t in, int64_t count, float *weights)
{
    uint64_t state = seed * 0x9e3779b97f4a7c15u ^ which * 0xd1342543de82ef95u;
    float unit = sqrtf(3.0f / (float)in) / 32768;
    for (int64_t i = 0; i < count; i += 4) {
        uint64_t bits = random_next(&state);
        for (int64_t k = 0; k < 4; k++)
            weights[i + k] = (float)(int16_t)(bits >> 16 * k) * unit;
    }
}

bool demo_expert_alloc(demo_expert *e)
{
    size_t count = (size_t)DEMO_HIDDEN * DEMO_WIDTH;
    e->gate = alloc_floats(count);
    e->up = alloc_floats(count);
    e->down = alloc_floats(count);
    return e->gate && e->up && e->down;
}

void demo_expert_free(demo_expert *e)
{
    free(e->gate);
    free(e->up);
    free(e->down);
}

void demo_expert_fill(const workload *w, int64_t id, demo_expert *e)
{
    int64_t count = (int64_t)DEMO_HIDDEN * DEMO_WIDTH;
    uint64_t which = 3 * (uint64_t)id + 1;
    fill_random(w->seed, which, DEMO_HIDDEN, count, e->gate);
    fill_random(w->seed, which + 1, DEMO_HIDDEN, count, e->up);
    fill_random(w->seed, which + 2, DEMO_WIDTH, count, e->down);
}

static float silu(float x)
{
    return x / (1 + expf(-x));
}

void demo_expert_apply(const demo_expert *e, const float *x, int64_t n, float *scratch, float *y)
{
    float *gate = scratch, *up = scratch + n * DEMO_WIDTH;
    multiply(e->gate, DEMO_HIDDEN, DEMO_WIDTH, x, n, gate);
    multiply(e->up, DEMO_HIDDEN, DEMO_WIDTH, x, n, up);
    for (int64_t i = 0; i < n * DEMO_WIDTH; i++)
        gate[i] = silu(gate[i]) * up[i];
    multiply(e->down, DEMO_WIDTH, DEMO_HIDDEN, gate, n, y);
}

/* ------------------------------------------------------------------ router */

int64_t demo_padded_experts(const workload *w)
{
    return (w->num_experts + DEMO_TILE - 1) / DEMO_TILE * DEMO_TILE;
}

float *demo_router_create(const workload *w)
{
    int64_t count = demo_padded_experts(w) * DEMO_HIDDEN;
    float *router = alloc_floats((size_t)count);
    if (router)
        fill_random(w->seed, 0, DEMO_HIDDEN, count, router);
    return router;
}

/* Some experts are liked better than others, as in trained models. */
static float bias(int64_t expert)
{
    uint64_t state = (uint64_t)expert;
    return (float)(random_next(&state) >> 40) * 0x1p-24f - 0.5f;
}

/* The best experts in descending order, the lower id first among equals. Takes them out of
   `logits`. */
static void choose(float *logits, int64_t num_experts, int32_t *ids, float *weights)
{
    float sum = 0;
    for (int k = 0; k < DEMO_TOPK; k++) {
        int32_t best = 0;
        for (int32_t e = 1; e < num_experts; e++)
            best = logits[e] > logits[best] ? e : best;
        ids[k] = best;
        weights[k] = 1 / (1 + expf(-logits[best]));
        sum += weights[k];
        logits[best] = -INFINITY;
    }
    for (int k = 0; k < DEMO_TOPK; k++)
        weights[k] /= sum;
}

void demo_route(const workload *w, const float *router, const uint16_t *x, int64_t n, float *values,
                float *logits, int32_t *ids, float *weights)
{
    int64_t padded = demo_padded_experts(w), num_experts = w->num_experts;
    for (int64_t i = 0; i < n * DEMO_HIDDEN; i++)
        values[i] = float_from_bf16(x[i]);
    multiply(router, DEMO_HIDDEN, padded, values, n, logits);
    for (int64_t t = 0; t < n; t++) {
        for (int64_t e = 0; e < num_experts; e++)
            logits[t * padded + e] += bias(e);
        choose(logits + t * padded, num_experts, ids + t * DEMO_TOPK, weights + t * DEMO_TOPK);
    }
}
