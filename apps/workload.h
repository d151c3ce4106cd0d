/* SPDX-License-Identifier: MIT */
/*
 * What ranks of a benchmark send: random rows and a random or traced routing,
 * all of it a function of the seed, so that any rank can compute any other's.
 */
#ifndef APPS_WORKLOAD_H
#define APPS_WORKLOAD_H

#include "placement.h"
#include "trace.h"

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

typedef struct workload {
    uint64_t seed;
    int num_ranks;
    int64_t num_tokens; /* per rank */
    int64_t hidden;
    int topk;
    int64_t num_experts;        /* in equal blocks on the ranks; with a placement its slots */
    const trace *trace;         /* NULL: random routing */
    const placement *placement; /* NULL: the router chooses among num_experts */
} workload;

/* Routing of one rank: ids and weights [num_tokens, topk]. Random: topk different experts per
   token, each as likely, weights that sum to 1. False when out of memory. */
bool workload_routing(const workload *w, int rank, int32_t *ids, float *weights);

/* One row of a rank, BF16 [hidden]: random values whose size varies from block to block. */
void workload_row(const workload *w, int rank, int64_t token, uint16_t *row);

/* splitmix64 (Steele, Lea and Flood, 2014) */
static inline uint64_t random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static inline float float_from_bf16(uint16_t code)
{
    uint32_t bits = (uint32_t)code << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* To nearest even; `value` is no NaN. */
static inline uint16_t bf16_from_float(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
