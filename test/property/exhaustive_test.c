/* SPDX-License-Identifier: MIT */
/*
 * Small worlds, all of them: every routing of R ranks with T tokens each to K of
 * E experts, -1 included, in both row layouts. A space above the budget (K = 3
 * has up to 6e16 worlds) is sampled evenly; EP_EXHAUSTIVE=N is the budget of a
 * longer run.
 * ctest-timeout: 600
 */
#include "support/ranks.h"
#include "support/sanitize.h"
#include "support/small_worlds.h"
#include "support/tensors.h"
#include "support/test.h"
#include "support/world.h"

#include <stdio.h>
#include <stdlib.h>

enum { MOST_RANKS = 3, MOST_EXPERTS = 4, MOST_TOPK = 3, MOST_TOKENS = 3 };
enum { CHUNK = 800, CELLS = MOST_RANKS * MOST_TOKENS * MOST_TOPK, SPACES = 100 };

/* Worlds to be run together, of one number of ranks; starting ranks takes longer than a world. */
static struct scenario list[CHUNK];
static int64_t traces[CHUNK / 2][CELLS];
static char names[SPACES][32];
static int count, num_names;

/* What the routing does not settle changes with the world's number. */
static struct scenario scenario_of(const struct space *s, const char *name, int64_t number,
                                   const int64_t *trace, ep_row_layout layout)
{
    return (struct scenario){.name = name,
                             .seed = (uint64_t)number,
                             .num_ranks = s->ranks,
                             .max_tokens = s->tokens,
                             .tokens = number % 4 == 3 ? TOKENS_RANDOM : TOKENS_EQUAL,
                             .hidden = 8,
                             .topk = s->topk,
                             .num_experts = s->experts,
                             .table = s->experts % s->ranks ? TABLE_SHUFFLED : TABLE_BLOCKS,
                             .weights = number % 2,
                             .layout = layout,
                             .alignment = number % 3 == 2 ? 4 : 1,
                             .num_bias = (int)(number % 3),
                             .worst = number % 7 == 6 ? 2 : 0,
                             .trace = trace};
}

/* Worlds per space; K = 1 fits whole up to 3 ranks with 2 tokens and 4 experts. */
static int64_t budget_of(const struct space *s)
{
    int64_t usual = TEST_SANITIZED ? 120 : s->topk == 1 ? 16000 : 800;
    return rng_env_number("EP_EXHAUSTIVE", usual);
}

static void run_list(void)
{
    if (count &&
        world_run("threads", list, count, SCENARIO_COMBINE | SCENARIO_DISPATCH_BACKWARD) != 0)
        fail_msg("EP_TEST_SEED=%llu", (unsigned long long)rng_env_seed(1));
    count = 0;
}

static void walk(const struct space *s)
{
    struct choices all = choices_of(s);
    int64_t total = worlds_of(s, &all), done = 0;
    int64_t step = world_step(total, budget_of(s), all.count);
    char *name = names[num_names++ % SPACES];
    snprintf(name, sizeof names[0], "R=%d T=%d K=%d E=%d", s->ranks, s->tokens, s->topk,
             (int)s->experts);
    for (int64_t number = (int64_t)rng_env_seed(1) % step; number < total; number += step, done++) {
        int64_t *trace = traces[count / 2];
        write_world(s, &all, number, trace);
        list[count++] = scenario_of(s, name, number, trace, EP_ROWS_BY_TOKEN);
        list[count++] = scenario_of(s, name, number, trace, EP_ROWS_BY_EXPERT);
        if (count == CHUNK)
            run_list();
    }
    print_message("%s: %lld of %lld worlds\n", name, (long long)done, (long long)total);
    free(all.rows);
}

static void all_small_worlds(void **state)
{
    (void)state;
    struct space s;
    for (s.ranks = 1; s.ranks <= MOST_RANKS; s.ranks++) {
        for (s.experts = 1; s.experts <= MOST_EXPERTS; s.experts++)
            for (s.topk = 1; s.topk <= s.experts && s.topk <= MOST_TOPK; s.topk++)
                for (s.tokens = 1; s.tokens <= MOST_TOKENS; s.tokens++)
                    walk(&s);
        run_list();
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(all_small_worlds)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
