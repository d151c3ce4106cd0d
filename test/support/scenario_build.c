/* SPDX-License-Identifier: MIT */
#include "support/formats.h"
#include "support/scenario.h"
#include "support/tensors.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static struct scenario with_defaults(struct scenario sc)
{
    if (!sc.dtype)
        sc.dtype = EP_BF16;
    if (!sc.topk_dtype)
        sc.topk_dtype = EP_I64;
    if (!sc.y_dtype)
        sc.y_dtype = EP_BF16;
    if (!sc.alignment)
        sc.alignment = 1;
    return sc;
}

/* Mostly moderate, some tiny or large, a few exact zeros: sums that need the right order. */
static double random_value(struct rng *rng)
{
    uint64_t kind = rng_below(rng, 64);
    if (kind == 0)
        return 0;
    double magnitude = ldexp(rng_unit(rng) * 2 - 1, (int)rng_range(rng, -3, 3));
    return kind == 1 ? ldexp(magnitude, (int)rng_range(rng, -20, 12)) : magnitude;
}

static uint8_t *random_floats(struct rng *rng, ep_dtype dtype, int64_t n)
{
    uint8_t *values = test_zeros(n, ep_dtype_size(dtype));
    for (int64_t i = 0; i < n; i++)
        format_store(dtype, values, i, random_value(rng));
    return values;
}

static uint8_t *random_bytes(struct rng *rng, int64_t n)
{
    uint8_t *bytes = test_zeros(n + 8, 1);
    for (int64_t i = 0; i < n; i += 8) {
        uint64_t word = rng_next(rng);
        memcpy(bytes + i, &word, 8);
    }
    return bytes;
}

static float *random_weights(struct rng *rng, int64_t n)
{
    float *weights = test_zeros(n, sizeof *weights);
    for (int64_t i = 0; i < n; i++)
        weights[i] = (float)random_value(rng);
    return weights;
}

/* Rows that travel as they are may hold any bits; those to be quantised are numbers. */
static void make_rows(struct rng *rng, const struct ref_world *world, struct ref_tokens *tokens)
{
    int64_t elements = tokens->num_tokens * world->hidden;
    int64_t words = tokens->num_tokens * format_scale_words(world->scale, world->hidden);
    if (world->wire == EP_WIRE_FP8)
        tokens->x = random_floats(rng, world->dtype, elements);
    else
        tokens->x = random_bytes(rng, elements * (int64_t)ep_dtype_size(world->dtype));
    if (world->dtype == EP_E4M3)
        tokens->scales = random_bytes(rng, words * 4);
}

static int64_t count_tokens(struct rng *rng, const struct scenario *sc, int rank)
{
    switch (sc->tokens) {
    case TOKENS_RANDOM:
        return rng_range(rng, 0, sc->max_tokens);
    case TOKENS_SOME_NONE:
        return rank % 2 ? 0 : sc->max_tokens;
    case TOKENS_NONE:
        return 0;
    default:
        return sc->max_tokens;
    }
}

static void make_table(struct rng *rng, struct scenario_data *data)
{
    const struct scenario *sc = &data->sc;
    int64_t experts = sc->num_experts, block = experts / sc->num_ranks;
    data->table = test_zeros(experts, sizeof *data->table);
    for (int64_t e = 0; e < experts; e++)
        data->table[e] = sc->table == TABLE_ALL_ON_LAST ? sc->num_ranks - 1
                         : sc->table == TABLE_BLOCKS    ? (int32_t)(e / block)
                                                        : (int32_t)(e % sc->num_ranks);
    for (int64_t e = experts - 1; sc->table == TABLE_SHUFFLED && e > 0; e--) {
        int64_t other = rng_range(rng, 0, e);
        int32_t swap = data->table[e];
        data->table[e] = data->table[other];
        data->table[other] = swap;
    }
}

static void make_world(struct rng *rng, struct scenario_data *data)
{
    const struct scenario *sc = &data->sc;
    make_table(rng, data);
    data->world = (struct ref_world){.num_ranks = sc->num_ranks,
                                     .hidden = sc->hidden,
                                     .topk = sc->topk,
                                     .num_experts = sc->num_experts,
                                     .expert_rank = data->table,
                                     .dtype = sc->dtype,
                                     .wire = sc->wire,
                                     .scale = sc->scale,
                                     .layout = sc->layout,
                                     .expert_alignment = sc->alignment};
}

static void make_tokens(struct rng *rng, struct scenario_data *data, int rank)
{
    const struct scenario *sc = &data->sc;
    struct ref_tokens *tokens = &data->rank[rank].tokens, *second = &data->rank[rank].second;
    int64_t places = (tokens->num_tokens = count_tokens(rng, sc, rank)) * sc->topk;
    tokens->topk_idx = test_zeros(places, sizeof *tokens->topk_idx);
    if (sc->trace)
        memcpy(tokens->topk_idx, sc->trace + rank * sc->max_tokens * sc->topk,
               (size_t)places * sizeof *sc->trace);
    else
        routing_fill(rng, sc->routing, tokens->num_tokens, sc->topk, sc->num_experts, sc->num_ranks,
                     tokens->topk_idx);
    if (sc->weights)
        tokens->topk_weights = random_weights(rng, places);
    make_rows(rng, &data->world, tokens);
    *second = *tokens;
    second->topk_weights = NULL;
    make_rows(rng, &data->world, second);
}

static void receive(struct scenario_data *data)
{
    for (int pass = 0; pass < 2; pass++) {
        int64_t most = 0;
        for (int r = 0; r < data->sc.num_ranks; r++) {
            ref_recv_free(&data->rank[r].recv);
            struct ref_tokens *all = test_zeros(data->sc.num_ranks, sizeof *all);
            for (int s = 0; s < data->sc.num_ranks; s++)
                all[s] = data->rank[s].tokens;
            ref_dispatch(&data->world, all, r, &data->rank[r].recv);
            for (int s = 0; s < data->sc.num_ranks; s++)
                all[s] = data->rank[s].second;
            if (pass == 1 || !data->sc.worst)
                ref_dispatch(&data->world, all, r, &data->rank[r].second_recv);
            free(all);
            if (data->rank[r].recv.rows > most)
                most = data->rank[r].recv.rows;
        }
        if (!data->sc.worst || pass == 1)
            return;
        /* The bound follows from the counts: 0 rows anywhere still need a bound of 1. */
        int64_t bound = most + data->sc.worst - 1;
        data->world.num_worst_tokens = bound > 0 ? bound : 1;
    }
}

static uint8_t *rows_with_padding(struct rng *rng, const struct scenario_data *data,
                                  const struct ref_recv *recv)
{
    int64_t hidden = data->sc.hidden;
    uint8_t *y = random_floats(rng, data->sc.y_dtype, recv->rows * hidden);
    for (int64_t i = 0; i < recv->rows; i++)
        for (int64_t h = 0; recv->row[i].source < 0 && h < hidden; h++)
            format_store(data->sc.y_dtype, y, i * hidden + h, (double)NAN);
    return y;
}

static void make_outputs(struct rng *rng, struct scenario_data *data, int rank)
{
    struct scenario_rank *me = &data->rank[rank];
    const struct scenario *sc = &data->sc;
    int64_t tokens = me->tokens.num_tokens, places = tokens * sc->topk;
    int64_t cells = me->recv.rows * me->recv.columns;
    me->y = rows_with_padding(rng, data, &me->recv);
    if (sc->carry)
        me->carry = random_weights(rng, sc->layout == EP_ROWS_BY_EXPERT ? places : cells);
    for (int b = 0; b < sc->num_bias; b++)
        me->bias[b] = random_floats(rng, sc->y_dtype, tokens * sc->hidden);
    me->row_grads = random_weights(rng, cells);
    for (int64_t i = 0; i < cells; i++)
        if (me->recv.topk_idx[i] < 0)
            me->row_grads[i] = 0;
    me->grad_out = random_floats(rng, sc->y_dtype, tokens * sc->hidden);
}

/* What combine multiplies rows with: given, else those of dispatch, else nothing. */
static const float *combine_weights(const struct scenario_data *data, int rank)
{
    const struct scenario_rank *me = &data->rank[rank];
    if (data->sc.layout != EP_ROWS_BY_EXPERT)
        return NULL;
    return me->carry ? me->carry : me->tokens.topk_weights;
}

/* Pointers to one thing of every rank, as the reference takes them. */
struct lists {
    const uint8_t **y, **grad_out;
    const float **carry, **row_grads, **weights;
    struct ref_recv *recv;
};

static struct lists make_lists(const struct scenario_data *data)
{
    int ranks = data->sc.num_ranks;
    struct lists all = {test_zeros(ranks, sizeof(void *)), test_zeros(ranks, sizeof(void *)),
                        test_zeros(ranks, sizeof(void *)), test_zeros(ranks, sizeof(void *)),
                        test_zeros(ranks, sizeof(void *)), test_zeros(ranks, sizeof *all.recv)};
    for (int r = 0; r < ranks; r++) {
        const struct scenario_rank *each = &data->rank[r];
        all.y[r] = each->y;
        all.grad_out[r] = each->grad_out;
        all.carry[r] = each->carry;
        all.row_grads[r] = each->row_grads;
        all.weights[r] = combine_weights(data, r);
        all.recv[r] = each->recv;
    }
    return all;
}

static void free_lists(struct lists *all)
{
    free(all->y);
    free(all->grad_out);
    free(all->carry);
    free(all->row_grads);
    free(all->weights);
    free(all->recv);
}

static void expect(struct scenario_data *data, int rank, const struct lists *all)
{
    struct scenario_rank *me = &data->rank[rank];
    const struct scenario *sc = &data->sc;
    const struct ref_world *world = &data->world;
    bool by_expert = sc->layout == EP_ROWS_BY_EXPERT;
    int64_t tokens = me->tokens.num_tokens;
    size_t row_bytes = (size_t)sc->hidden * ep_dtype_size(sc->y_dtype);
    struct ref_combine forward = {.dtype = sc->y_dtype,
                                  .y = all->y,
                                  .carry = sc->carry && !by_expert ? all->carry : NULL,
                                  .weights = combine_weights(data, rank),
                                  .bias = {me->bias[0], me->bias[1]}};
    struct ref_combine backward = {.dtype = sc->y_dtype, .y = all->y, .carry = all->row_grads};
    me->out = test_zeros(tokens, row_bytes);
    me->out_carry = test_zeros(tokens * sc->topk, sizeof(float));
    ref_combine(world, all->recv, rank, tokens, &forward, me->out, me->out_carry);
    me->grad_x = test_zeros(tokens, row_bytes);
    me->grad_weights = test_zeros(tokens * sc->topk, sizeof(float));
    ref_combine(world, all->recv, rank, tokens, &backward, me->grad_x, me->grad_weights);
    me->grad_rows = test_zeros(me->recv.rows, row_bytes);
    ref_combine_backward(world, all->recv, rank, sc->y_dtype, all->grad_out,
                         by_expert && all->weights[rank] ? all->weights : NULL, me->grad_rows);
    me->dots = test_zeros(tokens * sc->topk, sizeof(float));
    if (by_expert)
        ref_weight_gradients(world, all->recv, rank, tokens, sc->y_dtype, me->grad_out, all->y,
                             me->dots);
}

struct scenario_data *scenario_build(const struct scenario *scenario)
{
    struct scenario_data *data = test_zeros(1, sizeof *data);
    struct rng rng;
    rng_seed(&rng, scenario->seed);
    data->sc = with_defaults(*scenario);
    data->rank = test_zeros(data->sc.num_ranks, sizeof *data->rank);
    make_world(&rng, data);
    for (int r = 0; r < data->sc.num_ranks; r++)
        make_tokens(&rng, data, r);
    receive(data);
    for (int r = 0; r < data->sc.num_ranks; r++)
        make_outputs(&rng, data, r);
    struct lists all = make_lists(data);
    for (int r = 0; r < data->sc.num_ranks; r++)
        expect(data, r, &all);
    free_lists(&all);
    return data;
}

void scenario_free(struct scenario_data *data)
{
    for (int r = 0; r < data->sc.num_ranks; r++) {
        struct scenario_rank *each = &data->rank[r];
        void *memory[] = {each->tokens.x,  each->tokens.scales, each->tokens.topk_idx,
                          each->second.x,  each->second.scales, each->tokens.topk_weights,
                          each->y,         each->carry,         each->bias[0],
                          each->bias[1],   each->out,           each->out_carry,
                          each->row_grads, each->grad_x,        each->grad_weights,
                          each->grad_out,  each->grad_rows,     each->dots};
        for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
            free(memory[i]);
        ref_recv_free(&each->recv);
        ref_recv_free(&each->second_recv);
    }
    free(data->rank);
    free(data->table);
    free(data);
}
