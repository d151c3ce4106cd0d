/* SPDX-License-Identifier: MIT */
#include "support/random.h"

#include <stdbool.h>
#include <stdlib.h>

static uint64_t rotate(uint64_t x, int bits)
{
    return x << bits | x >> (64 - bits);
}

void rng_seed(struct rng *rng, uint64_t seed)
{
    for (int i = 0; i < 4; i++) { /* splitmix64 */
        uint64_t z = seed += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        rng->s[i] = z ^ z >> 31;
    }
}

uint64_t rng_next(struct rng *rng)
{
    uint64_t *s = rng->s, result = rotate(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate(s[3], 45);
    return result;
}

uint64_t rng_below(struct rng *rng, uint64_t n)
{
    return n ? rng_next(rng) % n : 0; /* the bias of % is of no matter to a test */
}

int64_t rng_range(struct rng *rng, int64_t first, int64_t last)
{
    return first + (int64_t)rng_below(rng, (uint64_t)(last - first) + 1);
}

double rng_unit(struct rng *rng)
{
    return (double)(rng_next(rng) >> 11) * 0x1p-53;
}

int64_t rng_env_number(const char *name, int64_t otherwise)
{
    const char *text = getenv(name);
    return text && *text ? strtoll(text, NULL, 0) : otherwise;
}

uint64_t rng_env_seed(uint64_t otherwise)
{
    return (uint64_t)rng_env_number("EP_TEST_SEED", (int64_t)otherwise);
}

static int64_t pick_expert(struct rng *rng, enum routing kind, int64_t num_experts, int num_blocks,
                           int64_t first_block)
{
    double u = rng_unit(rng);
    int64_t per_block = num_experts / num_blocks > 0 ? num_experts / num_blocks : 1;
    int64_t id;
    switch (kind) {
    case ROUTING_SKEWED:
        id = (int64_t)(u * u * u * (double)num_experts);
        break;
    case ROUTING_GROUPED:
        id = first_block * per_block + (int64_t)(u * 2 * (double)per_block);
        break;
    case ROUTING_ONE_RANK:
        id = num_experts - 1 - (int64_t)(u * (double)per_block);
        break;
    default:
        id = (int64_t)(u * (double)num_experts);
        break;
    }
    return id % num_experts;
}

static bool row_has(const int64_t *row, int n, int64_t id)
{
    for (int i = 0; i < n; i++)
        if (row[i] == id)
            return true;
    return false;
}

void routing_fill(struct rng *rng, enum routing kind, int64_t num_tokens, int topk,
                  int64_t num_experts, int num_blocks, int64_t *idx)
{
    for (int64_t t = 0; t < num_tokens; t++) {
        int64_t *row = idx + t * topk, block = (int64_t)rng_below(rng, (uint64_t)num_blocks);
        for (int k = 0; k < topk; k++) {
            if (kind == ROUTING_NOWHERE || (kind == ROUTING_SPARSE && rng_below(rng, 3) == 0)) {
                row[k] = -1;
                continue;
            }
            int64_t id = pick_expert(rng, kind, num_experts, num_blocks, block);
            while (row_has(row, k, id)) /* the next free id: ends since topk <= num_experts */
                id = (id + 1) % num_experts;
            row[k] = id;
        }
    }
}
