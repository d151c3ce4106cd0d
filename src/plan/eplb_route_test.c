/* SPDX-License-Identifier: MIT */
/* The choice among replicas: frozen results, spread, nearness, counters, bad arguments. */
#include "entrepot/plan.h"
#include "support/random.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

/* Four experts on 8 slots of 4 GPUs on 2 nodes; expert 0 has four replicas. */
static const int32_t log2phy[4][4] = {
    {0, 2, 4, 6}, {1, 5, -1, -1}, {3, -1, -1, -1}, {7, -1, -1, -1}};
static const int32_t logcnt[4] = {4, 2, 1, 1};

static ep_plan_router router_of(int choice, int node)
{
    ep_plan_router r = EP_PLAN_ROUTER_INIT;
    r.experts = 4;
    r.replicas = 8;
    r.gpus = 4;
    r.nodes = 2;
    r.max_count = 4;
    r.log2phy = log2phy[0];
    r.logcnt = logcnt;
    r.choice = choice;
    r.node = node;
    return r;
}

/* Scripts and other ranks rely on the choice: these values are frozen. */
static void hash_is_frozen(void **state)
{
    (void)state;
    static const int64_t ids[12] = {0, 1, 0, 1, 0, 2, 0, 3, 1, 0, -1, 0};
    static const int64_t want[12] = {2, 1, 0, 5, 4, 3, 2, 7, 5, 0, -1, 2};
    ep_plan_router r = router_of(EP_PLAN_HASH, -1);
    int64_t got[12], tail[4];
    int32_t narrow[12];
    r.seed = 7;
    assert_int_equal(ep_plan_route(&r, ids, 8, 6, 2, got, NULL), EP_OK);
    assert_memory_equal(got, want, sizeof want);
    /* Cutting the tokens into calls, narrow ids and working in place change nothing. */
    r.first_token = 4;
    assert_int_equal(ep_plan_route(&r, ids + 8, 8, 2, 2, tail, NULL), EP_OK);
    assert_memory_equal(tail, want + 8, sizeof tail);
    r.first_token = 0;
    for (int i = 0; i < 12; i++)
        narrow[i] = (int32_t)ids[i];
    assert_int_equal(ep_plan_route(&r, narrow, 4, 6, 2, narrow, NULL), EP_OK);
    for (int i = 0; i < 12; i++)
        assert_int_equal(narrow[i], want[i]);
}

static void hash_spreads(void **state)
{
    (void)state;
    enum { TOKENS = 40000 };
    int64_t *ids = calloc(TOKENS, sizeof *ids), tokens[4] = {0};
    assert_non_null(ids);
    ep_plan_router r = router_of(EP_PLAN_HASH, -1);
    assert_int_equal(ep_plan_route(&r, ids, 8, TOKENS, 1, ids, tokens), EP_OK);
    /* Chi-square with 3 degrees of freedom: 16.3 is passed once in a thousand seeds. */
    double chi = 0;
    for (int g = 0; g < 4; g++) {
        double off = (double)tokens[g] - TOKENS / 4.0;
        chi += off * off / (TOKENS / 4.0);
    }
    assert_true(chi < 16.3);
    free(ids);
}

static void prefers_the_node(void **state)
{
    (void)state;
    for (int choice = EP_PLAN_HASH; choice <= EP_PLAN_LEAST_LOADED; choice++)
        for (int node = 0; node < 2; node++) {
            ep_plan_router r = router_of(choice, node);
            int64_t ids[64], got[64], seen[8] = {0};
            for (int i = 0; i < 64; i++)
                ids[i] = i % 4;
            assert_int_equal(ep_plan_route(&r, ids, 8, 16, 4, got, NULL), EP_OK);
            for (int i = 0; i < 64; i++) {
                if (ids[i] < 2) /* has a replica on each node */
                    assert_int_equal(got[i] / 4, node);
                else
                    assert_int_equal(got[i], ids[i] == 2 ? 3 : 7);
                seen[got[i]]++;
            }
            assert_true(seen[4 * node] > 0 && seen[4 * node + 2] > 0);
        }
}

static void least_loaded_evens_out(void **state)
{
    (void)state;
    /* Every fourth token is of expert 2 and must go to GPU 1; those of expert 0 fill the others. */
    int32_t ids[80];
    int64_t tokens[4] = {0};
    for (int i = 0; i < 80; i++)
        ids[i] = i % 4 ? 0 : 2;
    ep_plan_router r = router_of(EP_PLAN_LEAST_LOADED, -1);
    assert_int_equal(ep_plan_route(&r, ids, 4, 80, 1, ids, tokens), EP_OK);
    for (int g = 0; g < 4; g++)
        assert_int_equal(tokens[g], 20);
    assert_int_equal(ids[1], 0); /* ties: the lowest rank */
    /* A second call goes on from the counters. */
    int32_t more[4] = {0, 0, 0, -1};
    tokens[0] = 23;
    assert_int_equal(ep_plan_route(&r, more, 4, 4, 1, more, tokens), EP_OK);
    static const int32_t want[4] = {2, 4, 6, -1};
    assert_memory_equal(more, want, sizeof want);
    static const int64_t now[4] = {23, 21, 21, 21};
    assert_memory_equal(tokens, now, sizeof now);
}

/* Counters say what the slots say, in every mode. */
static void counts_what_it_routes(void **state)
{
    (void)state;
    struct rng rng;
    rng_seed(&rng, rng_env_seed(5));
    for (int round = 0; round < 200; round++) {
        int64_t ids[96], got[96], again[96], tokens[4] = {0}, want[4] = {0};
        ep_plan_router r = router_of((int)rng_below(&rng, 2), (int)rng_range(&rng, -1, 1));
        r.seed = rng_next(&rng);
        for (int i = 0; i < 96; i++)
            ids[i] = rng_range(&rng, -1, 3);
        assert_int_equal(ep_plan_route(&r, ids, 8, 48, 2, got, tokens), EP_OK);
        assert_int_equal(ep_plan_route(&r, ids, 8, 48, 2, again, NULL), EP_OK);
        assert_memory_equal(got, again, sizeof got);
        for (int i = 0; i < 96; i++) {
            int held = 0;
            assert_int_equal(got[i] < 0, ids[i] < 0);
            for (int k = 0; ids[i] >= 0 && k < logcnt[ids[i]]; k++)
                held |= log2phy[ids[i]][k] == got[i];
            assert_true(held || ids[i] < 0);
            if (got[i] >= 0)
                want[got[i] / 2]++;
        }
        assert_memory_equal(tokens, want, sizeof want);
    }
}

static void refuses(ep_plan_router r, const char *message)
{
    int64_t ids[4] = {0, 1, 2, 3}, got[4] = {9, 9, 9, 9};
    assert_int_equal(ep_plan_route(&r, ids, 8, 2, 2, got, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), message);
    for (int i = 0; i < 4; i++)
        assert_int_equal(got[i], 9);
}

static void names_bad_arguments(void **state)
{
    (void)state;
    ep_plan_router good = router_of(EP_PLAN_HASH, -1), r;
    r = good, r.experts = 0;
    refuses(r, "ep_plan_route: router.experts is 0, allowed: 1..1048576");
    r = good, r.node = 2;
    refuses(r, "ep_plan_route: router.node is 2, allowed: -1..1");
    r = good, r.choice = 2;
    refuses(r, "ep_plan_route: router.choice is 2, allowed: 0..1");
    r = good, r.gpus = 3, r.nodes = 1;
    refuses(r, "ep_plan_route: router.replicas, gpus and nodes are 8, 3 and 1, allowed: each "
               "divides the one before");
    r = good, r.logcnt = NULL;
    refuses(r, "ep_plan_route: router.logcnt is NULL");
    r = good, r.max_count = 2;
    refuses(r, "ep_plan_route: logcnt[0] is 4, allowed: 1..2");
    r = good, r.replicas = 4;
    refuses(r, "ep_plan_route: log2phy[0][2] is 4, allowed: 0..3");
    int64_t ids[4] = {0, 1, 4, 3};
    assert_int_equal(ep_plan_route(&good, ids, 8, 2, 2, ids, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_plan_route: topk_idx[1][0] is 4, allowed: -1..3");
    assert_int_equal(ep_plan_route(&good, ids, 2, 2, 2, ids, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_plan_route: topk_bytes is 2, allowed: 4 or 8");
    assert_int_equal(ep_plan_route(&good, ids, 8, 2, 0, ids, NULL), EP_ERR_ARGUMENT);
    assert_int_equal(ep_plan_route(&good, NULL, 8, 2, 2, ids, NULL), EP_ERR_ARGUMENT);
    assert_int_equal(ep_plan_route(&good, NULL, 8, 0, 2, NULL, NULL), EP_OK);
    assert_int_equal(ep_plan_route(NULL, ids, 8, 2, 2, ids, NULL), EP_ERR_ARGUMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(hash_is_frozen),        cmocka_unit_test(hash_spreads),
        cmocka_unit_test(prefers_the_node),      cmocka_unit_test(least_loaded_evens_out),
        cmocka_unit_test(counts_what_it_routes), cmocka_unit_test(names_bad_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
