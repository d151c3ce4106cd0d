/* SPDX-License-Identifier: MIT */
/* ctest-timeout: 300 */
/* Ranks that die or stall at any moment: who is left names them in time and goes on without them.
 */
#include "ep/group.h"
#include "ep/wait.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/test.h"

#include <dirent.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define TIMEOUT_MS 3000

/* Files that a group might have left in the folder of named shared memory; other programs' are not
   counted, they come and go. */
static int count_left_files(void)
{
    DIR *folder = opendir("/dev/shm");
    int count = 0;
    for (struct dirent *entry; folder != NULL && (entry = readdir(folder)) != NULL;)
        count += strstr(entry->d_name, "entrepot") != NULL;
    if (folder != NULL)
        closedir(folder);
    return count;
}

/* Barriers until one fails. */
static ep_status work(ep_group *group)
{
    for (;;) {
        ep_status status = ep_group_barrier(group);
        if (status != EP_OK)
            return status;
    }
}

static int dies_by_fault(ep_group *group, void *arg)
{
    int victim = *(int *)arg;
    ep_status status = work(group);
    TEST_CHECK(status == EP_ERR_RANK_DEAD);
    char message[128];
    const char *format = group->rank == victim ? "barrier (call %llu): rank %d, this one, has ended"
                                               : "barrier (call %llu): rank %d has ended";
    snprintf(message, sizeof message, format, (unsigned long long)group->epoch, victim);
    TEST_CHECK(strcmp(ep_last_error(), message) == 0);
    return 0;
}

static void a_dead_thread_is_named(void **state)
{
    (void)state;
    for (int victim = 0; victim < 4; victim++)
        for (int at = 1; at < 40; at += 13) {
            char transport[80];
            snprintf(transport, sizeof transport, "fault(threads):kill_rank=%d,kill_at=%d", victim,
                     20 + at);
            assert_int_equal(test_run_groups(transport, 4, dies_by_fault, &victim), 0);
        }
}

typedef struct death_scene {
    int victim;
    _Atomic int ready; /* ranks that are about to create their group */
    char name[32];
    _Atomic int64_t slowest_ms; /* from the kill to the error */
    _Atomic int64_t killed_ms;
} death_scene;

/* Everything that a group does while it is made and used, again and again. */
static ep_status live(ep_group **group, const ep_group_config *config)
{
    ep_status status = ep_group_create(config, group);
    while (status == EP_OK) {
        epi_window *window = NULL;
        epi_transport *transport = (*group)->transport;
        status = ep_group_barrier(*group);
        if (status == EP_OK)
            status = transport->ops->window_create(transport, 1 << 20, 1 << 16, &window);
        if (status == EP_OK)
            transport->ops->window_destroy(window);
    }
    return status;
}

static void note_slowest(death_scene *scene)
{
    int64_t took = test_now_ms() - atomic_load(&scene->killed_ms);
    int64_t slowest = atomic_load(&scene->slowest_ms);
    while (took > slowest && !atomic_compare_exchange_weak(&scene->slowest_ms, &slowest, took))
        ;
}

static int survive(int rank, int num_ranks, void *arg)
{
    death_scene *scene = arg;
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    ep_group *group = NULL;
    config.rank = rank;
    config.num_ranks = num_ranks;
    config.timeout_ms = TIMEOUT_MS;
    config.name = scene->name;
    atomic_fetch_add(&scene->ready, 1);
    ep_status status = live(&group, &config);
    TEST_CHECK(atomic_load(&scene->killed_ms) != 0); /* or it failed for another reason */
    note_slowest(scene);
    char name[32];
    snprintf(name, sizeof name, "rank %d", scene->victim);
    TEST_CHECK(status != EP_OK && strstr(ep_last_error(), name) != NULL);

    /* The others build a new group, the dead one's left alone. */
    ep_group *survivors = NULL;
    config.rank = rank < scene->victim ? rank : rank - 1;
    config.num_ranks = num_ranks - 1;
    config.name = "survivors";
    config.timeout_ms = 5 * TIMEOUT_MS; /* some may have waited their time out before they came */
    TEST_OK(ep_group_create(&config, &survivors));
    for (int i = 0; i < 10; i++)
        TEST_OK(ep_group_barrier(survivors));
    ep_group_destroy(group);
    ep_group_destroy(survivors);
    return 0;
}

static bool socket_left(const char *name)
{
    FILE *file = fopen("/proc/net/unix", "r");
    char line[512];
    bool found = false;
    while (file != NULL && fgets(line, sizeof line, file) != NULL)
        found = found || (strstr(line, "entrepot") != NULL && strstr(line, name) != NULL);
    if (file != NULL)
        fclose(file);
    return found;
}

static void kill_one(int num_ranks, int victim, int64_t after_us, int64_t *slowest_ms)
{
    death_scene *scene = test_shared_alloc(sizeof *scene);
    test_processes processes;
    scene->victim = victim;
    snprintf(scene->name, sizeof scene->name, "death-%d", (int)getpid());
    assert_int_equal(test_processes_start(&processes, num_ranks, survive, scene), 0);
    while (atomic_load(&scene->ready) < num_ranks)
        usleep(100);
    usleep((useconds_t)after_us);
    atomic_store(&scene->killed_ms, test_now_ms());
    test_processes_signal(&processes, victim, SIGKILL);
    test_processes_wait(&processes, 30000);
    for (int rank = 0; rank < num_ranks; rank++)
        assert_int_equal(processes.result[rank], rank == victim ? 256 + SIGKILL : 0);
    if (atomic_load(&scene->slowest_ms) > *slowest_ms)
        *slowest_ms = atomic_load(&scene->slowest_ms);
    assert_false(socket_left(scene->name));
    test_shared_free(scene, sizeof *scene);
}

static void a_killed_process_is_named(void **state)
{
    (void)state;
    int64_t slowest_ms = 0;
    struct rng rng;
    uint64_t seed = rng_env_seed(21);
    rng_seed(&rng, seed);
    print_message("seed %llu\n", (unsigned long long)seed);
    for (int i = 0; i < (int)rng_env_number("EP_TEST_KILLS", 24); i++)
        kill_one(4, i % 4, (int64_t)rng_below(&rng, i % 3 == 0 ? 3000 : 30000), &slowest_ms);
    print_message("slowest survivor: %lld ms\n", (long long)slowest_ms);
    assert_true(slowest_ms < TIMEOUT_MS + 2000);
    assert_int_equal(count_left_files(), 0);
}

static int stalls(ep_group *group, void *arg)
{
    (void)arg;
    TEST_OK(ep_group_set_timeout_ms(group, 200));
    ep_status status = EP_OK;
    for (int i = 0; i < 40 && status == EP_OK; i++)
        status = ep_group_barrier(group);
    /* Those it had notified already go on to the next barrier, and miss the others there as well.
       What the stalled rank sees depends on where they are by then. */
    if (group->rank != 1) {
        TEST_CHECK(status == EP_ERR_TIMEOUT);
        TEST_CHECK(strstr(ep_last_error(), "no word from rank 1 ") != NULL ||
                   strstr(ep_last_error(), " 1, ") != NULL);
    }
    test_sleep_ms(1000); /* one that has returned would count as dead */
    return 0;
}

static void a_stalled_rank_is_named(void **state)
{
    (void)state;
    assert_int_equal(
        test_run_groups("fault(threads):stall_rank=1,stall_at=50,stall_ms=900", 4, stalls, NULL),
        0);
    assert_int_equal(
        test_run_groups("fault(shm):stall_rank=1,stall_at=50,stall_ms=900", 4, stalls, NULL), 0);
}

/* A stopped process is not a dead one: it is late. */
static int stop_and_go(int rank, int num_ranks, void *arg)
{
    _Atomic int *ready = arg;
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    ep_group *group = NULL;
    config.rank = rank;
    config.num_ranks = num_ranks;
    TEST_OK(ep_group_create(&config, &group));
    TEST_OK(ep_group_barrier(group));
    atomic_fetch_add(ready, 1);
    if (rank == 0)
        raise(SIGSTOP);
    else
        TEST_OK(ep_group_set_timeout_ms(group, 200));
    ep_status status = ep_group_barrier(group);
    TEST_CHECK(status == (rank == 0 ? EP_OK : EP_ERR_TIMEOUT));
    if (rank != 0) {
        TEST_CHECK(strstr(ep_last_error(), "no word from rank 0 within 200 ms") != NULL);
        atomic_fetch_add(ready, 1);
        TEST_OK(ep_group_set_timeout_ms(group, 20000));
    }
    TEST_OK(ep_group_barrier(group)); /* and it comes back */
    ep_group_destroy(group);
    return 0;
}

static void a_stopped_process_is_late(void **state)
{
    (void)state;
    _Atomic int *ready = test_shared_alloc(sizeof *ready);
    test_processes processes;
    assert_int_equal(test_processes_start(&processes, 3, stop_and_go, ready), 0);
    for (int64_t until = test_now_ms() + 20000; atomic_load(ready) < 5 && test_now_ms() < until;)
        test_sleep_ms(5);
    test_processes_signal(&processes, 0, SIGCONT);
    assert_int_equal(test_processes_wait(&processes, 20000), 0);
    test_shared_free(ready, sizeof *ready);
}

/* Survivors that mask the dead rank go on in the same group. */
static int masks_the_dead(int rank, int num_ranks, void *arg)
{
    (void)arg;
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    ep_group *group = NULL;
    config.rank = rank;
    config.num_ranks = num_ranks;
    TEST_OK(ep_group_create(&config, &group));
    TEST_OK(ep_group_barrier(group));
    if (rank == 1)
        raise(SIGKILL);
    int32_t mine = rank + 10, all[4] = {-1, -1, -1, -1};
    TEST_CHECK(ep_group_barrier(group) == EP_ERR_RANK_DEAD);
    group->masked[1] = true;
    TEST_OK(ep_group_barrier(group));
    TEST_OK(ep_group_allgather(group, &mine, all, sizeof mine));
    TEST_CHECK(all[0] == 10 && all[1] == 0 && all[2] == 12 && all[3] == 13);
    epi_window *window = NULL;
    TEST_OK(group->transport->ops->window_create(group->transport, 65536, 65536, &window));
    TEST_CHECK(window->peer[1] == NULL && window->peer[0] != NULL);
    for (int peer = 0; peer < num_ranks; peer++)
        group->transport->ops->notify(window, peer, 0, 1);
    TEST_OK(ep_group_barrier(group));
    TEST_CHECK(epi_slot_load(window, 3, 0) == 1);
    group->transport->ops->window_destroy(window);
    ep_group_destroy(group);
    return 0;
}

static void the_dead_can_be_masked(void **state)
{
    (void)state;
    test_processes processes;
    assert_int_equal(test_processes_start(&processes, 4, masks_the_dead, NULL), 0);
    assert_int_equal(test_processes_wait(&processes, 20000), 1);
    assert_int_equal(processes.result[1], 256 + SIGKILL);
}

/* Reading memory of a rank that has ended fails as such, not with what another process holds. */
static int reads_the_dead(int rank, int num_ranks, void *arg)
{
    (void)arg;
    static uint64_t word = 77;
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    ep_group *group = NULL;
    config.rank = rank;
    config.num_ranks = num_ranks;
    TEST_OK(ep_group_create(&config, &group));
    epi_transport *transport = group->transport;
    uint64_t seen = 0;
    epi_remote_read read = {(uint64_t)(uintptr_t)&word, &seen, sizeof seen}, bad = {64, &seen, 8};
    if (transport->ops->can_peer_read(transport)) {
        TEST_OK(transport->ops->peer_read(transport, 1 - rank, &read, 1));
        TEST_CHECK(seen == 77);
        TEST_CHECK(transport->ops->peer_read(transport, 1 - rank, &bad, 1) == EP_ERR_SYSTEM);
    }
    TEST_OK(ep_group_barrier(group));
    if (rank == 1)
        raise(SIGKILL);
    for (int i = 0; i < 400 && transport->ops->peer_alive(transport, 1); i++)
        test_sleep_ms(5);
    TEST_CHECK(!transport->ops->peer_alive(transport, 1));
    if (transport->ops->can_peer_read(transport)) {
        TEST_CHECK(transport->ops->peer_read(transport, 1, &read, 1) == EP_ERR_RANK_DEAD);
        TEST_CHECK(strcmp(ep_last_error(), "reading memory of rank 1: it has ended") == 0);
    }
    ep_group_destroy(group);
    return 0;
}

static void the_dead_are_not_read(void **state)
{
    (void)state;
    test_processes processes;
    assert_int_equal(test_processes_start(&processes, 2, reads_the_dead, NULL), 0);
    assert_int_equal(test_processes_wait(&processes, 20000), 1);
    assert_int_equal(processes.result[0], 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_dead_thread_is_named),  cmocka_unit_test(a_killed_process_is_named),
        cmocka_unit_test(a_stalled_rank_is_named), cmocka_unit_test(a_stopped_process_is_late),
        cmocka_unit_test(the_dead_can_be_masked),  cmocka_unit_test(the_dead_are_not_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
