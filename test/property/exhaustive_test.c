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

#include <stdlib.h>

enum { CHUNK = 400 };

/* What the routing does not settle changes with the world's number. */
static struct scenario scenario_of(const struct space *s, int64_t number, const int64_t *trace,
                                   ep_row_layout layout)
{
    return (struct scenario){.name = "small world",
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

static int64_t walk(const struct space *s)
{
    struct choices all = choices_of(s);
    int64_t total = worlds_of(s, &all), done = 0, cells = s->ranks * s->tokens * s->topk;
    int64_t step = world_step(total, budget_of(s), all.count);
    int64_t number = (int64_t)rng_env_seed(1) % step;
    struct scenario *list = test_zeros(2 * CHUNK, sizeof *list);
    int64_t *traces = test_zeros(CHUNK * cells, sizeof *traces);
    while (number < total) {
        int count = 0;
        for (; count < CHUNK && number < total; count++, number += step) {
            int64_t *trace = traces + count * cells;
            write_world(s, &all, number, trace);
            list[2 * count] = scenario_of(s, number, trace, EP_ROWS_BY_TOKEN);
            list[2 * count + 1] = scenario_of(s, number, trace, EP_ROWS_BY_EXPERT);
        }
        if (world_run("threads", list, 2 * count, SCENARIO_COMBINE | SCENARIO_DISPATCH_BACKWARD))
            fail_msg("R=%d T=%d K=%d E=%d: EP_TEST_SEED=%llu", s->ranks, s->tokens, s->topk,
                     (int)s->experts, (unsigned long long)rng_env_seed(1));
        done += count;
    }
    print_message("R=%d T=%d K=%d E=%d: %lld of %lld worlds\n", s->ranks, s->tokens, s->topk,
                  (int)s->experts, (long long)done, (long long)total);
    free(list);
    free(traces);
    free(all.rows);
    return done;
}

static void all_small_worlds(void **state)
{
    (void)state;
    struct space s;
    for (s.ranks = 1; s.ranks <= 3; s.ranks++)
        for (s.experts = 1; s.experts <= 4; s.experts++)
            for (s.topk = 1; s.topk <= s.experts && s.topk <= 3; s.topk++)
                for (s.tokens = 1; s.tokens <= 3; s.tokens++)
                    walk(&s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(all_small_worlds)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
