/* SPDX-License-Identifier: MIT */
/*
 * The layer of the demo: a sigmoid router that picks DEMO_TOPK experts, and
 * SwiGLU experts. Rows have DeepSeek-V3's size, experts are narrower than its
 * 2048 so that two cores compute the layer in seconds. Weights are random.
 */
#ifndef APPS_DEMO_MODEL_H
#define APPS_DEMO_MODEL_H

#include "workload.h"

#define DEMO_HIDDEN 7168
#define DEMO_TOPK 8
#define DEMO_WIDTH 64 /* of an expert */

/* Matrices [in, out] are stored in tiles of DEMO_TILE columns: [out / DEMO_TILE][in][DEMO_TILE]. */
#define DEMO_TILE 16

typedef struct demo_expert {
    float *gate, *up, *down; /* [DEMO_HIDDEN, DEMO_WIDTH] twice, [DEMO_WIDTH, DEMO_HIDDEN] */
} demo_expert;

/* Memory for one expert's weights; false when there is none. */
bool demo_expert_alloc(demo_expert *expert);
void demo_expert_free(demo_expert *expert);
void demo_expert_fill(const workload *w, int64_t id, demo_expert *expert);

/* Router weights [DEMO_HIDDEN, experts rounded up to a tile]; NULL when out of memory. */
float *demo_router_create(const workload *w);

/* Routes rows x [n, DEMO_HIDDEN] BF16: ids and weights [n, DEMO_TOPK]. `logits` is scratch, [n,
   experts rounded up to a tile]; `values` likewise, [n, DEMO_HIDDEN]. */
void demo_route(const workload *w, const float *router, const uint16_t *x, int64_t n, float *values,
                float *logits, int32_t *ids, float *weights);

/* y [n, DEMO_HIDDEN] = expert(x [n, DEMO_HIDDEN]); `scratch` holds 2 * n * DEMO_WIDTH. */
void demo_expert_apply(const demo_expert *expert, const float *x, int64_t n, float *scratch,
                       float *y);

int64_t demo_padded_experts(const workload *w);

#endif
