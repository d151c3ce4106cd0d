/* SPDX-License-Identifier: MIT */
/* Groups on every transport: barrier, all-gather, late ranks, arguments, leaks. */
#include "ep/group.h"
#include "support/ranks.h"
#include "support/test.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>

static const char *const transports[] = {
    "threads",
    "shm",
    "fault(threads):delay_us=200,reorder=1,repeat=30",
    "fault(shm):delay_us=200,reorder=1,repeat=30",
};

static void on_all(int num_ranks, test_group_fn body)
{
    for (size_t i = 0; i < sizeof transports / sizeof *transports; i++)
        assert_int_equal(test_run_groups(transports[i], num_ranks, body, NULL), 0);
}

static int gather_all_sizes(ep_group *group, void *arg)
{
    (void)arg;
    static const size_t sizes[] = {0, 1, 8, 4080, 4081, 70000, 1 << 20, 3};
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group);
    uint8_t *send = malloc(1 << 20), *recv = malloc((size_t)ranks << 20);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t bytes = sizes[i];
        memset(send, 16 * (int)i + rank, bytes);
        TEST_OK(ep_group_allgather(group, send, recv, bytes));
        for (int peer = 0; peer < ranks; peer++)
            for (size_t b = 0; b < bytes; b++)
                TEST_CHECK(recv[(size_t)peer * bytes + b] == (uint8_t)(16 * (int)i + peer));
    }
    free(send);
    free(recv);
    return 0;
}

static void all_gathers(void **state)
{
    (void)state;
    for (int ranks = 1; ranks <= 4; ranks++)
        on_all(ranks, gather_all_sizes);
}

static int many_barriers(ep_group *group, void *arg)
{
    (void)arg;
    for (int i = 0; i < 300; i++)
        TEST_OK(ep_group_barrier(group));
    return 0;
}

static void barriers(void **state)
{
    (void)state;
    on_all(8, many_barriers);
}

/* Nobody leaves a barrier before the last has come. */
static int counts_in(ep_group *group, void *arg)
{
    _Atomic int *count = arg;
    int ranks = ep_group_num_ranks(group);
    for (int round = 1; round <= 50; round++) {
        atomic_fetch_add(count, 1);
        TEST_OK(ep_group_barrier(group));
        TEST_CHECK(atomic_load(count) >= round * ranks);
    }
    return 0;
}

static void barriers_hold(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof transports / sizeof *transports; i++) {
        _Atomic int *count = test_shared_alloc(sizeof *count);
        assert_int_equal(test_run_groups(transports[i], 4, counts_in, count), 0);
        test_shared_free(count, sizeof *count);
    }
}

/* Ranks 1 and 2 stay away from a barrier: the others name them in time. Once all have come the
   group goes on as before. */
static int waits_for_the_late(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group);
    char message[128];
    snprintf(message, sizeof message, "barrier (call %llu): no word from ranks 1, 2 within 150 ms",
             (unsigned long long)group->epoch + 1);
    TEST_OK(ep_group_set_timeout_ms(group, 150));
    TEST_CHECK(ep_group_timeout_ms(group) == 150);
    int64_t start = test_now_ms();
    if (rank == 1 || rank == 2) {
        test_sleep_ms(600);
    } else {
        TEST_CHECK(ep_group_barrier(group) == EP_ERR_TIMEOUT);
        TEST_CHECK(strcmp(ep_last_error(), message) == 0);
        TEST_CHECK(test_now_ms() - start >= 150 && test_now_ms() - start < 590);
    }
    TEST_OK(ep_group_set_timeout_ms(group, 20000));
    if (rank == 1 || rank == 2)
        TEST_OK(ep_group_barrier(group));
    for (int i = 0; i < 10; i++)
        TEST_OK(ep_group_barrier(group));
    return gather_all_sizes(group, NULL);
}

static void late_ranks_are_named(void **state)
{
    (void)state;
    on_all(4, waits_for_the_late);
}

/* A rank that gave up one call and went on to the next: who still is in the first learns it. */
static int gives_up(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group);
    int32_t mine = rank, all[3];
    TEST_OK(ep_group_set_timeout_ms(group, rank == 2 ? 20000 : 100));
    if (rank == 2) {
        test_sleep_ms(400);
        TEST_OK(ep_group_allgather(group, &mine, all, sizeof mine)); /* call 1 */
        TEST_CHECK(all[0] == 0 && all[1] == 1);
        ep_status status = ep_group_allgather(group, &mine, all, sizeof mine); /* call 2 */
        TEST_CHECK(status == EP_OK && all[0] == 10 && all[1] == 11);
    } else {
        TEST_CHECK(ep_group_allgather(group, &mine, all, sizeof mine) == EP_ERR_TIMEOUT);
        TEST_OK(ep_group_set_timeout_ms(group, 20000));
        mine += 10;
        TEST_OK(ep_group_allgather(group, &mine, all, sizeof mine));
        TEST_CHECK(all[0] == 10 && all[1] == 11 && all[2] == 2);
    }
    return 0;
}

static void a_failed_call_spoils_none_later(void **state)
{
    (void)state;
    on_all(3, gives_up);
}

static int differs_in_bytes(ep_group *group, void *arg)
{
    (void)arg;
    uint8_t send[8] = {0}, recv[24];
    size_t bytes = ep_group_rank(group) == 1 ? 8 : 4;
    char message[128];
    TEST_CHECK(ep_group_allgather(group, send, recv, bytes) == EP_ERR_MISMATCH);
    if (bytes == 4)
        snprintf(message, sizeof message,
                 "all-gather (call %llu): 4 bytes on rank %d but 8 on rank 1",
                 (unsigned long long)group->epoch, ep_group_rank(group));
    else
        snprintf(message, sizeof message,
                 "all-gather (call %llu): 8 bytes on rank 1 but 4 on rank 0",
                 (unsigned long long)group->epoch);
    TEST_CHECK(strcmp(ep_last_error(), message) == 0);
    TEST_OK(ep_group_barrier(group));
    return 0;
}

static void different_sizes_are_named(void **state)
{
    (void)state;
    on_all(3, differs_in_bytes);
}

static int knows_its_node(ep_group *group, void *arg)
{
    (void)arg;
    TEST_CHECK(ep_group_num_nodes(group) == 2);
    TEST_CHECK(ep_group_node(group) == ep_group_rank(group) / 2);
    return 0;
}

static void nodes_are_consecutive_ranks(void **state)
{
    (void)state;
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.ranks_per_node = 2;
    config.transport = "threads";
    assert_int_equal(test_run_groups_with(&config, 4, knows_its_node, NULL), 0);
    config.transport = "shm";
    assert_int_equal(test_run_groups_with(&config, 4, knows_its_node, NULL), 0);
}

static void expect_bad(const ep_group_config *config, ep_status status, const char *message)
{
    ep_group *group = (ep_group *)config; /* anything but NULL */
    assert_int_equal(ep_group_create(config, &group), status);
    assert_null(group);
    assert_string_equal(ep_last_error(), message);
}

static ep_group_config alone(void)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = 0;
    config.num_ranks = 1;
    return config;
}

static void bad_transports_are_named(void **state)
{
    (void)state;
    ep_group_config config = alone();
    config.transport = "carrier pigeon";
    expect_bad(&config, EP_ERR_UNSUPPORTED,
               "ep_group_create: transport \"carrier pigeon\"; there are shm, threads and "
               "fault(NAME):KEY=VALUE,...");
    config.transport = "fault(shm";
    expect_bad(&config, EP_ERR_ARGUMENT,
               "ep_group_create: transport \"fault(shm\"; it can be fault(NAME) or "
               "fault(NAME):KEY=VALUE,...");
    config.transport = "fault(x):seed=1";
    expect_bad(
        &config, EP_ERR_UNSUPPORTED,
        "ep_group_create: transport \"x\"; there are shm, threads and fault(NAME):KEY=VALUE,...");
    config.transport = "fault(shm):seed=x";
    expect_bad(&config, EP_ERR_ARGUMENT,
               "ep_group_create: transport option seed is \"x\"; it can be 0..9223372036854775807");
    char longest[300];
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = '\0';
    config.transport = longest;
    expect_bad(&config, EP_ERR_ARGUMENT,
               "ep_group_create: transport has 299 characters; it can have up to 199");
}

/* A configuration from before the last members were added. */
static void smaller_configurations_are_taken(void **state)
{
    (void)state;
    ep_group_config config = alone();
    config.size = offsetof(ep_group_config, timeout_ms);
    config.timeout_ms = -77;
    config.transport = "not looked at";
    ep_group *group = NULL;
    assert_int_equal(ep_group_create(&config, &group), EP_OK);
    assert_int_equal(ep_group_timeout_ms(group), 30000);
    assert_string_equal(ep_group_transport(group), "shm");
    ep_group_destroy(group);
    ep_group_destroy(NULL);
}

/* Entries of a folder of /proc. */
static int count_entries(const char *path)
{
    DIR *folder = opendir(path);
    int count = 0;
    while (folder != NULL && readdir(folder) != NULL)
        count++;
    if (folder != NULL)
        closedir(folder);
    return count;
}

static int count_mappings(void)
{
    FILE *file = fopen("/proc/self/maps", "r");
    char line[512];
    int count = 0;
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        count += strstr(line, "/memfd:entrepot") != NULL;
    if (file != NULL)
        fclose(file);
    return count;
}

static int makes_and_drops(int rank, int num_ranks, void *arg)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = rank;
    config.num_ranks = num_ranks;
    config.transport = arg;
    int fds = 0, threads = 0;
    for (int i = 0; i < 12; i++) {
        ep_group *group = NULL;
        TEST_OK(ep_group_create(&config, &group));
        TEST_OK(ep_group_barrier(group));
        ep_group_destroy(group);
        if (i == 0) { /* what the first left may stay: buffers of the C library */
            fds = count_entries("/proc/self/fd");
            threads = count_entries("/proc/self/task");
        }
    }
    TEST_CHECK(count_entries("/proc/self/fd") == fds);
    TEST_CHECK(count_entries("/proc/self/task") == threads);
    TEST_CHECK(count_mappings() == 0);
    return 0;
}

static void nothing_is_left_behind(void **state)
{
    (void)state;
    char plain[] = "shm", fault[] = "fault(shm):delay_us=10,repeat=10";
    assert_int_equal(test_run_processes(4, makes_and_drops, plain), 0);
    assert_int_equal(test_run_processes(4, makes_and_drops, fault), 0);
}

/* Two groups at once in one process, told apart by name. */
static int uses_two_groups(ep_group *group, void *arg)
{
    (void)arg;
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = ep_group_num_ranks(group) - 1 - ep_group_rank(group); /* in another order */
    config.num_ranks = ep_group_num_ranks(group);
    config.name = "second";
    ep_group *second = NULL;
    TEST_OK(ep_group_create(&config, &second));
    for (int i = 0; i < 20; i++) {
        TEST_OK(ep_group_barrier(group));
        TEST_OK(ep_group_barrier(second));
    }
    ep_group_destroy(second);
    return 0;
}

static void groups_live_side_by_side(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("shm", 3, uses_two_groups, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_gathers),
        cmocka_unit_test(barriers),
        cmocka_unit_test(barriers_hold),
        cmocka_unit_test(late_ranks_are_named),
        cmocka_unit_test(a_failed_call_spoils_none_later),
        cmocka_unit_test(different_sizes_are_named),
        cmocka_unit_test(nodes_are_consecutive_ranks),
        cmocka_unit_test(bad_transports_are_named),
        cmocka_unit_test(smaller_configurations_are_taken),
        cmocka_unit_test(nothing_is_left_behind),
        cmocka_unit_test(groups_live_side_by_side),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
