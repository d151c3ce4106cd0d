/* SPDX-License-Identifier: MIT */
/* The reference policy on generated loads, against a slow and plain version of it. */
#include "entrepot/plan.h"
#include "support/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { MOST = 512 };

static uint64_t seed = 1;

static unsigned draw(unsigned below)
{
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    return (unsigned)(seed >> 33) % below;
}

/* The specification word for word: scan for the next heaviest, scan for the lightest. */
static void slow_pack(const float *w, int n, int m, int *pack, int *rank)
{
    float sum[MOST] = {0};
    int held[MOST] = {0}, done[MOST] = {0};
    for (int i = 0; i < n; i++) {
        int item = -1, best = -1;
        for (int j = 0; j < n; j++)
            if (!done[j] && (item < 0 || w[j] > w[item]))
                item = j;
        for (int p = 0; p < m; p++)
            if (held[p] < n / m && (best < 0 || sum[p] < sum[best]))
                best = p;
        done[item] = 1;
        pack[item] = n == m ? item : best;
        rank[item] = n == m ? 0 : held[best]++;
        sum[best] += w[item];
    }
}

static void slow_layer(const ep_plan_config *c, const float *load, int32_t *phy2log,
                       int32_t *phyrank)
{
    int groups = c->groups % c->nodes ? 1 : c->groups, nodes = c->groups % c->nodes ? 1 : c->nodes;
    int size = c->experts / groups, n = c->experts / nodes, slots = c->replicas / nodes;
    float group[MOST] = {0}, share[MOST];
    int node[MOST], at[MOST], gpu[MOST], place[MOST], order[MOST], expert[MOST], rank[MOST];
    for (int e = 0; e < c->experts; e++)
        group[e / size] += load[e];
    slow_pack(group, groups, nodes, node, at);
    for (int e = 0; e < c->experts; e++)
        order[(node[e / size] * (groups / nodes) + at[e / size]) * size + e % size] = e;
    for (int d = 0; d < nodes; d++) {
        int count[MOST];
        for (int s = 0; s < slots; s++) {
            int pick = s;
            for (int e = 0; s >= n && e < n; e++) {
                float here = load[order[d * n + e]] / (float)count[e];
                float best = pick < n ? load[order[d * n + pick]] / (float)count[pick] : -1;
                pick = here > best ? e : pick;
            }
            rank[s] = s < n ? 0 : count[pick];
            expert[s] = pick;
            count[pick] = rank[s] + 1;
        }
        for (int s = 0; s < slots; s++)
            share[s] = load[order[d * n + expert[s]]] / (float)count[expert[s]];
        slow_pack(share, slots, c->gpus / nodes, gpu, place);
        for (int s = 0; s < slots; s++) {
            int slot = d * slots + gpu[s] * (c->replicas / c->gpus) + place[s];
            phy2log[slot] = order[d * n + expert[s]];
            phyrank[slot] = rank[s];
        }
    }
}

static void fill(float *load, int n, int kind)
{
    for (int i = 0; i < n; i++)
        switch (kind) {
        case 0: /* many ties */
            load[i] = (float)draw(4);
            break;
        case 1: /* all equal */
            load[i] = 7;
            break;
        case 2: /* zeros of both signs */
            load[i] = draw(2) ? 0.0f : -0.0f;
            break;
        case 3: /* wide range, not whole numbers */
            load[i] = ldexpf((float)draw(1u << 20), (int)draw(40) - 30);
            break;
        default:
            load[i] = (float)draw(5000000);
        }
}

static ep_plan_config random_config(void)
{
    static const int gpus[] = {1, 2, 3, 4, 6, 8, 12, 16};
    static const int groups[] = {1, 2, 4, 6, 8};
    ep_plan_config c = EP_PLAN_CONFIG_INIT;
    c.layers = 1;
    c.gpus = gpus[draw(8)];
    do
        c.nodes = 1 + (int)draw((unsigned)c.gpus);
    while (c.gpus % c.nodes);
    c.groups = groups[draw(5)];
    c.experts = c.groups * (1 + (int)draw(12));
    c.replicas = c.experts + (int)draw(40);
    c.replicas += (c.gpus - c.replicas % c.gpus) % c.gpus;
    return c;
}

static void equals_the_slow_version(void **state)
{
    (void)state;
    for (int round = 0; round < 3000; round++) {
        ep_plan_config c = random_config();
        float load[MOST];
        int32_t phy[MOST], rank[MOST], want_phy[MOST], want_rank[MOST];
        fill(load, c.experts, round % 5);
        assert_int_equal(ep_plan_eplb(&c, load, NULL, phy, rank, NULL), EP_OK);
        slow_layer(&c, load, want_phy, want_rank);
        assert_memory_equal(phy, want_phy, (size_t)c.replicas * sizeof *phy);
        assert_memory_equal(rank, want_rank, (size_t)c.replicas * sizeof *rank);
    }
}

static void inverts_its_placement(void **state)
{
    (void)state;
    for (int round = 0; round < 500; round++) {
        ep_plan_config c = random_config();
        float load[MOST];
        int32_t phy[MOST], rank[MOST], count[MOST], most = 0, total = 0;
        fill(load, c.experts, round % 5);
        assert_int_equal(ep_plan_eplb(&c, load, NULL, phy, rank, NULL), EP_OK);
        assert_int_equal(ep_plan_max_count(&c, phy, &most), EP_OK);
        int32_t *log2phy = malloc((size_t)(c.experts * most) * sizeof *log2phy);
        assert_non_null(log2phy);
        assert_int_equal(ep_plan_tables(&c, phy, rank, most, log2phy, count), EP_OK);
        for (int e = 0; e < c.experts; e++) {
            assert_true(count[e] >= 1 && count[e] <= most);
            total += count[e];
            for (int r = 0; r < most; r++) {
                int slot = log2phy[e * most + r];
                assert_int_equal(slot >= 0, r < count[e]);
                assert_true(slot < 0 || (phy[slot] == e && rank[slot] == r));
            }
        }
        assert_int_equal(total, c.replicas);
        free(log2phy);
    }
}

static void refuses(ep_plan_config c, const float *load, const char *message)
{
    int32_t phy[16];
    memset(phy, 0x55, sizeof phy);
    assert_int_equal(ep_plan_eplb(&c, load, NULL, phy, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), message);
    for (int i = 0; i < 16; i++)
        assert_int_equal(phy[i], 0x55555555);
}

static void names_the_bad_argument(void **state)
{
    (void)state;
    float load[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    ep_plan_config good = EP_PLAN_CONFIG_INIT, c;
    good.layers = 1;
    good.experts = 12;
    good.replicas = 16;
    good.groups = 4;
    good.nodes = 2;
    good.gpus = 8;
    int32_t phy[16];
    assert_int_equal(ep_plan_eplb(&good, load, NULL, phy, NULL, NULL), EP_OK);
    c = good, c.layers = 0;
    refuses(c, load, "ep_plan_eplb: layers is 0, allowed: 1..1048576");
    c = good, c.replicas = 8;
    refuses(c, load, "ep_plan_eplb: replicas is 8, allowed: 12..1048576");
    c = good, c.gpus = 1 << 21;
    refuses(c, load, "ep_plan_eplb: gpus is 2097152, allowed: 1..1048576");
    c = good, c.groups = 5;
    refuses(c, load, "ep_plan_eplb: groups is 5, which does not divide experts, 12");
    c = good, c.nodes = 3;
    refuses(c, load, "ep_plan_eplb: nodes is 3, which does not divide gpus, 8");
    c = good, c.replicas = 17;
    refuses(c, load, "ep_plan_eplb: gpus is 8, which does not divide replicas, 17");
    c = good, c.size = 3;
    refuses(c, load, "ep_plan_eplb: config.size is 3, allowed: 8..48");
    refuses(good, NULL, "ep_plan_eplb: load is NULL");
    load[4] = -1;
    refuses(good, load, "ep_plan_eplb: load[0][0][4] is -1, allowed: finite and not negative");
    load[4] = NAN;
    refuses(good, load, "ep_plan_eplb: load[0][0][4] is nan, allowed: finite and not negative");
    load[4] = load[5] = 3e38f;
    refuses(good, load, "ep_plan_eplb: load[0][0] sums to 6e+38, allowed: up to 3.40282e+38");
    assert_int_equal(ep_plan_eplb(NULL, load, NULL, phy, NULL, NULL), EP_ERR_ARGUMENT);
    load[4] = load[5] = 1;
    assert_int_equal(ep_plan_eplb(&good, load, NULL, NULL, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_plan_eplb: phy2log is NULL");
}

static void tables_name_the_bad_slot(void **state)
{
    (void)state;
    ep_plan_config c = EP_PLAN_CONFIG_INIT;
    c.layers = 1;
    c.experts = 2;
    c.replicas = 4;
    c.gpus = 2;
    int32_t phy[4] = {0, 1, 1, 1}, rank[4] = {0, 0, 1, 1}, count[2], most;
    assert_int_equal(ep_plan_tables(&c, phy, NULL, 2, NULL, count), EP_ERR_ARGUMENT);
    assert_non_null(strstr(ep_last_error(), "max_count is 2, allowed: at least 3"));
    assert_int_equal(ep_plan_tables(&c, phy, rank, 3, NULL, count), EP_ERR_ARGUMENT);
    assert_non_null(strstr(ep_last_error(), "phyrank[0][3] is 1, allowed: 0..2, each once"));
    phy[0] = 1;
    assert_int_equal(ep_plan_max_count(&c, phy, &most), EP_ERR_ARGUMENT);
    assert_non_null(strstr(ep_last_error(), "phy2log[0] has no slot for expert 0"));
    phy[0] = 2;
    assert_int_equal(ep_plan_max_count(&c, phy, &most), EP_ERR_ARGUMENT);
    assert_non_null(strstr(ep_last_error(), "phy2log[0][0] is 2, allowed: 0..1"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_the_slow_version),
        cmocka_unit_test(inverts_its_placement),
        cmocka_unit_test(names_the_bad_argument),
        cmocka_unit_test(tables_name_the_bad_slot),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
