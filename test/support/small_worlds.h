/* SPDX-License-Identifier: MIT */
/*
 * Small worlds, numbered: every routing of R ranks with T tokens each to K of E
 * experts, -1 included. A space above a budget is sampled evenly.
 */
#ifndef EP_TEST_SMALL_WORLDS_H
#define EP_TEST_SMALL_WORLDS_H

#include <stdint.h>

struct space {
    int ranks, tokens, topk;
    int64_t experts;
};

/* Every way to fill one token's K places with distinct experts or -1. */
struct choices {
    int64_t *rows; /* [count, K]; free() it */
    int64_t count;
};

struct choices choices_of(const struct space *s);

/* How many worlds there are. */
int64_t worlds_of(const struct space *s, const struct choices *all);

/* A step through the space that takes at most `budget` worlds and shares no factor with a token's
   choices, so that every place of every token takes all its values. */
int64_t world_step(int64_t total, int64_t budget, int64_t choices);

/* ids [R * T, K] of one world. */
void write_world(const struct space *s, const struct choices *all, int64_t number, int64_t *ids);

#endif
