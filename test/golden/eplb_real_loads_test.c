/* SPDX-License-Identifier: MIT */
/*
 * The policies on real loads of DeepSeek-V3/R1, 58 layers of 256 experts in 288
 * slots; runs only where the data lies beside the checkout.
 * ctest-timeout: 300
 * ctest-label: plain
 */
#include "entrepot/plan.h"
#include "support/numbers.h"
#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { FILES = 6, LAYERS = 58, EXPERTS = 256, SLOTS = 288, ROW0 = 3 };

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
enum { SANITIZED = 1, FILE_STEP = 5, SPLIT_STEP = 19 }; /* searches take ten times as long */
#else
enum { SANITIZED = 0, FILE_STEP = 1, SPLIT_STEP = 5 };
#endif

static const char *const files[FILES] = {"decode_in1000out1000", "decode_in2000out100",
                                         "decode_in500out1500",  "prefill_in1024",
                                         "prefill_in4096",       "prefill_in500out1500"};
static float load[FILES][LAYERS][EXPERTS];
static int32_t placed[LAYERS][SLOTS], reference[LAYERS][SLOTS];

static int read_loads(void **state)
{
    (void)state;
    for (int f = 0; f < FILES && numbers_present(); f++) {
        char name[128];
        snprintf(name, sizeof name, "expert_load/%s.json", files[f]);
        double *numbers = numbers_expect(name, "logical_count", (LAYERS + ROW0) * EXPERTS);
        for (int i = 0; i < LAYERS * EXPERTS; i++)
            load[f][i / EXPERTS][i % EXPERTS] = (float)numbers[ROW0 * EXPERTS + i];
        free(numbers);
    }
    return 0;
}

static ep_plan_config config_of(int policy, int groups, int nodes, int gpus)
{
    ep_plan_config c = EP_PLAN_CONFIG_INIT;
    c.layers = LAYERS;
    c.experts = EXPERTS;
    c.replicas = SLOTS;
    c.groups = groups;
    c.nodes = nodes;
    c.gpus = gpus;
    c.policy = policy;
    return c;
}

static ep_plan_report plan(const ep_plan_config *c, const float *loads, int32_t *phy2log)
{
    ep_plan_report report = {.size = sizeof report};
    assert_int_equal(ep_plan_eplb(c, loads, NULL, phy2log, NULL, &report), EP_OK);
    return report;
}

/* Mean over files of a policy's balancedness, which each file must reach by itself, too. */
static double mean_over_files(int policy, int gpus, double least)
{
    ep_plan_config c = config_of(policy, 1, 1, gpus);
    double sum = 0;
    int n = 0;
    for (int f = 0; f < FILES; f += FILE_STEP, n++) {
        ep_plan_report report = plan(&c, load[f][0], placed[0]);
        assert_true(report.balancedness >= least);
        if (policy == EP_PLAN_UNIQUE)
            assert_int_equal(report.duplicates, 0);
        sum += report.balancedness;
    }
    return sum / n;
}

static void global_placements_reach_their_targets(void **state)
{
    (void)state;
    if (!numbers_present())
        skip();
    for (int policy = EP_PLAN_REFINE; policy <= EP_PLAN_UNIQUE; policy++) {
        mean_over_files(policy, 32, 0.9995);
        mean_over_files(policy, 72, 0.99);
        /* Two slots per GPU: no placement with even shares gains more than 0.016 here, by the
         * linear relaxation of the choice of counts. */
        assert_true(mean_over_files(policy, 144, 0.8) >=
                    mean_over_files(EP_PLAN_REFERENCE, 144, 0.8) + 0.0125);
    }
}

static double layer_balance(const ep_plan_config *all, int file, int layer, const int32_t *row)
{
    ep_plan_config c = *all;
    ep_plan_report report = {.size = sizeof report};
    c.layers = 1;
    assert_int_equal(ep_plan_judge(&c, load[file][layer], NULL, row, &report), EP_OK);
    return report.balancedness;
}

static void groups_cost_the_others_nothing(void **state)
{
    (void)state;
    if (!numbers_present())
        skip();
    for (int f = 0; f < FILES; f += FILE_STEP) {
        ep_plan_config c = config_of(EP_PLAN_REFERENCE, 8, 4, 32);
        double before = plan(&c, load[f][0], reference[0]).balancedness;
        c.policy = EP_PLAN_REFINE;
        plan(&c, load[f][0], placed[0]);
        for (int l = 0; l < LAYERS; l++)
            assert_true(layer_balance(&c, f, l, placed[l]) >=
                        layer_balance(&c, f, l, reference[l]) - 1e-12);
        c.policy = EP_PLAN_UNIQUE;
        ep_plan_report unique = plan(&c, load[f][0], placed[0]);
        assert_true(unique.balancedness >= before);
        assert_int_equal(unique.duplicates, 0);
    }
}

/* Plans for three files, judged on the other three. */
static void compare_on_others(const int chosen[3], int groups, int nodes, int gpus)
{
    static float windows[3][LAYERS][EXPERTS];
    ep_plan_config c = config_of(EP_PLAN_REFERENCE, groups, nodes, gpus);
    double difference = 0;
    for (int w = 0; w < 3; w++)
        memcpy(windows[w], load[chosen[w]], sizeof windows[w]);
    c.windows = 3;
    plan(&c, windows[0][0], reference[0]); /* of the sum */
    c.policy = EP_PLAN_WINDOWS;
    plan(&c, windows[0][0], placed[0]);
    c.windows = 1;
    for (int f = 0; f < FILES; f++) {
        ep_plan_report mine = {.size = sizeof mine}, theirs = mine;
        if (f == chosen[0] || f == chosen[1] || f == chosen[2])
            continue;
        assert_int_equal(ep_plan_judge(&c, load[f][0], NULL, placed[0], &mine), EP_OK);
        assert_int_equal(ep_plan_judge(&c, load[f][0], NULL, reference[0], &theirs), EP_OK);
        difference += mine.balancedness - theirs.balancedness;
    }
    if (difference <= 0)
        fail_msg("%d %d %d on %d GPUs: %g below the reference", chosen[0], chosen[1], chosen[2],
                 gpus, -difference / 3);
}

static void windows_hold_on_other_loads(void **state)
{
    (void)state;
    if (!numbers_present())
        skip();
    int split = 0;
    for (int a = 0; a < FILES; a++)
        for (int b = a + 1; b < FILES; b++)
            for (int c = b + 1; c < FILES; c++) {
                const int chosen[3] = {a, b, c};
                if (split++ % SPLIT_STEP)
                    continue;
                compare_on_others(chosen, 8, 4, 32);
                compare_on_others(chosen, 1, 1, 32);
                compare_on_others(chosen, 1, 1, 72);
                compare_on_others(chosen, 1, 1, 144);
            }
}

/* 5 replicas per layer, of the 277 that a new plan moves. */
static void few_moves_go_far(void **state)
{
    (void)state;
    if (!numbers_present())
        skip();
    ep_plan_config c = config_of(EP_PLAN_UNIQUE, 1, 1, 32);
    ep_plan_report report = {.size = sizeof report};
    plan(&c, load[0][0], placed[0]);
    c.policy = EP_PLAN_INCREMENTAL;
    c.max_moves = 5 * LAYERS;
    assert_int_equal(ep_plan_eplb(&c, load[2][0], placed[0], reference[0], NULL, &report), EP_OK);
    assert_true(report.moves <= c.max_moves);
    assert_true(report.balancedness_before < 0.95);
    assert_true(report.balancedness > 0.97);
}

static void reference_takes_under_a_millisecond(void **state)
{
    (void)state;
    if (SANITIZED || !numbers_present())
        skip();
    ep_plan_config c = config_of(EP_PLAN_REFERENCE, 8, 4, 32);
    double best_us = 1e9;
    for (int i = 0; i < 200; i++) { /* the fastest: others use the machine, too */
        struct timespec from, to;
        clock_gettime(CLOCK_MONOTONIC, &from);
        assert_int_equal(ep_plan_eplb(&c, load[4][0], NULL, placed[0], NULL, NULL), EP_OK);
        clock_gettime(CLOCK_MONOTONIC, &to);
        double us =
            (double)(to.tv_sec - from.tv_sec) * 1e6 + (double)(to.tv_nsec - from.tv_nsec) * 1e-3;
        best_us = us < best_us ? us : best_us;
    }
    print_message("58 layers, 256 experts, 288 slots, 32 GPUs: %.0f us\n", best_us);
    assert_true(best_us < 1000);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(global_placements_reach_their_targets),
        cmocka_unit_test(groups_cost_the_others_nothing),
        cmocka_unit_test(windows_hold_on_other_loads),
        cmocka_unit_test(few_moves_go_far),
        cmocka_unit_test(reference_takes_under_a_millisecond),
    };
    return cmocka_run_group_tests(tests, read_loads, NULL);
}
