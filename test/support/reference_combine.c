/* SPDX-License-Identifier: MIT */
#include "support/formats.h"
#include "support/reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A row at the rank that received it. */
struct place {
    int rank;
    int64_t row;
};

/*
 * The rows of each token of `rank` in the order in which they are added:
 * ascending rank, or by expert in top-k order. places [T, most], rank -1: none.
 */
static struct place *find_places(const struct ref_world *world, const struct ref_recv *recv,
                                 int rank, int64_t num_tokens, int *most)
{
    bool by_expert = world->layout == EP_ROWS_BY_EXPERT;
    *most = by_expert ? world->topk : world->num_ranks;
    struct place *places = malloc((size_t)(num_tokens * *most + 1) * sizeof *places);
    if (!places)
        abort();
    for (int64_t i = 0; i < num_tokens * *most; i++)
        places[i] = (struct place){-1, -1};
    for (int r = 0; r < world->num_ranks; r++)
        for (int64_t i = 0; i < recv[r].rows; i++) {
            const struct ref_row *row = recv[r].row + i;
            if (row->source == rank)
                places[row->token * *most + (by_expert ? row->k : r)] = (struct place){r, i};
        }
    return places;
}

static void add(float *sum, bool *any, float term)
{
    *sum = *any ? *sum + term : term;
    *any = true;
}

static float element(const struct ref_combine *c, const uint8_t *array, int64_t i)
{
    return (float)format_load(c->dtype, array, i);
}

/* Element h of token t. */
static float combine_element(const struct ref_world *world, const struct ref_combine *c,
                             const struct place *places, int most, int64_t t, int64_t h)
{
    float sum = 0;
    bool any = false;
    for (int j = 0; j < most; j++) {
        const struct place *p = places + t * most + j;
        if (p->rank < 0)
            continue;
        float term = element(c, c->y[p->rank], p->row * world->hidden + h);
        if (c->weights) {
            sum = fmaf(c->weights[t * world->topk + j], term, sum);
            any = true;
        } else {
            add(&sum, &any, term);
        }
    }
    for (int b = 0; b < 2; b++)
        if (c->bias[b])
            add(&sum, &any, element(c, c->bias[b], t * world->hidden + h));
    return sum;
}

/* What travels along: place k of a token, from the rows that have it. */
static float carry_element(const struct ref_world *world, const struct ref_recv *recv,
                           const struct ref_combine *c, const struct place *places, int most,
                           int64_t t, int k)
{
    float sum = 0;
    bool any = false;
    for (int j = 0; j < most; j++) {
        const struct place *p = places + t * most + j;
        if (p->rank < 0 || (world->layout == EP_ROWS_BY_EXPERT && j != k))
            continue;
        int columns = recv[p->rank].columns;
        add(&sum, &any, c->carry[p->rank][p->row * columns + (columns > 1 ? k : 0)]);
    }
    return sum;
}

void ref_combine(const struct ref_world *world, const struct ref_recv *recv, int rank,
                 int64_t num_tokens, const struct ref_combine *c, uint8_t *out, float *out_carry)
{
    int most;
    struct place *places = find_places(world, recv, rank, num_tokens, &most);
    for (int64_t t = 0; t < num_tokens; t++) {
        for (int64_t h = 0; h < world->hidden; h++)
            format_store(c->dtype, out, t * world->hidden + h,
                         combine_element(world, c, places, most, t, h));
        for (int k = 0; c->carry && k < world->topk; k++)
            out_carry[t * world->topk + k] = carry_element(world, recv, c, places, most, t, k);
    }
    free(places);
}

void ref_combine_backward(const struct ref_world *world, const struct ref_recv *recv, int rank,
                          ep_dtype dtype, const uint8_t *const *grad_out,
                          const float *const *weights, uint8_t *grad)
{
    size_t row_bytes = (size_t)world->hidden * ep_dtype_size(dtype);
    for (int64_t i = 0; i < recv[rank].rows; i++) {
        const struct ref_row *row = recv[rank].row + i;
        if (row->source < 0)
            continue;
        const uint8_t *from = grad_out[row->source] + (size_t)row->token * row_bytes;
        uint8_t *to = grad + (size_t)i * row_bytes;
        memcpy(to, from, row_bytes);
        if (world->layout != EP_ROWS_BY_EXPERT || !weights)
            continue;
        float w = weights[row->source][row->token * world->topk + row->k];
        for (int64_t h = 0; h < world->hidden; h++)
            format_store(dtype, to, h, w * (float)format_load(dtype, from, h));
    }
}

static float dot(ep_dtype dtype, const uint8_t *a, int64_t a_first, const uint8_t *b,
                 int64_t b_first, int64_t n)
{
    float lane[16] = {0};
    for (int64_t i = 0; i < n; i++)
        lane[i % 16] = fmaf((float)format_load(dtype, a, a_first + i),
                            (float)format_load(dtype, b, b_first + i), lane[i % 16]);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            lane[i] += lane[i + half];
    return lane[0];
}

void ref_weight_gradients(const struct ref_world *world, const struct ref_recv *recv, int rank,
                          int64_t num_tokens, ep_dtype dtype, const uint8_t *grad_out,
                          const uint8_t *const *y, float *out)
{
    int most;
    struct place *places = find_places(world, recv, rank, num_tokens, &most);
    for (int64_t t = 0; t < num_tokens; t++)
        for (int k = 0; k < world->topk; k++) {
            const struct place *p = places + t * most + k;
            out[t * world->topk + k] = p->rank < 0
                                           ? 0
                                           : dot(dtype, grad_out, t * world->hidden, y[p->rank],
                                                 p->row * world->hidden, world->hidden);
        }
    free(places);
}
