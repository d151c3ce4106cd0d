/* SPDX-License-Identifier: MIT */
#include "support/scenario.h"

static bool coin(struct rng *rng)
{
    return rng_below(rng, 2) != 0;
}

static ep_dtype float_dtype(struct rng *rng)
{
    static const ep_dtype dtypes[] = {EP_BF16, EP_BF16, EP_F16, EP_F32};
    return dtypes[rng_below(rng, 4)];
}

static void pick_shape(struct rng *rng, const struct scenario_limits *limits, struct scenario *sc)
{
    static const enum token_counts counts[] = {TOKENS_EQUAL,     TOKENS_EQUAL,  TOKENS_RANDOM,
                                               TOKENS_RANDOM,    TOKENS_RANDOM, TOKENS_SOME_NONE,
                                               TOKENS_SOME_NONE, TOKENS_NONE};
    sc->num_ranks =
        limits->num_ranks ? limits->num_ranks : (int)rng_range(rng, 1, limits->max_ranks);
    sc->max_tokens = rng_range(rng, 1, limits->max_tokens);
    sc->tokens = counts[rng_below(rng, 8)];
    sc->hidden = 8 * rng_range(rng, 1, limits->max_hidden / 8);
    if (rng_below(rng, 4) == 0)
        sc->hidden = 8; /* the shortest row */
    sc->table = (enum expert_table)rng_below(rng, 3);
    sc->num_experts = rng_range(rng, 1, limits->max_experts);
    if (sc->table == TABLE_BLOCKS) /* a multiple of the ranks */
        sc->num_experts = (sc->num_experts + sc->num_ranks - 1) / sc->num_ranks * sc->num_ranks;
    sc->topk = (int)rng_range(rng, 1, sc->num_experts < 8 ? sc->num_experts : 8);
    if (rng_below(rng, 8) == 0 && sc->num_experts <= 16)
        sc->topk = (int)sc->num_experts;
    sc->routing = (enum routing)rng_below(rng, ROUTING_COUNT);
}

static void pick_types(struct rng *rng, struct scenario *sc)
{
    sc->topk_dtype = coin(rng) ? EP_I32 : EP_I64;
    sc->y_dtype = float_dtype(rng);
    sc->scale = (ep_scale)rng_below(rng, 3);
    switch (rng_below(rng, 4)) {
    case 0:
        sc->dtype = EP_E4M3;
        if (sc->scale == EP_SCALE_POW2)
            sc->scale = EP_SCALE_F32;
        break;
    case 1:
        sc->wire = EP_WIRE_FP8;
        sc->dtype = float_dtype(rng);
        break;
    default:
        sc->dtype = float_dtype(rng);
        break;
    }
}

struct scenario scenario_random(struct rng *rng, const struct scenario_limits *limits,
                                const char *name)
{
    struct scenario sc = {.name = name, .seed = rng_next(rng)};
    pick_shape(rng, limits, &sc);
    pick_types(rng, &sc);
    sc.weights = coin(rng);
    sc.layout = coin(rng) ? EP_ROWS_BY_EXPERT : EP_ROWS_BY_TOKEN;
    sc.alignment = coin(rng) ? 1 : (int32_t)rng_range(rng, 1, 16);
    sc.worst = coin(rng) ? 0 : (int)rng_range(rng, 1, 9);
    sc.y_place = (enum y_place)rng_below(rng, 3);
    sc.num_bias = (int)rng_below(rng, 3);
    sc.carry = coin(rng);
    sc.allocator = rng_below(rng, 4) == 0;
    sc.strided = coin(rng);
    sc.async = coin(rng);
    return sc;
}
