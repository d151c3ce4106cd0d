/* SPDX-License-Identifier: MIT */
/*
 * Many calls on a few buffers, sizes and modes changing all the time, results
 * and handles of several calls alive at once, all compared with the reference.
 * EP_STRESS_CALLS (calls per transport) and EP_TEST_SEED lengthen and vary it.
 * ctest-timeout: 3600
 * ctest-label: serial
 */
#include "support/ranks.h"
#include "support/tensors.h"
#include "support/test.h"
#include "support/world.h"

#include <stdlib.h>

enum { LIVE = 3, BUFFERS = 2, BATCH = 40 };

struct batch {
    struct scenario_data **data;
    int count, num_threads;
    uint64_t seed;
};

/* One result leaves: its bits are as they were, then its calls are made. */
static int retire(struct scenario_live *live, struct rng *rng)
{
    int failed = scenario_recheck(live) || scenario_follow(live, (int)rng_below(rng, 16));
    scenario_release(live);
    live->data = NULL;
    return failed;
}

/* Every rank draws the same numbers and so makes the same calls in the same order. */
static int run_rank(ep_group *group, void *argument)
{
    const struct batch *batch = argument;
    ep_buffer *buffers[BUFFERS] = {NULL};
    struct scenario_live live[LIVE] = {{.data = NULL}};
    struct rng rng;
    int failed = 0;
    rng_seed(&rng, batch->seed);
    TEST_OK(test_device_enter(ep_group_rank(group)));
    for (int b = 0; b < BUFFERS; b++) {
        ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
        config.num_threads = batch->num_threads;
        config.window_max_bytes = (size_t)1 << 30;
        config.device = test_device.type;
        config.device_index = test_device.index;
        if (!test_device_wanted()) /* where some calls can't wait for it to grow */
            config.window_bytes = b ? (size_t)1 << 20 : 0;
        TEST_OK(ep_buffer_create(group, &config, &buffers[b]));
    }
    for (int i = 0; i < batch->count && !failed; i++) {
        int place = (int)rng_below(&rng, LIVE), buffer = (int)rng_below(&rng, BUFFERS);
        if (live[place].data)
            failed = retire(&live[place], &rng);
        if (!failed)
            failed = scenario_dispatch(batch->data[i], buffers[buffer], &live[place]);
    }
    for (int i = 0; i < LIVE && !failed; i++)
        if (live[i].data)
            failed = retire(&live[i], &rng);
    for (int b = 0; b < BUFFERS && !failed; b++)
        ep_buffer_destroy(buffers[b]);
    test_device_leave();
    return failed;
}

static int run_batch(const char *transport, int num_ranks, struct rng *rng)
{
    struct scenario_limits limits = {
        .num_ranks = num_ranks, .max_tokens = 20, .max_hidden = 300, .max_experts = 24};
    struct batch batch = {test_zeros(BATCH, sizeof(void *)), BATCH, (int)rng_below(rng, 4),
                          rng_next(rng)};
    for (int i = 0; i < BATCH; i++) {
        struct scenario scenario = scenario_random(rng, &limits, "stress");
        batch.data[i] = scenario_build(&scenario);
    }
    int failed = test_run_groups(transport, num_ranks, run_rank, &batch);
    for (int i = 0; i < BATCH; i++)
        scenario_free(batch.data[i]);
    free(batch.data);
    return failed;
}

/* A dispatch makes two and a half calls on average beside itself. */
static void many_calls(void **state)
{
    (void)state;
    int64_t calls = rng_env_number("EP_STRESS_CALLS", 400);
    uint64_t seed = rng_env_seed(1);
    for (const char *const *transport = world_transports; *transport; transport++) {
        struct rng rng;
        rng_seed(&rng, seed);
        for (int64_t done = 0; done < calls; done += BATCH * 3)
            if (run_batch(test_transport(*transport), (int)rng_range(&rng, 2, 5), &rng))
                fail_msg("over %s: EP_TEST_SEED=%llu EP_STRESS_CALLS=%lld", *transport,
                         (unsigned long long)seed, (long long)calls);
        if (test_device_wanted())
            break; /* the others would be the same once more */
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(many_calls)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
