/* SPDX-License-Identifier: MIT */
/*
 * Ranks lost under load: those that are left mask them, get in step and go on in
 * both modes with no row lost or twice; a rank that comes back is taken in again
 * without the others restarting.
 * ctest-timeout: 300
 */
#include "support/load.h"
#include "support/on_device.h"
#include "support/ranks.h"
#include "support/tensors.h"
#include "support/test.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { RANKS = 4, CALM = 30, LAST = 150 };

enum loss { KILLED, KILLED_IN_CALL, DIES_BY_FAULT, STOPS };

typedef struct plan {
    const char *transport;
    enum loss loss;
    int victims[2], num_victims;
    uint64_t at[2]; /* step at which each goes */
    bool comes_back;
    int num_threads;
    bool hooks;
    int64_t timeout_ms;
    ep_thread_world *world;
} plan;

static bool is_victim(const plan *p, int rank, uint64_t *at)
{
    for (int i = 0; i < p->num_victims; i++)
        if (p->victims[i] == rank) {
            *at = p->at[i];
            return true;
        }
    return false;
}

static ep_group_config config_of(const plan *p, int rank)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = rank;
    config.num_ranks = RANKS;
    config.transport = p->transport;
    config.timeout_ms = p->timeout_ms;
    config.world = p->world;
    return config;
}

/* Masks whoever was late and gets in step with the others, until that succeeds. */
static ep_status get_in_step(ep_group *group)
{
    ep_status status;
    do {
        uint8_t late[RANKS];
        ep_group_query_late(group, late);
        for (int r = 0; r < RANKS; r++)
            if (late[r] && r != ep_group_rank(group))
                ep_group_mask(group, r, 1);
        status = ep_group_recover(group);
    } while (status == EP_ERR_TIMEOUT);
    return status;
}

static int count_masked(ep_group *group)
{
    uint8_t masked[RANKS];
    int count = 0;
    ep_group_query_masks(group, masked);
    for (int r = 0; r < RANKS; r++)
        count += masked[r];
    return count;
}

/* Takes back whoever is masked, lowest first. A buffer on a device takes nobody back: there is a
   new one, as the rank that comes makes one. */
static int take_back(load_rank *load)
{
    ep_group *group = load->group;
    uint8_t masked[RANKS];
    bool anew = test_device_wanted() && count_masked(group) > 0;
    ep_group_query_masks(group, masked);
    for (int r = 0; r < RANKS && anew; r++)
        TEST_CHECK(!masked[r] || ep_group_readmit(group, r) == EP_ERR_UNSUPPORTED);
    if (anew) {
        ep_buffer_destroy(load->buffer);
        load->buffer = NULL;
    }
    for (int r = 0; r < RANKS; r++)
        if (masked[r])
            TEST_OK(ep_group_readmit(group, r));
    TEST_CHECK(count_masked(group) == 0);
    if (anew)
        TEST_OK(ep_buffer_create(group, NULL, &load->buffer));
    return 0;
}

static bool is_own_end(ep_status status)
{
    return status == EP_ERR_RANK_DEAD && strstr(ep_last_error(), "this one") != NULL;
}

/* Ends this rank while it waits for the others in a call, which they make later. */
static void end_in_call(bool victim)
{
    struct timespec pause = {0, 300000000};
    if (!victim) {
        nanosleep(&pause, NULL);
        return;
    }
    pid_t rank = getpid();
    if (fork() == 0) {
        pause.tv_nsec /= 2;
        nanosleep(&pause, NULL);
        kill(rank, SIGKILL);
        _exit(0);
    }
}

/* Steps on to the last. After a failure all that are left repeat from the least step any is at. */
static int go_on(load_rank *load, const plan *p, uint64_t step)
{
    uint64_t at = LAST + 1, most, calm_since = 0;
    int rank = ep_group_rank(load->group);
    bool victim = is_victim(p, rank, &at) && step == 0;
    while (step < LAST) {
        if (victim && step == at && p->loss == KILLED)
            kill(getpid(), SIGKILL);
        if (p->loss == KILLED_IN_CALL && step == p->at[0] && count_masked(load->group) == 0)
            end_in_call(victim);
        else if (victim && step == at)
            return 2;
        if (p->comes_back && calm_since && step == calm_since + CALM) {
            TEST_CHECK(take_back(load) == 0);
            TEST_OK(load_agree(load, step, &step, &most));
            calm_since = 0;
        }
        ep_status status;
        TEST_CHECK(load_step(load, step, &status) == 0);
        if (status == EP_OK) {
            step++;
            continue;
        }
        if (victim && p->loss == DIES_BY_FAULT && is_own_end(status))
            return 2;
        status = get_in_step(load->group);
        /* where another rank's word of the failure came first, it learns of its end only here */
        if (victim && p->loss == DIES_BY_FAULT && is_own_end(status))
            return 2;
        TEST_OK(status);
        TEST_OK(load_agree(load, step, &step, &most));
        TEST_CHECK(most - step <= 1);
        calm_since = step;
    }
    TEST_CHECK(count_masked(load->group) == (p->comes_back ? 0 : p->num_victims));
    return 0;
}

static int live(const plan *p, int rank, bool again)
{
    ep_group_config config = config_of(p, rank);
    ep_buffer_config buffer_config = EP_BUFFER_CONFIG_INIT;
    load_rank load = {.hooks = p->hooks};
    uint64_t step = 0, most;
    config.rejoin = again;
    if (again) { /* the others come to take it back when they have calmed down */
        config.timeout_ms = 60000;
    }
    buffer_config.num_threads = p->num_threads;
    TEST_OK(ep_group_create(&config, &load.group));
    TEST_OK(ep_group_set_timeout_ms(load.group, p->timeout_ms));
    TEST_OK(ep_buffer_create(load.group, &buffer_config, &load.buffer));
    if (again) /* with the others from here on, so also in taking the next one back */
        TEST_CHECK(take_back(&load) == 0);
    if (again)
        TEST_OK(load_agree(&load, LAST, &step, &most));
    int result = go_on(&load, p, step);
    if (result == 1)
        return 1;
    if (result == 2 && p->loss == STOPS && !p->comes_back) { /* there, but does nothing */
        struct timespec pause = {0, 5 * p->timeout_ms * 1000000};
        nanosleep(&pause, NULL);
    }
    ep_buffer_destroy(load.buffer);
    ep_group_destroy(load.group);
    if (result == 2 && p->comes_back)
        return live(p, rank, true);
    return 0;
}

static int first_life(int rank, int num_ranks, void *arg)
{
    (void)num_ranks;
    return live(arg, rank, false);
}

#if !defined(__SANITIZE_THREAD__) /* which sees nothing of other processes */
static int second_life(int rank, int num_ranks, void *arg)
{
    (void)num_ranks;
    return live(arg, rank, true);
}

static void run_processes(plan *p)
{
    test_processes processes;
    if (test_device_wanted()) /* whose kernels see no rank end: they wait for it */
        p->timeout_ms = 3000;
    assert_int_equal(test_processes_start(&processes, RANKS, first_life, p), 0);
    for (int i = 0; i < p->num_victims && p->comes_back && p->loss != STOPS; i++)
        assert_int_equal(test_processes_replace(&processes, p->victims[i], second_life, p), 0);
    test_processes_wait(&processes, 200000);
    for (int r = 0; r < RANKS; r++) {
        uint64_t at;
        bool killed = p->loss == KILLED || p->loss == KILLED_IN_CALL;
        int expected = !p->comes_back && killed && is_victim(p, r, &at) ? 256 + 9 : 0;
        assert_int_equal(processes.result[r], expected);
    }
}

#endif

static void run_threads(plan *p)
{
    if (test_device_wanted())
        return;
    assert_int_equal(ep_thread_world_create(RANKS, &p->world), EP_OK);
    assert_int_equal(test_run_threads(RANKS, first_life, p), 0);
    ep_thread_world_destroy(p->world);
}

#if defined(__SANITIZE_THREAD__)
#define TIMEOUT_MS 3000
#else
#define TIMEOUT_MS 1000
#endif

static void threads_stop(void **state)
{
    (void)state;
    plan p = {.transport = "threads",
              .loss = STOPS,
              .victims = {2},
              .num_victims = 1,
              .at = {40},
              .timeout_ms = TIMEOUT_MS,
              .hooks = true};
    run_threads(&p);
    p.victims[0] = 0;
    p.num_threads = 2;
    p.at[0] = 0; /* before it has made any call */
    run_threads(&p);
}

static void threads_die_by_fault(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        char transport[80];
        snprintf(transport, sizeof transport,
                 "fault(threads):kill_rank=%d,kill_at=%d,delay_us=50,reorder=1,seed=%d", i,
                 300 + 97 * i, i);
        plan p = {.transport = transport,
                  .loss = DIES_BY_FAULT,
                  .victims = {i},
                  .num_victims = 1,
                  .at = {LAST + 1},
                  .timeout_ms = TIMEOUT_MS,
                  .hooks = true};
        run_threads(&p);
    }
}

static void threads_come_back(void **state)
{
    (void)state;
    plan p = {.transport = "threads",
              .loss = STOPS,
              .victims = {1},
              .num_victims = 1,
              .at = {25},
              .timeout_ms = TIMEOUT_MS,
              .comes_back = true,
              .hooks = true};
    run_threads(&p);
    p = (plan){.transport = "fault(threads):delay_us=50,reorder=1",
               .loss = STOPS,
               .victims = {0, 3},
               .num_victims = 2,
               .at = {20, 20},
               .timeout_ms = TIMEOUT_MS,
               .comes_back = true,
               .num_threads = 1};
    run_threads(&p);
}

#if !defined(__SANITIZE_THREAD__)
static void processes_are_killed(void **state)
{
    (void)state;
    plan p = {.transport = "shm",
              .loss = KILLED,
              .victims = {0},
              .num_victims = 1,
              .at = {33},
              .timeout_ms = 20000,
              .hooks = true};
    run_processes(&p);
    p = (plan){.transport = "shm",
               .loss = KILLED,
               .victims = {3, 1},
               .num_victims = 2,
               .at = {20, 60},
               .timeout_ms = 20000,
               .num_threads = 1};
    run_processes(&p);
}

static void processes_are_killed_in_a_call(void **state)
{
    (void)state;
    if (test_device_wanted())
        skip(); /* MPS takes the other ranks' kernels down with those of a killed one */
    plan p = {.transport = "shm",
              .loss = KILLED_IN_CALL,
              .victims = {2},
              .num_victims = 1,
              .at = {33},
              .timeout_ms = 20000,
              .hooks = true};
    run_processes(&p);
    p.comes_back = true;
    run_processes(&p);
}

static void processes_come_back(void **state)
{
    (void)state;
    plan p = {.transport = "shm",
              .loss = KILLED,
              .victims = {2},
              .num_victims = 1,
              .at = {33},
              .timeout_ms = 20000,
              .comes_back = true,
              .hooks = true};
    run_processes(&p);
    p.victims[0] = 0; /* the one that passes words on in the beginning */
    run_processes(&p);
    if (test_device_wanted())
        return; /* of two the first to come would make its buffer before the second is there */
    p = (plan){.transport = "shm",
               .loss = KILLED,
               .victims = {1, 2},
               .num_victims = 2,
               .at = {20, 20},
               .timeout_ms = 20000,
               .comes_back = true,
               .num_threads = 1};
    run_processes(&p);
}
#endif

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(threads_stop),
        cmocka_unit_test(threads_die_by_fault),
        cmocka_unit_test(threads_come_back),
#if !defined(__SANITIZE_THREAD__)
        cmocka_unit_test(processes_are_killed),
        cmocka_unit_test(processes_come_back),
        cmocka_unit_test(processes_are_killed_in_a_call),
#endif
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
