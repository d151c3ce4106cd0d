/* SPDX-License-Identifier: MIT */
/*
 * The searching policies on generated loads: every placement is legal, is worth
 * what its report says, and on tiny cases is held against all placements there
 * are. One thread only.
 * ctest-timeout: 300
 * ctest-label: notsan
 */
#include "entrepot/plan.h"
#include "support/random.h"
#include "support/test.h"

#include <math.h>
#include <string.h>

enum { MOST_SLOTS = 160, MOST_LAYERS = 3, MOST_WINDOWS = 3 };

typedef struct problem {
    ep_plan_config config;
    float load[MOST_WINDOWS * MOST_LAYERS * MOST_SLOTS];
} problem;

static void draw_load(struct rng *rng, problem *p)
{
    int n = p->config.windows * p->config.layers * p->config.experts, kind = (int)rng_below(rng, 5);
    for (int i = 0; i < n; i++) {
        double u = rng_unit(rng);
        double values[] = {floor(u * 4), 7, 0, exp(8 * u), floor(1e6 * u * u * u)};
        p->load[i] = (float)values[kind];
    }
}

static problem draw_problem(struct rng *rng)
{
    static const int gpus[] = {1, 2, 3, 4, 6, 8, 12, 16};
    problem p = {.config = EP_PLAN_CONFIG_INIT};
    ep_plan_config *c = &p.config;
    c->layers = 1 + (int)rng_below(rng, MOST_LAYERS);
    c->windows = 1 + (int)rng_below(rng, MOST_WINDOWS);
    c->gpus = gpus[rng_below(rng, 8)];
    do
        c->nodes = (int)rng_range(rng, 1, c->gpus);
    while (c->gpus % c->nodes);
    c->groups = rng_below(rng, 2) ? c->nodes * (int)rng_range(rng, 1, 2) : 1;
    c->experts = c->groups * (int)rng_range(rng, 1, 60 / c->groups + 1);
    c->replicas = c->experts + (int)rng_below(rng, 40);
    if (rng_below(rng, 4) == 0) /* two slots per GPU, the case of its own */
        c->replicas = 2 * c->gpus >= c->experts ? 2 * c->gpus : c->replicas;
    c->replicas += (c->gpus - c->replicas % c->gpus) % c->gpus;
    draw_load(rng, &p);
    return p;
}

/* Balancedness of one layer in one window, worked out apart from the library. */
static double balance_of(const problem *p, int window, int layer, const int32_t *row)
{
    const ep_plan_config *c = &p->config;
    const float *load = p->load + (window * c->layers + layer) * c->experts;
    double sum = 0, most = 0;
    for (int g = 0; g < c->gpus; g++) {
        double here = 0;
        for (int e = 0; e < c->experts; e++) {
            int on_gpu = 0, all = 0;
            for (int s = 0; s < c->replicas; s++) {
                all += row[s] == e;
                on_gpu += row[s] == e && s / (c->replicas / c->gpus) == g;
            }
            here += (double)load[e] * on_gpu / all;
        }
        sum += here;
        most = here > most ? here : most;
    }
    return most > 0 ? sum / c->gpus / most : -1;
}

static double balancedness_of(const problem *p, const int32_t *phy2log)
{
    double mean = 0;
    for (int w = 0; w < p->config.windows; w++) {
        double sum = 0;
        int layers = 0;
        for (int l = 0; l < p->config.layers; l++) {
            double b = balance_of(p, w, l, phy2log + l * p->config.replicas);
            sum += b < 0 ? 0 : b;
            layers += b >= 0;
        }
        mean += layers ? sum / layers : 1;
    }
    return mean / p->config.windows;
}

/* Slots whose expert is on the same GPU in an earlier slot. */
static int duplicates_of(const ep_plan_config *c, const int32_t *row)
{
    int found = 0, slots = c->replicas / c->gpus;
    for (int s = 0; s < c->replicas; s++)
        for (int k = s / slots * slots; k < s; k++)
            if (row[k] == row[s]) {
                found++;
                break;
            }
    return found;
}

static void check_legal(const ep_plan_config *c, const int32_t *row)
{
    int count[MOST_SLOTS] = {0}, node[MOST_SLOTS];
    for (int s = 0; s < c->replicas; s++) {
        assert_in_range(row[s], 0, c->experts - 1);
        count[row[s]]++;
    }
    for (int e = 0; e < c->experts; e++)
        assert_true(count[e] >= 1);
    if (c->groups % c->nodes)
        return;
    memset(node, -1, sizeof node);
    for (int s = 0; s < c->replicas; s++) {
        int *home = &node[row[s] / (c->experts / c->groups)];
        assert_true(*home < 0 || *home == s / (c->replicas / c->nodes));
        *home = s / (c->replicas / c->nodes);
    }
}

static void check_unique(const ep_plan_config *c, const int32_t *row)
{
    int nodes = c->groups % c->nodes ? 1 : c->nodes;
    int over = c->replicas / c->gpus - c->experts / nodes;
    assert_int_equal(duplicates_of(c, row), over > 0 ? over * c->gpus : 0);
}

static void plan(const problem *p, int policy, const int32_t *current, int32_t *phy2log,
                 ep_plan_report *report)
{
    ep_plan_config c = p->config;
    int32_t rank[MOST_LAYERS * MOST_SLOTS], most, again[MOST_LAYERS * MOST_SLOTS];
    c.policy = policy;
    *report = (ep_plan_report){.size = sizeof *report};
    assert_int_equal(ep_plan_eplb(&c, p->load, current, phy2log, rank, report), EP_OK);
    assert_int_equal(ep_plan_eplb(&c, p->load, current, again, NULL, NULL), EP_OK);
    assert_memory_equal(phy2log, again, (size_t)(c.layers * c.replicas) * sizeof *again);
    assert_int_equal(ep_plan_max_count(&c, phy2log, &most), EP_OK);
    assert_int_equal(ep_plan_tables(&c, phy2log, rank, most, NULL, NULL), EP_OK);
}

static void keeps_its_promises(void **state)
{
    (void)state;
    struct rng rng;
    rng_seed(&rng, rng_env_seed(1));
    for (int round = 0; round < 200; round++) {
        problem p = draw_problem(&rng);
        int32_t reference[MOST_LAYERS * MOST_SLOTS], phy[MOST_LAYERS * MOST_SLOTS];
        ep_plan_report report;
        plan(&p, EP_PLAN_REFERENCE, NULL, reference, &report);
        for (int policy = EP_PLAN_REFERENCE; policy <= EP_PLAN_WINDOWS; policy++) {
            int duplicates = 0;
            plan(&p, policy, NULL, phy, &report);
            for (int l = 0; l < p.config.layers; l++) {
                const int32_t *row = phy + l * p.config.replicas;
                check_legal(&p.config, row);
                duplicates += duplicates_of(&p.config, row);
                if (policy >= EP_PLAN_UNIQUE)
                    check_unique(&p.config, row);
                if (policy == EP_PLAN_REFINE && p.config.windows == 1)
                    assert_true(balance_of(&p, 0, l, row) >=
                                balance_of(&p, 0, l, reference + l * p.config.replicas) - 1e-12);
            }
            assert_int_equal(report.duplicates, duplicates);
            assert_true(report.duplicates >= report.duplicates_unavoidable);
            assert_true(fabs(report.balancedness - balancedness_of(&p, phy)) < 1e-9);
        }
    }
}

/* The least peaks over all placements of a layer, by going through them: [0] over all, [1] over
 * those without duplicates. */
static void find_optimum(const problem *p, int slot, int32_t *row, double best[2])
{
    const ep_plan_config *c = &p->config;
    if (slot == c->replicas) {
        unsigned held = 0;
        for (int s = 0; s < slot; s++)
            held |= 1u << row[s];
        if (held != (1u << c->experts) - 1)
            return;
        double peak = 1 / balance_of(p, 0, 0, row);
        best[0] = fmin(best[0], peak);
        if (!duplicates_of(c, row))
            best[1] = fmin(best[1], peak);
        return;
    }
    /* Within a GPU the order does not matter. */
    int least = slot % (c->replicas / c->gpus) ? row[slot - 1] : 0;
    for (row[slot] = least; row[slot] < c->experts; row[slot]++)
        find_optimum(p, slot + 1, row, best);
}

static void comes_near_the_optimum(void **state)
{
    (void)state;
    static const int shapes[][3] = {{3, 4, 2}, {4, 6, 3}, {4, 6, 2},
                                    {5, 6, 3}, {5, 6, 2}, {4, 8, 4}};
    enum { ROUNDS = 60 };
    struct rng rng;
    rng_seed(&rng, rng_env_seed(2));
    double worst[EP_PLAN_POLICIES] = {0}, sum[EP_PLAN_POLICIES] = {0};
    for (int round = 0; round < ROUNDS; round++) {
        problem p = {.config = EP_PLAN_CONFIG_INIT};
        const int *shape = shapes[round % 6];
        p.config.layers = 1;
        p.config.experts = shape[0];
        p.config.replicas = shape[1];
        p.config.gpus = shape[2];
        for (int e = 0; e < shape[0]; e++)
            p.load[e] = (float)exp(3 * rng_unit(&rng));
        int32_t row[8], phy[8];
        double best[2] = {INFINITY, INFINITY};
        find_optimum(&p, 0, row, best);
        for (int policy = EP_PLAN_REFERENCE; policy <= EP_PLAN_WINDOWS; policy++) {
            ep_plan_report report;
            plan(&p, policy, NULL, phy, &report);
            double over = 1 / report.balancedness / best[policy >= EP_PLAN_UNIQUE] - 1;
            assert_true(over > -1e-9);
            worst[policy] = fmax(worst[policy], over);
            sum[policy] += over;
        }
    }
    for (int policy = EP_PLAN_REFERENCE; policy <= EP_PLAN_WINDOWS; policy++)
        print_message("%-10s over the optimum: mean %.4f, worst %.4f\n",
                      ep_plan_policy_name(policy), sum[policy] / ROUNDS, worst[policy]);
    assert_true(sum[EP_PLAN_REFINE] < 0.5 * sum[EP_PLAN_REFERENCE]);
    assert_true(sum[EP_PLAN_UNIQUE] < 0.5 * sum[EP_PLAN_REFERENCE]);
}

/* Moves of the report, of the list, and of the placements themselves. */
static void check_moves(const problem *p, const int32_t *current, const int32_t *phy,
                        const ep_plan_report *report)
{
    const ep_plan_config *c = &p->config;
    ep_plan_move moves[MOST_LAYERS * MOST_SLOTS];
    int64_t count = 0;
    int slots = c->replicas / c->gpus;
    assert_int_equal(ep_plan_moves(c, current, phy, moves, MOST_LAYERS * MOST_SLOTS, &count),
                     EP_OK);
    assert_int_equal(count, report->moves);
    int32_t state[MOST_LAYERS * MOST_SLOTS];
    memcpy(state, current, sizeof state);
    for (int64_t i = 0; i < count; i++) {
        int at = moves[i].layer * c->replicas + moves[i].slot;
        assert_int_equal(phy[at], moves[i].expert);
        assert_int_equal(current[moves[i].layer * c->replicas + moves[i].source], moves[i].expert);
        state[at] = moves[i].expert;
    }
    /* After the moves every GPU has what it needs, here or in a slot since overwritten. */
    for (int at = 0; at < c->layers * c->replicas; at++) {
        int first = at / slots * slots, here = 0;
        for (int s = first; s < first + slots; s++)
            here |= state[s] == phy[at] || current[s] == phy[at];
        assert_true(here);
    }
}

static void moves_within_its_bound(void **state)
{
    (void)state;
    struct rng rng;
    rng_seed(&rng, rng_env_seed(3));
    for (int round = 0; round < 120; round++) {
        problem p = draw_problem(&rng);
        int32_t current[MOST_LAYERS * MOST_SLOTS], phy[MOST_LAYERS * MOST_SLOTS];
        ep_plan_report report;
        plan(&p, (int)rng_below(&rng, 4), NULL, current, &report);
        draw_load(&rng, &p);
        double before = balancedness_of(&p, current);
        for (int max = 0; max <= 64; max = max ? 2 * max : 1) {
            p.config.max_moves = max;
            plan(&p, EP_PLAN_INCREMENTAL, current, phy, &report);
            assert_true(report.moves <= max);
            assert_true(fabs(report.balancedness_before - before) < 1e-9);
            assert_true(fabs(report.balancedness - balancedness_of(&p, phy)) < 1e-9);
            assert_true(report.balancedness >= before - 1e-9);
            for (int l = 0; l < p.config.layers; l++)
                check_legal(&p.config, phy + l * p.config.replicas);
            check_moves(&p, current, phy, &report);
            if (max == 0)
                assert_memory_equal(phy, current,
                                    (size_t)(p.config.layers * p.config.replicas) * sizeof *phy);
        }
    }
}

/* One moved replica must help as much as the best single one there is, within what the search
 * trades the maximum for. */
static void one_move_is_well_spent(void **state)
{
    (void)state;
    struct rng rng;
    rng_seed(&rng, rng_env_seed(4));
    double got = 0, possible = 0;
    for (int round = 0; round < 100; round++) {
        problem p = {.config = EP_PLAN_CONFIG_INIT};
        p.config.layers = 1;
        p.config.experts = 8;
        p.config.replicas = 12;
        p.config.gpus = 4;
        p.config.max_moves = 1;
        for (int e = 0; e < 8; e++)
            p.load[e] = (float)exp(3 * rng_unit(&rng));
        int32_t current[12], phy[12];
        ep_plan_report report;
        plan(&p, EP_PLAN_UNIQUE, NULL, current, &report);
        for (int e = 0; e < 8; e++)
            p.load[e] = (float)exp(3 * rng_unit(&rng));
        double before = balancedness_of(&p, current), best = before;
        for (int s = 0; s < 12; s++)
            for (int e = 0; e < 8; e++) {
                int32_t other[12], held = 0;
                memcpy(other, current, sizeof other);
                for (int k = 0; k < 12; k++)
                    held += current[k] == current[s];
                other[s] = e;
                if (held > 1)
                    best = fmax(best, balancedness_of(&p, other));
            }
        plan(&p, EP_PLAN_INCREMENTAL, current, phy, &report);
        assert_true(report.balancedness <= best + 1e-9);
        got += report.balancedness - before;
        possible += best - before;
    }
    print_message("single moves: %.1f %% of the gain that is possible\n", 100 * got / possible);
    assert_true(got > 0.95 * possible);
}

static void names_bad_arguments(void **state)
{
    (void)state;
    ep_plan_config c = EP_PLAN_CONFIG_INIT;
    float load[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    int32_t current[6] = {0, 1, 0, 2, 3, 1}, phy[6];
    ep_plan_report report = {.size = sizeof report};
    c.layers = 1;
    c.experts = 4;
    c.replicas = 6;
    c.groups = 2;
    c.nodes = 2;
    c.gpus = 2;
    c.policy = 9;
    assert_int_equal(ep_plan_eplb(&c, load, NULL, phy, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_plan_eplb: policy is 9, allowed: 0..4");
    assert_null(ep_plan_policy_name(9));
    c.policy = EP_PLAN_INCREMENTAL;
    assert_int_equal(ep_plan_eplb(&c, load, NULL, phy, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_plan_eplb: current is NULL");
    assert_int_equal(ep_plan_eplb(&c, load, current, phy, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(),
                        "ep_plan_eplb: current[0][5] is 1 on node 1, allowed: experts of groups on "
                        "node 0, or nodes that do not divide groups");
    c.max_moves = -1;
    assert_int_equal(ep_plan_eplb(&c, load, current, phy, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_plan_eplb: max_moves is -1, allowed: 0 or more");
    c.max_moves = 0;
    c.windows = 0;
    assert_int_equal(ep_plan_eplb(&c, load, current, phy, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_plan_eplb: windows is 0, allowed: 1..178956970");
    c.windows = 1;
    c.policy = EP_PLAN_UNIQUE;
    report.size = 4;
    assert_int_equal(ep_plan_eplb(&c, load, NULL, phy, NULL, &report), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_plan_eplb: report.size is 4, allowed: 8..48");
    current[3] = 4;
    report.size = sizeof report;
    assert_int_equal(ep_plan_judge(&c, load, NULL, current, &report), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_plan_judge: phy2log[0][3] is 4, allowed: 0..3");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keeps_its_promises),     cmocka_unit_test(comes_near_the_optimum),
        cmocka_unit_test(moves_within_its_bound), cmocka_unit_test(one_move_is_well_spent),
        cmocka_unit_test(names_bad_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
