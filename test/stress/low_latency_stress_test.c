/* SPDX-License-Identifier: MIT */
/*
 * Thousands of calls of both modes by turns, shapes changing, two batches in
 * flight, hooks run in any order, while notifications come late, twice and out of
 * order. EP_STRESS_CALLS of the environment sets how many steps each setting makes.
 * ctest-timeout: 600
 */
#include "support/load.h"
#include "support/on_device.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/tensors.h"
#include "support/test.h"

#if defined(__SANITIZE_THREAD__)
#define DEFAULT_STEPS 300
#else
#define DEFAULT_STEPS 1500
#endif

typedef struct setting {
    const char *transport;
    int num_ranks, num_threads, verify;
} setting;

static int stress(ep_group *group, void *arg)
{
    const setting *set = arg;
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    load_rank load = {.group = group, .hooks = true};
    uint64_t steps = (uint64_t)rng_env_number("EP_STRESS_CALLS", DEFAULT_STEPS);
    uint64_t seed = rng_env_seed(1) * 1000003;
    config.num_threads = set->num_threads;
    config.verify = set->verify;
    TEST_OK(ep_buffer_create(group, &config, &load.buffer));
    for (uint64_t i = seed; i < seed + steps; i++) {
        ep_status status = EP_OK;
        TEST_CHECK((i % 3 ? load_step : load_overlap)(&load, i, &status) == 0);
        TEST_OK(status);
    }
    ep_buffer_destroy(load.buffer);
    return 0;
}

static void run(const setting *set)
{
    int failed =
        test_run_groups(test_transport(set->transport), set->num_ranks, stress, (void *)set);
    if (failed)
        fprintf(stderr, "  on %s, %d ranks, %d threads, EP_TEST_SEED=%llu\n", set->transport,
                set->num_ranks, set->num_threads, (unsigned long long)rng_env_seed(1));
    assert_int_equal(failed, 0);
}

static void as_threads(void **state)
{
    (void)state;
    static const setting settings[] = {
        {"threads", 3, 0, 0},
        {"threads", 4, 2, 1},
        {"fault(threads):delay_us=100,reorder=1,repeat=20,seed=1", 4, 0, 0},
        {"fault(threads):delay_us=300,reorder=1,repeat=20,seed=2", 3, 1, 1},
        {"fault(threads):delay_us=20,seed=3", 2, 0, 0},
    };
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        if (!test_device_wanted() || settings[i].transport[0] == 't') /* faults: of the host's */
            run(&settings[i]);
}

#if !defined(__SANITIZE_THREAD__) /* which sees nothing of other processes */
static void as_processes(void **state)
{
    (void)state;
    if (test_device_wanted())
        skip(); /* the same once more */
    static const setting settings[] = {
        {"shm", 4, 0, 0},
        {"shm", 3, 2, 1},
        {"fault(shm):delay_us=100,reorder=1,repeat=20,seed=4", 4, 1, 0},
    };
    for (size_t i = 0; i < sizeof settings / sizeof *settings; i++)
        run(&settings[i]);
}
#endif

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(as_threads),
#if !defined(__SANITIZE_THREAD__)
        cmocka_unit_test(as_processes),
#endif
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
