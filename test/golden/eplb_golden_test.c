/* SPDX-License-Identifier: MIT */
/* The reference policy against plans that the public EPLB made. */
#include "entrepot/plan.h"
#include "support/numbers.h"
#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The public worked example: two layers of twelve experts. */
static const float example_load[2][12] = {
    {90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86},
    {20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27},
};
static const int32_t example_phy2log[2][16] = {
    {5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1},
    {7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1},
};
static const int32_t example_logcnt[2][12] = {
    {1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1},
    {1, 2, 1, 1, 1, 2, 2, 1, 2, 1, 1, 1},
};

static ep_plan_config config_of(int layers, int experts, int replicas, int groups, int nodes,
                                int gpus)
{
    ep_plan_config config = EP_PLAN_CONFIG_INIT;
    config.layers = layers;
    config.experts = experts;
    config.replicas = replicas;
    config.groups = groups;
    config.nodes = nodes;
    config.gpus = gpus;
    return config;
}

static void equals_the_worked_example(void **state)
{
    (void)state;
    ep_plan_config config = config_of(2, 12, 16, 4, 2, 8);
    int32_t phy2log[2][16], rank[2][16], log2phy[2][12][2], logcnt[2][12], most = 0;
    assert_int_equal(ep_plan_eplb(&config, &example_load[0][0], NULL, phy2log[0], rank[0], NULL),
                     EP_OK);
    assert_memory_equal(phy2log, example_phy2log, sizeof phy2log);
    assert_int_equal(ep_plan_max_count(&config, phy2log[0], &most), EP_OK);
    assert_int_equal(most, 2);
    assert_int_equal(ep_plan_tables(&config, phy2log[0], rank[0], 2, log2phy[0][0], logcnt[0]),
                     EP_OK);
    assert_memory_equal(logcnt, example_logcnt, sizeof logcnt);
    for (int l = 0; l < 2; l++)
        for (int e = 0; e < 12; e++)
            for (int r = 0; r < 2; r++) {
                int slot = log2phy[l][e][r];
                if (r < logcnt[l][e]) {
                    assert_int_equal(phy2log[l][slot], e);
                    assert_int_equal(rank[l][slot], r);
                } else {
                    assert_int_equal(slot, -1);
                }
            }
}

static void check_golden(const char *source, const char *tag, ep_plan_config config, int skip)
{
    char file[256];
    size_t found = 0, layers = (size_t)config.layers, experts = (size_t)config.experts,
           replicas = (size_t)config.replicas;
    snprintf(file, sizeof file, "expert_load/%s.json", source);
    double *counts = numbers_read(file, "logical_count", &found);
    assert_non_null(counts);
    assert_int_equal(found, ((size_t)skip + layers) * experts);
    float *load = malloc(layers * experts * sizeof *load);
    int32_t *phy2log = malloc(layers * replicas * sizeof *phy2log);
    int32_t *logcnt = malloc(layers * experts * sizeof *logcnt);
    assert_true(load && phy2log && logcnt);
    for (size_t i = 0; i < layers * experts; i++)
        load[i] = (float)counts[(size_t)skip * experts + i];
    assert_int_equal(ep_plan_eplb(&config, load, NULL, phy2log, NULL, NULL), EP_OK);
    assert_int_equal(ep_plan_tables(&config, phy2log, NULL, config.replicas, NULL, logcnt), EP_OK);
    snprintf(file, sizeof file, "golden/eplb_%s%s.json", source, tag);
    double *want_phy = numbers_expect(file, "phy2log", layers * replicas);
    double *want_cnt = numbers_expect(file, "logcnt", layers * experts);
    for (size_t i = 0; i < layers * replicas; i++)
        if ((double)phy2log[i] != want_phy[i])
            fail_msg("%s: phy2log[%zu][%zu] is %d, not %g", file, i / replicas, i % replicas,
                     (int)phy2log[i], want_phy[i]);
    for (size_t i = 0; i < layers * experts; i++)
        assert_true((double)logcnt[i] == want_cnt[i]);
    free(counts);
    free(load);
    free(phy2log);
    free(logcnt);
    free(want_phy);
    free(want_cnt);
}

static void equals_the_goldens(void **state)
{
    (void)state;
    static const char *const sources[] = {"decode_in1000out1000", "prefill_in4096"};
    static const int shapes[][4] = {
        {256, 8, 4, 32}, {288, 8, 4, 32}, {288, 8, 18, 144}, {320, 8, 8, 64}};
    if (!numbers_present())
        skip();
    check_golden("readme_example", "", config_of(2, 12, 16, 4, 2, 8), 0);
    check_golden("readme_example", "_global", config_of(2, 12, 16, 1, 1, 8), 0);
    for (int s = 0; s < 2; s++)
        for (int i = 0; i < 4; i++) {
            const int *p = shapes[i];
            char tag[64];
            snprintf(tag, sizeof tag, "_%d_%d_%d_%d", p[0], p[1], p[2], p[3]);
            check_golden(sources[s], tag, config_of(58, 256, p[0], p[1], p[2], p[3]), 3);
        }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_the_worked_example),
        cmocka_unit_test(equals_the_goldens),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
