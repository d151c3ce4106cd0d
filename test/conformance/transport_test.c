/* SPDX-License-Identifier: MIT */
/* ctest-timeout: 300 */
/* What src/transport/ops.h promises, on every transport. */
#include "ep/group.h"
#include "ep/wait.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/test.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#define SECOND_NS INT64_C(1000000000)
#define MIB ((size_t)1 << 20)

static const char *const transports[] = {
    "threads",
    "shm",
    "fault(threads):seed=3,delay_us=300,reorder=1,repeat=30",
    "fault(shm):seed=4,delay_us=300,reorder=1,repeat=30",
};

/* Runs a body on every transport. */
static void on_all(int num_ranks, test_group_fn body, void *arg)
{
    for (size_t i = 0; i < sizeof transports / sizeof *transports; i++) {
        int failed = test_run_groups(transports[i], num_ranks, body, arg);
        if (failed > 0)
            print_error("%d ranks failed on %s\n", failed, transports[i]);
        assert_int_equal(failed, 0);
    }
}

static bool is_fault(const ep_group *group)
{
    return strcmp(ep_group_transport(group), "fault") == 0;
}

static ep_status make_window(ep_group *group, size_t reserve, size_t committed, epi_window **window)
{
    return group->transport->ops->window_create(group->transport, reserve, committed, window);
}

static void drop_window(ep_group *group, epi_window *window)
{
    group->transport->ops->window_destroy(window);
}

/* Sleeps on the window until (source, slot) is at least `value`, each time for up to ten seconds,
   which no sleeper that is woken as promised ever takes. */
static int await(ep_group *group, epi_window *window, int source, int slot, uint64_t value)
{
    const epi_transport_ops *ops = group->transport->ops;
    int64_t start = test_now_ms();
    while (epi_slot_load(window, source, slot) < value) {
        uint32_t ticket = ops->sleep_begin(window);
        if (epi_slot_load(window, source, slot) >= value)
            ops->sleep_cancel(window);
        else
            ops->sleep(window, ticket, 10 * SECOND_NS);
        TEST_CHECK(test_now_ms() - start < 9000);
    }
    return 0;
}

static void notify_all(ep_group *group, epi_window *window, int slot, uint64_t value)
{
    for (int rank = 0; rank < group->num_ranks; rank++)
        group->transport->ops->notify(window, rank, slot, value);
}

static int await_all(ep_group *group, epi_window *window, int slot, uint64_t value)
{
    for (int rank = 0; rank < group->num_ranks; rank++)
        TEST_CHECK(await(group, window, rank, slot, value) == 0);
    return 0;
}

static int starts_zero(ep_group *group, void *arg)
{
    (void)arg;
    for (int round = 0; round < 3; round++) {
        epi_window *window;
        TEST_OK(make_window(group, 8 * MIB, MIB + 1, &window));
        TEST_CHECK(window->reserve == 8 * MIB);
        TEST_CHECK(window->committed >= MIB + 1 && window->committed < MIB + 65537);
        TEST_CHECK(window->peer[group->rank] == window->base);
        for (int rank = 0; rank < group->num_ranks; rank++)
            for (size_t i = 0; i < MIB + 1; i++)
                TEST_CHECK(window->peer[rank][i] == 0);
        TEST_OK(ep_group_barrier(group));
        memset(window->base, 0xa5, MIB); /* must not shine through in the next round */
        drop_window(group, window);
    }
    return 0;
}

static void windows_start_zero(void **state)
{
    (void)state;
    on_all(3, starts_zero, NULL);
}

/* Everybody writes into everybody's window, notifies, and finds all that was written. */
static int sees_what_was_written(ep_group *group, void *arg)
{
    (void)arg;
    enum { WORDS = 512 };
    int ranks = group->num_ranks, me = group->rank;
    size_t head = epi_control_bytes(ranks);
    size_t bytes = head + (size_t)ranks * WORDS * sizeof(uint64_t);
    epi_window *window;
    TEST_OK(make_window(group, bytes, bytes, &window));
    for (uint64_t round = 1; round <= 60; round++) {
        for (int rank = 0; rank < ranks; rank++) {
            uint64_t *to = (uint64_t *)(window->peer[rank] + head) + me * WORDS;
            for (int i = 0; i < WORDS; i++)
                to[i] = round * 1000003 + (uint64_t)(me * ranks + rank) * WORDS + (uint64_t)i;
        }
        notify_all(group, window, 3, round);
        TEST_CHECK(await_all(group, window, 3, round) == 0);
        for (int rank = 0; rank < ranks; rank++) {
            const uint64_t *from = (const uint64_t *)(window->base + head) + rank * WORDS;
            for (int i = 0; i < WORDS; i++)
                TEST_CHECK(from[i] ==
                           round * 1000003 + (uint64_t)(rank * ranks + me) * WORDS + (uint64_t)i);
        }
        notify_all(group, window, 4, round); /* read: may be written again */
        TEST_CHECK(await_all(group, window, 4, round) == 0);
    }
    drop_window(group, window);
    return 0;
}

static void notified_is_visible(void **state)
{
    (void)state;
    on_all(2, sees_what_was_written, NULL);
    on_all(5, sees_what_was_written, NULL);
}

/* A word takes the largest value notified, whatever the order, and never falls. */
static int takes_the_largest(ep_group *group, void *arg)
{
    (void)arg;
    static const uint64_t values[] = {5, 3, 5, UINT64_MAX - 1, 9, 7, 0, 1};
    epi_window *window;
    TEST_OK(make_window(group, 65536, 65536, &window));
    int next = (group->rank + 1) % group->num_ranks;
    int previous = (group->rank + group->num_ranks - 1) % group->num_ranks;
    for (size_t i = 0; i < sizeof values / sizeof *values; i++)
        group->transport->ops->notify(window, next, EPI_NUM_SLOTS - 1, values[i]);
    uint64_t seen = 0;
    int64_t start = test_now_ms();
    while (seen != UINT64_MAX - 1) {
        uint64_t now = epi_slot_load(window, previous, EPI_NUM_SLOTS - 1);
        TEST_CHECK(now >= seen && test_now_ms() - start < 10000);
        seen = now;
    }
    for (int64_t until = test_now_ms() + 20; test_now_ms() < until;)
        TEST_CHECK(epi_slot_load(window, previous, EPI_NUM_SLOTS - 1) == UINT64_MAX - 1);
    for (int slot = 0; slot < EPI_NUM_SLOTS; slot++) /* and no other word is touched */
        for (int rank = 0; rank < group->num_ranks; rank++)
            TEST_CHECK(epi_slot_load(window, rank, slot) ==
                       (slot == EPI_NUM_SLOTS - 1 && rank == previous ? UINT64_MAX - 1 : 0));
    TEST_OK(ep_group_barrier(group));
    drop_window(group, window);
    return 0;
}

static void words_only_grow(void **state)
{
    (void)state;
    on_all(3, takes_the_largest, NULL);
}

/* Two ranks answer each other, each after a pause of random length, so that notifications meet the
   other at every point between looking, announcing its sleep and sleeping. */
static int ping_pong(ep_group *group, void *arg)
{
    uint64_t rounds = *(const uint64_t *)arg;
    if (is_fault(group))
        rounds /= 100;
    epi_window *window;
    TEST_OK(make_window(group, 65536, 65536, &window));
    int other = 1 - group->rank;
    struct rng rng;
    rng_seed(&rng, rng_env_seed(7) + (uint64_t)group->rank);
    for (uint64_t round = 1; round <= rounds; round++) {
        if (group->rank == 0)
            group->transport->ops->notify(window, other, 0, round);
        TEST_CHECK(await(group, window, other, 0, round) == 0);
        for (uint64_t spin = rng_below(&rng, 200); spin > 0; spin--)
            atomic_signal_fence(memory_order_seq_cst);
        if (group->rank == 1)
            group->transport->ops->notify(window, other, 0, round);
    }
    TEST_OK(ep_group_barrier(group));
    drop_window(group, window);
    return 0;
}

static void no_wake_up_is_lost(void **state)
{
    (void)state;
    uint64_t rounds = (uint64_t)rng_env_number("EP_TEST_ROUNDS", 100000);
    on_all(2, ping_pong, &rounds);
}

/* Many sources at once, with more ranks than cores. */
static int all_to_all(ep_group *group, void *arg)
{
    uint64_t rounds = *(const uint64_t *)arg;
    epi_window *window;
    TEST_OK(make_window(group, 65536, 65536, &window));
    for (uint64_t round = 1; round <= rounds; round++) {
        notify_all(group, window, (int)(round % 2), round);
        TEST_CHECK(await_all(group, window, (int)(round % 2), round) == 0);
    }
    TEST_OK(ep_group_barrier(group));
    drop_window(group, window);
    return 0;
}

static void many_sources(void **state)
{
    (void)state;
    uint64_t rounds = 300;
    on_all(8, all_to_all, &rounds);
}

/* Peers write to memory that was committed after they had mapped the window. */
static int grows(ep_group *group, void *arg)
{
    (void)arg;
    epi_window *window;
    size_t reserve = 64 * MIB;
    TEST_OK(make_window(group, reserve, 65536, &window));
    uint64_t round = 0;
    for (size_t size = 65536; size <= reserve; size *= 4) {
        round++;
        TEST_OK(group->transport->ops->window_commit(window, size));
        TEST_CHECK(window->committed >= size);
        notify_all(group, window, 0, round);
        TEST_CHECK(await_all(group, window, 0, round) == 0);
        for (int rank = 0; rank < group->num_ranks; rank++) {
            window->peer[rank][size - 1 - (size_t)group->rank] = (uint8_t)(round + 1);
            window->peer[rank][size / 2 + 1 + (size_t)group->rank] = (uint8_t)(round + 2);
        }
        notify_all(group, window, 1, round);
        TEST_CHECK(await_all(group, window, 1, round) == 0);
        for (int rank = 0; rank < group->num_ranks; rank++) {
            TEST_CHECK(window->base[size - 1 - (size_t)rank] == (uint8_t)(round + 1));
            TEST_CHECK(window->base[size / 2 + 1 + (size_t)rank] == (uint8_t)(round + 2));
        }
    }
    TEST_OK(group->transport->ops->window_commit(window, 1)); /* never shrinks */
    TEST_CHECK(window->committed == reserve);
    TEST_CHECK(group->transport->ops->window_commit(window, reserve + 1) == EP_ERR_ARGUMENT);
    TEST_CHECK(strcmp(ep_last_error(), "window commit of 67108865 bytes; at most 67108864 are "
                                       "reserved") == 0);
    drop_window(group, window);
    return 0;
}

static void commit_is_visible(void **state)
{
    (void)state;
    on_all(3, grows, NULL);
}

/* Pages past the committed head come and go; dropped ones read as zero when they are back. */
static int backs_and_drops(ep_group *group, void *arg)
{
    (void)arg;
    const epi_transport_ops *ops = group->transport->ops;
    const size_t from = 20 * MIB, to = 24 * MIB;
    epi_window *window;
    TEST_OK(make_window(group, 64 * MIB, 65536, &window));
    for (uint64_t round = 1; round <= 4; round++) {
        TEST_OK(ops->window_back(window, from, to));
        TEST_CHECK(window->committed == 65536);
        for (size_t i = from; i < to; i += 512)
            TEST_CHECK(window->base[i] == 0);
        notify_all(group, window, 0, round);
        TEST_CHECK(await_all(group, window, 0, round) == 0);
        for (int rank = 0; rank < group->num_ranks; rank++)
            memset(window->peer[rank] + from + MIB * (size_t)group->rank, 7 + group->rank, MIB);
        notify_all(group, window, 1, round);
        TEST_CHECK(await_all(group, window, 1, round) == 0);
        for (int rank = 0; rank < group->num_ranks; rank++)
            TEST_CHECK(window->base[from + MIB * (size_t)rank + MIB - 1] == 7 + rank);
        ops->window_drop(window, from, to);
    }
    TEST_OK(ops->window_back(window, from, from));
    TEST_CHECK(ops->window_back(window, from, 65 * MIB) == EP_ERR_ARGUMENT);
    TEST_CHECK(ops->window_back(window, to, from) == EP_ERR_ARGUMENT);
    drop_window(group, window);
    return 0;
}

static void pages_come_and_go(void **state)
{
    (void)state;
    on_all(3, backs_and_drops, NULL);
}

static size_t more_than_there_is(void)
{
    FILE *file = fopen("/proc/meminfo", "r");
    unsigned long long kib = 0;
    if (file != NULL && fscanf(file, "MemTotal: %llu kB", &kib) != 1)
        kib = 0;
    if (file != NULL)
        fclose(file);
    return (size_t)kib * 1024 + 64 * MIB;
}

/* A commit that cannot be backed fails, and the window stays as it was. */
static int refuses_too_much(ep_group *group, void *arg)
{
    (void)arg;
    size_t much = more_than_there_is();
    epi_window *window;
    TEST_OK(make_window(group, 2 * much, 65536, &window));
    TEST_CHECK(group->transport->ops->window_commit(window, much) == EP_ERR_MEMORY);
    TEST_CHECK(window->committed == 65536);
    TEST_OK(group->transport->ops->window_commit(window, 131072));
    memset(window->base + 65536, 1, 65536);
    TEST_OK(ep_group_barrier(group));
    drop_window(group, window);
    return 0;
}

static void too_much_is_refused(void **state)
{
    (void)state;
    on_all(2, refuses_too_much, NULL);
}

/* Pieces of any length at any address, more of them than one system call takes. */
static int reads_peers(ep_group *group, void *arg)
{
    (void)arg;
    enum { PIECES = 2600, BYTES = 300000 };
    epi_transport *transport = group->transport;
    if (!transport->ops->can_peer_read(transport))
        return 0;
    uint8_t *mine = malloc(BYTES), *copy = malloc(BYTES);
    epi_remote_read *reads = malloc(PIECES * sizeof *reads);
    uint64_t address[8], own = (uint64_t)(uintptr_t)mine;
    for (int i = 0; i < BYTES; i++)
        mine[i] = (uint8_t)(i * 7 + group->rank);
    TEST_OK(ep_group_allgather(group, &own, address, sizeof own));
    struct rng rng;
    rng_seed(&rng, rng_env_seed(11));
    for (int rank = 0; rank < group->num_ranks; rank++) {
        size_t at = 0;
        memset(copy, 0, BYTES);
        for (int i = 0; i < PIECES; i++) {
            size_t bytes = (size_t)rng_below(&rng, 2 * BYTES / PIECES);
            if (bytes > BYTES - at)
                bytes = BYTES - at;
            reads[i] = (epi_remote_read){address[rank] + at, copy + at, bytes};
            at += bytes;
        }
        TEST_OK(transport->ops->peer_read(transport, rank, reads, PIECES));
        for (size_t i = 0; i < at; i++)
            TEST_CHECK(copy[i] == (uint8_t)((int)i * 7 + rank));
    }
    TEST_OK(transport->ops->peer_read(transport, 0, reads, 0));
    TEST_OK(ep_group_barrier(group));
    free(mine);
    free(copy);
    free(reads);
    return 0;
}

static void peers_are_read(void **state)
{
    (void)state;
    on_all(3, reads_peers, NULL);
}

/* Where one rank cannot make its window, all get its error and go on to the next. */
static int agrees_on_errors(ep_group *group, void *arg)
{
    (void)arg;
    epi_window *window = NULL;
    const char *expected = group->rank == 1 ? "" : "rank 1: ";
    char message[200];
    snprintf(message, sizeof message, "%swindow commit of 131072 bytes; at most 65536 are reserved",
             expected);
    TEST_CHECK(make_window(group, 65536, group->rank == 1 ? 131072 : 65536, &window) ==
               EP_ERR_ARGUMENT);
    TEST_CHECK(strcmp(ep_last_error(), message) == 0);
    TEST_CHECK(window == NULL);
    TEST_OK(make_window(group, 65536, 65536, &window));
    TEST_OK(ep_group_barrier(group));
    drop_window(group, window);
    return 0;
}

static void errors_are_agreed(void **state)
{
    (void)state;
    on_all(4, agrees_on_errors, NULL);
}

/* A window that its owner has destroyed can still be written and notified by peers. */
static int outlives_its_owner(ep_group *group, void *arg)
{
    (void)arg;
    epi_window *window;
    TEST_OK(make_window(group, 65536, 65536, &window));
    if (group->rank == 0)
        drop_window(group, window);
    TEST_OK(ep_group_barrier(group));
    if (group->rank != 0) {
        memset(window->peer[0] + 32768 + 1024 * group->rank, 1, 1024);
        group->transport->ops->notify(window, 0, 0, 1);
        drop_window(group, window);
    }
    TEST_OK(ep_group_barrier(group));
    return 0;
}

static void windows_outlive_their_owner(void **state)
{
    (void)state;
    on_all(3, outlives_its_owner, NULL);
}

static int sleeps_for_a_while(ep_group *group, void *arg)
{
    (void)arg;
    const epi_transport_ops *ops = group->transport->ops;
    epi_window *window;
    TEST_OK(make_window(group, 65536, 65536, &window));
    int64_t start = ops->now_ns(group->transport), slept = 0;
    for (int i = 0; i < 50 && slept < SECOND_NS / 50; i++) {
        ops->sleep(window, ops->sleep_begin(window), SECOND_NS / 50);
        slept = ops->now_ns(group->transport) - start;
    }
    TEST_CHECK(slept >= SECOND_NS / 50);
    ops->sleep(window, ops->sleep_begin(window), -5); /* past: returns */
    TEST_CHECK(ops->ranks_per_core(group->transport) >= 1);
    TEST_OK(ep_group_barrier(group));
    drop_window(group, window);
    return 0;
}

static void sleep_is_bounded(void **state)
{
    (void)state;
    on_all(2, sleeps_for_a_while, NULL);
}

/* Rank r may run on core_of[r] alone, anywhere for -1. */
static int counts_ranks_per_core(int rank, int num_ranks, void *arg)
{
    const int *core_of = arg;
    cpu_set_t all, one;
    TEST_CHECK(sched_getaffinity(0, sizeof all, &all) == 0);
    int cores = CPU_COUNT(&all), first = 0;
    while (!CPU_ISSET(first, &all))
        first++;
    if (core_of[rank] >= 0) {
        int core = first;
        for (int skip = core_of[rank]; skip > 0; skip--)
            do
                core++;
            while (!CPU_ISSET(core, &all));
        CPU_ZERO(&one);
        CPU_SET(core, &one);
        TEST_CHECK(sched_setaffinity(0, sizeof one, &one) == 0);
    }
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = rank;
    config.num_ranks = num_ranks;
    ep_group *group = NULL;
    TEST_OK(ep_group_create(&config, &group));
    int expected = core_of[0] < 0 ? (num_ranks + cores - 1) / cores : core_of[num_ranks + rank];
    TEST_CHECK(group->transport->ops->ranks_per_core(group->transport) == expected);
    ep_group_destroy(group);
    return 0;
}

static void cores_are_counted(void **state)
{
    (void)state;
    cpu_set_t all;
    /* core of each rank, then how many ranks each finds on its core */
    int free_ranks[] = {-1, -1, -1, 0, 0, 0}, together[] = {0, 0, 0, 3, 3, 3},
        apart[] = {0, 1, 1, 1, 2, 2};
    assert_int_equal(test_run_processes(3, counts_ranks_per_core, free_ranks), 0);
    assert_int_equal(test_run_processes(3, counts_ranks_per_core, together), 0);
    if (sched_getaffinity(0, sizeof all, &all) == 0 && CPU_COUNT(&all) >= 2)
        assert_int_equal(test_run_processes(3, counts_ranks_per_core, apart), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(windows_start_zero),  cmocka_unit_test(notified_is_visible),
        cmocka_unit_test(words_only_grow),     cmocka_unit_test(no_wake_up_is_lost),
        cmocka_unit_test(many_sources),        cmocka_unit_test(commit_is_visible),
        cmocka_unit_test(too_much_is_refused), cmocka_unit_test(peers_are_read),
        cmocka_unit_test(errors_are_agreed),   cmocka_unit_test(windows_outlive_their_owner),
        cmocka_unit_test(sleep_is_bounded),    cmocka_unit_test(pages_come_and_go),
        cmocka_unit_test(cores_are_counted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
