/* SPDX-License-Identifier: MIT */
/* Seeded random numbers and routings for tests. */
#ifndef EP_TEST_RANDOM_H
#define EP_TEST_RANDOM_H

#include <stdint.h>

/* xoshiro256**; the same seed gives the same numbers everywhere. */
struct rng {
    uint64_t s[4];
};

void rng_seed(struct rng *rng, uint64_t seed);
uint64_t rng_next(struct rng *rng);
uint64_t rng_below(struct rng *rng, uint64_t n);                 /* 0..n-1 */
int64_t rng_range(struct rng *rng, int64_t first, int64_t last); /* both included */
double rng_unit(struct rng *rng);                                /* [0, 1) */

/* EP_TEST_SEED of the environment, else `otherwise`: repeats a failure that a test printed. */
uint64_t rng_env_seed(uint64_t otherwise);
/* An integer of the environment, else `otherwise`. */
int64_t rng_env_number(const char *name, int64_t otherwise);

/* How a generator picks the K experts of a token. No row names an expert twice. */
enum routing {
    ROUTING_UNIFORM,
    ROUTING_SKEWED,   /* low ids much more often */
    ROUTING_GROUPED,  /* experts of few neighbouring blocks, as group-limited gates do */
    ROUTING_SPARSE,   /* uniform, about a third of the places -1 */
    ROUTING_NOWHERE,  /* all -1 */
    ROUTING_ONE_RANK, /* every token to the experts of the last block first */
    ROUTING_COUNT
};

/* Fills idx [num_tokens, topk] with ids 0..num_experts-1 or -1. topk <= num_experts. */
void routing_fill(struct rng *rng, enum routing kind, int64_t num_tokens, int topk,
                  int64_t num_experts, int num_blocks, int64_t *idx);

#endif
