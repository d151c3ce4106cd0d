/* SPDX-License-Identifier: MIT */
/* ctest-timeout: 300 */
/* How ranks find each other: who is missing, who disagrees, who does not belong there. */
#include "ep/channel.h"
#include "ep/environment.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/test.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static ep_group_config config_of(int rank, int num_ranks)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = rank;
    config.num_ranks = num_ranks;
    return config;
}

/* What a rank does differently from the others, and what all are to see then. */
typedef struct expectation {
    ep_group_config (*configure)(int rank, int num_ranks);
    ep_status status;
    const char *message; /* without "ep_group_create: "; what an odd rank's own error says too */
    int absent;          /* a rank that does not come, or -1 */
    int64_t within_ms;
} expectation;

static int fails_as_expected(int rank, int num_ranks, void *arg)
{
    const expectation *expect = arg;
    char message[512];
    ep_group_config config = expect->configure(rank, num_ranks);
    ep_group *group = NULL;
    if (rank == expect->absent)
        return 0;
    int64_t start = test_now_ms();
    TEST_CHECK(ep_group_create(&config, &group) == expect->status);
    TEST_CHECK(group == NULL);
    snprintf(message, sizeof message, "ep_group_create: %s", expect->message);
    TEST_CHECK(strcmp(ep_last_error(), message) == 0);
    TEST_CHECK(test_now_ms() - start < expect->within_ms);
    return 0;
}

static ep_group_config impatient(int rank, int num_ranks)
{
    ep_group_config config = config_of(rank, num_ranks);
    config.timeout_ms = 700;
    return config;
}

static void a_missing_rank_is_named(void **state)
{
    (void)state;
    expectation expect = {impatient, EP_ERR_TIMEOUT,
                          "group creation: no word from rank 2 within 700 ms", 2, 3000};
    assert_int_equal(test_run_processes(4, fails_as_expected, &expect), 0);
    expect.absent = 0;
    expect.message = "group creation: no word from rank 0 within 700 ms";
    assert_int_equal(test_run_processes(4, fails_as_expected, &expect), 0);
}

static ep_group_config one_counts_wrong(int rank, int num_ranks)
{
    return config_of(rank, rank == 2 ? num_ranks + 4 : num_ranks);
}

static ep_group_config the_hub_counts_wrong(int rank, int num_ranks)
{
    ep_group_config config = config_of(rank, rank == 0 ? num_ranks - 1 : num_ranks);
    return config;
}

static ep_group_config one_has_other_nodes(int rank, int num_ranks)
{
    ep_group_config config = config_of(rank, num_ranks);
    config.ranks_per_node = rank == 3 ? 2 : 4;
    return config;
}

static ep_group_config one_takes_another_way(int rank, int num_ranks)
{
    ep_group_config config = config_of(rank, num_ranks);
    config.transport = rank == 1 ? "fault(shm)" : "shm";
    return config;
}

static void disagreement_is_named_everywhere(void **state)
{
    (void)state;
    expectation expect = {one_counts_wrong, EP_ERR_MISMATCH,
                          "num_ranks is 4 on rank 0 but 8 on rank 2", -1, 5000};
    assert_int_equal(test_run_processes(4, fails_as_expected, &expect), 0);
    expect.configure = one_has_other_nodes;
    expect.message = "ranks_per_node is 4 on rank 0 but 2 on rank 3";
    assert_int_equal(test_run_processes(4, fails_as_expected, &expect), 0);
    expect.configure = one_takes_another_way;
    expect.message = "transport is \"shm\" on rank 0 but \"fault(shm)\" on rank 1";
    assert_int_equal(test_run_processes(4, fails_as_expected, &expect), 0);
}

/* Which rank is named first depends on who comes first. */
static int counted_wrong_by_the_hub(int rank, int num_ranks, void *arg)
{
    (void)arg;
    ep_group_config config = the_hub_counts_wrong(rank, num_ranks);
    ep_group *group = NULL;
    TEST_CHECK(ep_group_create(&config, &group) == EP_ERR_MISMATCH);
    TEST_CHECK(strstr(ep_last_error(), "num_ranks is 3 on rank 0 but 4 on rank ") != NULL);
    return 0;
}

static void disagreement_of_rank_0_is_named(void **state)
{
    (void)state;
    assert_int_equal(test_run_processes(4, counted_wrong_by_the_hub, NULL), 0);
}

/* Two processes that both believe to be rank 1: the second is told, the group is made. */
static int comes_twice(int index, int num_processes, void *arg)
{
    _Atomic int *refused = arg;
    int rank = index == num_processes - 1 ? 1 : index;
    ep_group_config config = config_of(rank, num_processes - 1);
    ep_group *group = NULL;
    if (rank == 2)
        test_sleep_ms(300); /* so that both ranks 1 find the hub waiting */
    ep_status status = ep_group_create(&config, &group);
    if (status == EP_OK)
        TEST_OK(ep_group_barrier(group));
    ep_group_destroy(group);
    if (rank != 1 || status == EP_OK)
        return status;
    TEST_CHECK(status == EP_ERR_STATE && strstr(ep_last_error(), "rank 1 is process ") != NULL);
    atomic_fetch_add(refused, 1);
    return 0;
}

static void a_double_is_refused(void **state)
{
    (void)state;
    _Atomic int *refused = test_shared_alloc(sizeof *refused);
    assert_int_equal(test_run_processes(4, comes_twice, refused), 0);
    assert_int_equal(atomic_load(refused), 1);
    test_shared_free(refused, sizeof *refused);
}

static int many_in_a_row(int rank, int num_ranks, void *arg)
{
    (void)arg;
    ep_group_config config = config_of(rank, num_ranks);
    for (int i = 0; i < 60; i++) {
        ep_group *group = NULL;
        TEST_OK(ep_group_create(&config, &group));
        TEST_CHECK(ep_group_rank(group) == rank);
        ep_group_destroy(group);
    }
    return 0;
}

static void one_name_serves_many_groups(void **state)
{
    (void)state;
    assert_int_equal(test_run_processes(3, many_in_a_row, NULL), 0);
}

static epi_rendezvous_name where_they_meet(void)
{
    /* what a child of this process works out by itself: its parent is the job */
    return epi_rendezvous(epi_launch_job(epi_getenv, NULL), "0");
}

/* Throws connections at the rendezvous: silent ones, garbage, HELLOs with one bit wrong. */
static void molest(const epi_rendezvous_name *name, int *held, int num_held, struct rng *rng)
{
    uint8_t noise[256];
    for (int i = 0; i < num_held; i++) {
        int fd = held[i];
        if (fd >= 0 && rng_below(rng, 3) == 0) {
            close(fd);
            held[i] = -1;
        } else if (fd < 0) {
            fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
            if (connect(fd, (const struct sockaddr *)&name->address, name->length) == 0) {
                held[i] = fd;
            } else {
                close(fd);
                continue;
            }
        } else {
            continue;
        }
        epi_frame hello = {.magic = EPI_WIRE_MAGIC,
                           .kind = EPI_FRAME_HELLO,
                           .rank = 1,
                           .num_ranks = 3,
                           .deadline_ns = INT64_MAX};
        for (size_t byte = 0; byte < sizeof noise; byte++)
            noise[byte] = (uint8_t)rng_next(rng);
        if (held[i] < 0)
            continue;
        switch (rng_below(rng, 3)) {
        case 0:
            send(held[i], noise, rng_below(rng, sizeof noise), MSG_NOSIGNAL);
            break;
        case 1: /* not the fields that would make it an honest rank with other numbers */
            ((uint8_t *)&hello)[rng_below(rng, 8)] ^= (uint8_t)(1u << rng_below(rng, 8));
            send(held[i], &hello, sizeof hello, MSG_NOSIGNAL);
            break;
        default:
            break;
        }
    }
}

static int joins_among_noise(int rank, int num_ranks, void *arg)
{
    (void)arg;
    enum { HELD = 150 };
    epi_rendezvous_name name = where_they_meet();
    if (rank == num_ranks - 1) { /* the noise maker; ends with its parent's test */
        int held[HELD];
        struct rng rng;
        rng_seed(&rng, rng_env_seed(31));
        for (int i = 0; i < HELD; i++)
            held[i] = -1;
        for (int64_t until = test_now_ms() + 1500; test_now_ms() < until;)
            molest(&name, held, HELD, &rng);
        return 0;
    }
    ep_group_config config = config_of(rank, num_ranks - 1);
    for (int i = 0; i < 8; i++) {
        ep_group *group = NULL;
        if (rank == 2)
            test_sleep_ms(100);
        TEST_OK(ep_group_create(&config, &group));
        TEST_OK(ep_group_barrier(group));
        ep_group_destroy(group);
    }
    return 0;
}

static void noise_does_no_harm(void **state)
{
    (void)state;
    assert_int_equal(test_run_processes(4, joins_among_noise, NULL), 0);
}

/* A process of another user holds the name, or knocks at it. */
static int meets_a_stranger(int rank, int num_ranks, void *arg)
{
    _Atomic int *stage = arg;
    epi_rendezvous_name name = where_they_meet();
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (rank == num_ranks - 1) {
        TEST_CHECK(setuid(65534) == 0);
        /* which cleared the death signal that the helper had set */
        TEST_CHECK(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
        TEST_CHECK(bind(fd, (const struct sockaddr *)&name.address, name.length) == 0);
        TEST_CHECK(listen(fd, 4096) == 0);
        atomic_store(stage, 1);
        for (int i = 0; i < 2000 && atomic_load(stage) < 3; i++)
            test_sleep_ms(5);
        close(fd);
        return 0;
    }
    close(fd);
    while (atomic_load(stage) == 0)
        test_sleep_ms(5);
    ep_group_config config = impatient(rank, num_ranks - 1);
    ep_group *group = NULL;
    TEST_CHECK(ep_group_create(&config, &group) == (rank == 0 ? EP_ERR_SYSTEM : EP_ERR_TIMEOUT));
    TEST_CHECK(strstr(ep_last_error(), "user 65534") != NULL);
    atomic_fetch_add(stage, 1);
    return 0;
}

static int is_knocked_at(int rank, int num_ranks, void *arg)
{
    (void)arg;
    epi_rendezvous_name name = where_they_meet();
    if (rank == num_ranks - 1) {
        TEST_CHECK(setuid(65534) == 0);
        for (int64_t until = test_now_ms() + 400; test_now_ms() < until; test_sleep_ms(1)) {
            int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
            epi_frame hello = {.magic = EPI_WIRE_MAGIC,
                               .kind = EPI_FRAME_HELLO,
                               .rank = 1,
                               .num_ranks = 2,
                               .deadline_ns = INT64_MAX};
            if (connect(fd, (const struct sockaddr *)&name.address, name.length) == 0)
                send(fd, &hello, sizeof hello, MSG_NOSIGNAL);
            close(fd);
        }
        return 0;
    }
    ep_group_config config = config_of(rank, num_ranks - 1);
    ep_group *group = NULL;
    if (rank == 1)
        test_sleep_ms(200);
    TEST_OK(ep_group_create(&config, &group));
    TEST_OK(ep_group_barrier(group));
    ep_group_destroy(group);
    return 0;
}

static void strangers_stay_out(void **state)
{
    (void)state;
    if (geteuid() != 0) {
        print_message("needs to be root to become somebody else\n");
        skip();
    }
    _Atomic int *stage = test_shared_alloc(sizeof *stage);
    assert_int_equal(test_run_processes(3, meets_a_stranger, stage), 0);
    test_shared_free(stage, sizeof *stage);
    assert_int_equal(test_run_processes(3, is_knocked_at, NULL), 0);
}

/* Ranks that take all from the environment. */
static int finds_its_environment(int rank, int num_ranks, void *arg)
{
    char text[16];
    const char *const *names = arg;
    snprintf(text, sizeof text, "%d", rank);
    setenv(names[0], text, 1);
    snprintf(text, sizeof text, "%d", num_ranks);
    setenv(names[1], text, 1);
    if (names[2] != NULL)
        setenv(names[2], "17", 1);
    setenv("EP_TIMEOUT_MS", "12345", 1);
    setenv("EP_TRANSPORT", "fault(shm):delay_us=5", 1);
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    ep_group *group = NULL;
    TEST_OK(ep_group_create(&config, &group));
    TEST_CHECK(ep_group_rank(group) == rank && ep_group_num_ranks(group) == num_ranks);
    TEST_CHECK(ep_group_timeout_ms(group) == 12345);
    TEST_CHECK(strcmp(ep_group_transport(group), "fault") == 0);
    TEST_OK(ep_group_barrier(group));
    ep_group_destroy(group);
    return 0;
}

static void every_launcher_is_found(void **state)
{
    (void)state;
    static const char *const launchers[][3] = {
        {"EP_RANK", "EP_NUM_RANKS", "EP_JOB"},
        {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_NAMESPACE"},
        {"PMI_RANK", "PMI_SIZE", NULL},
        {"SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"},
        {"RANK", "WORLD_SIZE", "MASTER_PORT"},
    };
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++)
        assert_int_equal(
            test_run_processes(3, finds_its_environment, (void *)(uintptr_t)launchers[i]), 0);
}

/* The caller's all-gather: over the memory of one process here, for threads. */
typedef struct meeting {
    pthread_barrier_t barrier;
    uint8_t data[4][1024];
    int fail_at; /* the call that fails on rank 2; 0: none */
} meeting;

typedef struct attendee {
    meeting *meeting;
    int rank;
    int num_calls;
} attendee;

static int meet(void *context, const void *send, void *recv, size_t bytes)
{
    attendee *self = context;
    meeting *at = self->meeting;
    if (++self->num_calls == at->fail_at)
        return 7;
    memcpy(at->data[self->rank], send, bytes);
    pthread_barrier_wait(&at->barrier);
    for (int rank = 0; rank < 4; rank++)
        memcpy((uint8_t *)recv + (size_t)rank * bytes, at->data[rank], bytes);
    pthread_barrier_wait(&at->barrier);
    return 0;
}

static int comes_by_callback(int rank, int num_ranks, void *arg)
{
    attendee self = {arg, rank, 0};
    ep_group_config config = config_of(rank, num_ranks);
    config.allgather = meet;
    config.allgather_context = &self;
    config.transport = "threads";
    ep_group *group = NULL;
    ep_status status = ep_group_create(&config, &group);
    if (self.meeting->fail_at != 0) {
        TEST_CHECK(status == EP_ERR_SYSTEM && group == NULL);
        TEST_CHECK(strstr(ep_last_error(), "the caller's allgather of ") != NULL);
        TEST_CHECK(strstr(ep_last_error(), " bytes returned 7") != NULL);
        return 0;
    }
    TEST_OK(status);
    int calls = self.num_calls;
    TEST_OK(ep_group_barrier(group));
    ep_group_destroy(group);
    TEST_CHECK(self.num_calls == calls); /* only to make the group */
    return 0;
}

static void a_callback_serves(void **state)
{
    (void)state;
    meeting at = {.fail_at = 0};
    pthread_barrier_init(&at.barrier, NULL, 4);
    assert_int_equal(test_run_threads(4, comes_by_callback, &at), 0);
    for (at.fail_at = 1; at.fail_at <= 3; at.fail_at++) /* on all: as it would be over a network */
        assert_int_equal(test_run_threads(4, comes_by_callback, &at), 0);
    pthread_barrier_destroy(&at.barrier);
}

typedef struct visit {
    ep_thread_world *world;
    int absent;
} visit;

static int comes_late_or_not(int rank, int num_ranks, void *arg)
{
    const visit *self = arg;
    (void)num_ranks;
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = rank;
    config.world = self->world;
    config.timeout_ms = 200;
    ep_group *group = NULL;
    if (rank == self->absent)
        return 0;
    TEST_CHECK(ep_group_create(&config, &group) == EP_ERR_TIMEOUT);
    TEST_CHECK(strcmp(ep_last_error(),
                      "ep_group_create: group creation: no word from rank 1 within "
                      "200 ms") == 0);
    return 0;
}

static int comes(int rank, int num_ranks, void *arg)
{
    const visit *self = arg;
    (void)num_ranks;
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = rank;
    config.world = self->world;
    ep_group *group = NULL;
    TEST_OK(ep_group_create(&config, &group));
    TEST_OK(ep_group_barrier(group));
    ep_group_destroy(group);
    return 0;
}

static void a_missing_thread_is_named(void **state)
{
    (void)state;
    visit self = {NULL, 1};
    assert_int_equal(ep_thread_world_create(3, &self.world), EP_OK);
    assert_int_equal(test_run_threads(3, comes_late_or_not, &self), 0);
    assert_int_equal(test_run_threads(3, comes, &self), 0); /* the world still serves */
    ep_thread_world_destroy(self.world);
    ep_thread_world_destroy(NULL);
    assert_int_equal(ep_thread_world_create(0, &self.world), EP_ERR_ARGUMENT);
    assert_int_equal(ep_thread_world_create(1025, &self.world), EP_ERR_ARGUMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_missing_rank_is_named),
        cmocka_unit_test(disagreement_is_named_everywhere),
        cmocka_unit_test(disagreement_of_rank_0_is_named),
        cmocka_unit_test(a_double_is_refused),
        cmocka_unit_test(one_name_serves_many_groups),
        cmocka_unit_test(noise_does_no_harm),
        cmocka_unit_test(strangers_stay_out),
        cmocka_unit_test(every_launcher_is_found),
        cmocka_unit_test(a_callback_serves),
        cmocka_unit_test(a_missing_thread_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
