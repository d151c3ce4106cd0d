/* SPDX-License-Identifier: MIT */
/*
 * Random worlds with every mode mixed, up to 16 ranks, and real shapes and
 * routings. EP_TEST_SEED and EP_SEEDED_WORLDS vary and lengthen the run.
 * ctest-timeout: 600
 */
#include "support/ranks.h"
#include "support/sanitize.h"
#include "support/tensors.h"
#include "support/test.h"
#include "support/trace.h"
#include "support/world.h"

#include <stdio.h>
#include <stdlib.h>

static void random_worlds(void **state)
{
    (void)state;
    enum { GROUPS = TEST_SANITIZED ? 3 : 6, EACH = 10 };
    struct rng rng;
    rng_seed(&rng, rng_env_seed(1));
    for (int64_t group = 0; group < rng_env_number("EP_SEEDED_WORLDS", GROUPS); group++) {
        struct scenario list[EACH];
        struct scenario_limits limits = {.max_tokens = 33, .max_hidden = 600, .max_experts = 40};
        limits.num_ranks = (int)rng_range(&rng, 1, 16);
        int num_threads = (int)rng_range(&rng, 0, 2);
        for (int i = 0; i < EACH; i++) {
            list[i] = scenario_random(&rng, &limits, "random world");
            list[i].num_threads = num_threads;
        }
        assert_int_equal(world_run(NULL, list, EACH, SCENARIO_ALL), 0);
    }
}

/* Shapes in use, and some that other implementations refuse. */
static void real_shapes(void **state)
{
    (void)state;
    const struct scenario list[] = {
        {"DeepSeek-V3", 1, .num_ranks = 8, .max_tokens = 11, .hidden = 7168, .topk = 8,
         .num_experts = 256, .routing = ROUTING_GROUPED, .weights = true, .y_place = Y_ALLOC},
        {"DeepSeek-V3, fp8", 2, .num_ranks = 8, .max_tokens = 11, .tokens = TOKENS_RANDOM,
         .hidden = 7168, .topk = 8, .num_experts = 256, .weights = true, .wire = EP_WIRE_FP8},
        {"DeepSeek-V3, by expert", 3, .num_ranks = 8, .max_tokens = 7, .hidden = 7168, .topk = 8,
         .num_experts = 256, .weights = true, .layout = EP_ROWS_BY_EXPERT, .alignment = 128,
         .wire = EP_WIRE_FP8, .scale = EP_SCALE_UE8M0},
        {"16 bytes a row, 16 ranks", 4, .num_ranks = 16, .max_tokens = 5, .tokens = TOKENS_RANDOM,
         .hidden = 8, .topk = 6, .num_experts = 64, .weights = true},
        {"every expert of 16 ranks", 5, .num_ranks = 16, .max_tokens = 3, .hidden = 136, .topk = 16,
         .num_experts = 16, .weights = true},
        {"1000 experts in a table", 6, .num_ranks = 5, .max_tokens = 40, .hidden = 24, .topk = 9,
         .num_experts = 1000, .table = TABLE_SHUFFLED, .weights = true},
    };
    assert_int_equal(world_run(NULL, list, sizeof list / sizeof *list, SCENARIO_ALL), 0);
}

/* Token after token of a text through one layer's gate; skipped without the data. */
static void real_routing(const char *corpus)
{
    enum { RANKS = 8, TOKENS = 24, LAYERS = 26 };
    static char names[LAYERS][64];
    struct scenario list[LAYERS] = {{0}};
    int64_t *traces[LAYERS] = {NULL};
    int count = 0;
    for (int layer = 1; layer <= LAYERS; layer += TEST_SANITIZED ? 7 : 1) {
        int64_t *ids = trace_read(corpus, layer, RANKS * TOKENS);
        if (!ids)
            continue;
        snprintf(names[count], sizeof names[count], "%s, layer %d", corpus, layer);
        list[count] = (struct scenario){.name = names[count],
                                        .seed = (uint64_t)layer,
                                        .num_ranks = RANKS,
                                        .max_tokens = TOKENS,
                                        .hidden = 64,
                                        .topk = TRACE_TOPK,
                                        .num_experts = TRACE_EXPERTS,
                                        .weights = true,
                                        .layout = (ep_row_layout)(layer % 2),
                                        .trace = ids};
        traces[count++] = ids;
    }
    if (count == 0)
        skip();
    assert_int_equal(world_run(NULL, list, count, SCENARIO_ALL), 0);
    for (int i = 0; i < count; i++)
        free(traces[i]);
}

static void law_routing(void **state)
{
    (void)state;
    real_routing("law");
}

static void translation_routing(void **state)
{
    (void)state;
    real_routing("translation");
}

/* The name of a test, as a pattern, may be given. */
int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(random_worlds),
        cmocka_unit_test(real_shapes),
        cmocka_unit_test(law_routing),
        cmocka_unit_test(translation_routing),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
