/* SPDX-License-Identifier: MIT */
/*
 * Ranks that are killed while they come back, at moments spread over
 * ep_group_create and ep_buffer_create: those that stay get an error within the
 * timeout, go on without it, and take the next one in.
 * ctest-timeout: 300
 */
#include "entrepot/ep.h"

#include "support/ranks.h"
#include "support/sanitize.h"
#include "support/test.h"

#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

enum { RANKS = 3, LOST = 2, TOKENS = 2, HIDDEN = 8, DOOMED = 12, TIMEOUT_MS = 1000 };

typedef struct scene {
    _Atomic int failed;      /* readmissions that a rank that stays saw fail */
    _Atomic int next_doomed; /* of the ranks that come back */
    _Atomic int64_t slowest_ms;
} scene;

static int open_rank(int rank, bool again, ep_group **group, ep_buffer **buffer)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = rank;
    config.num_ranks = RANKS;
    config.transport = "shm";
    config.timeout_ms = again ? 60000 : TIMEOUT_MS; /* the others come when they are ready */
    config.rejoin = again;
    TEST_OK(ep_group_create(&config, group));
    TEST_OK(ep_group_set_timeout_ms(*group, TIMEOUT_MS));
    TEST_OK(ep_buffer_create(*group, NULL, buffer));
    return 0;
}

/* A token to each of the two ranks after this one; its row must come from each of the others. */
static ep_status exchange(ep_buffer *buffer, int rank, int32_t *rows)
{
    static const uint16_t x[TOKENS * HIDDEN] = {0x3f80, 0x4000};
    const int64_t ids[TOKENS] = {(rank + 1) % RANKS, (rank + 2) % RANKS};
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_recv recv = EP_RECV_INIT;
    args.x = ep_tensor_2d((void *)x, EP_BF16, TOKENS, HIDDEN);
    args.topk_idx = ep_tensor_2d((void *)ids, EP_I64, TOKENS, 1);
    args.num_experts = RANKS;
    ep_status status = ep_dispatch(buffer, &args, &recv, NULL);
    *rows = status == EP_OK ? (int32_t)recv.num_rows : -1;
    ep_recv_release(&recv);
    ep_handle_release(recv.handle);
    return status;
}

static int exchange_some(ep_group *group, ep_buffer *buffer, int rank, int expected)
{
    for (int i = 0; i < 5; i++) {
        int32_t rows;
        TEST_OK(exchange(buffer, rank, &rows));
        TEST_CHECK(rows == expected);
    }
    TEST_OK(ep_group_barrier(group));
    return 0;
}

static int go_without(ep_group *group)
{
    ep_status status;
    int tries = 0;
    do {
        TEST_OK(ep_group_mask(group, LOST, 1));
        status = ep_group_recover(group);
    } while (status == EP_ERR_TIMEOUT && ++tries < 5);
    TEST_OK(status);
    return 0;
}

/* Until a rank has come back to stay. */
static int take_back(ep_group *group, ep_buffer *buffer, int rank, scene *s)
{
    for (;;) {
        int32_t rows;
        int64_t start = test_now_ms();
        ep_status status = ep_group_readmit(group, LOST);
        int64_t took = test_now_ms() - start;
        if (status != EP_OK) {
            TEST_CHECK(strstr(ep_last_error(), "rank 2") != NULL);
            atomic_fetch_add(&s->failed, 1);
            if (took > atomic_load(&s->slowest_ms))
                atomic_store(&s->slowest_ms, took);
        }
        if (status == EP_OK && exchange(buffer, rank, &rows) == EP_OK)
            return 0;
        TEST_CHECK(atomic_load(&s->failed) < 20 * DOOMED);
        TEST_CHECK(go_without(group) == 0);
        TEST_CHECK(exchange_some(group, buffer, rank, 1) == 0);
    }
}

static int first_life(int rank, int num_ranks, void *arg)
{
    (void)num_ranks;
    ep_group *group;
    ep_buffer *buffer;
    TEST_CHECK(open_rank(rank, false, &group, &buffer) == 0);
    TEST_CHECK(exchange_some(group, buffer, rank, 2) == 0);
    if (rank == LOST)
        kill(getpid(), SIGKILL);
    TEST_CHECK(go_without(group) == 0);
    TEST_CHECK(take_back(group, buffer, rank, arg) == 0);
    TEST_CHECK(exchange_some(group, buffer, rank, 2) == 0);
    ep_buffer_destroy(buffer);
    ep_group_destroy(group);
    return 0;
}

/* Ends by SIGALRM after a while, in the middle of whatever it does then. */
static int doomed_life(int rank, int num_ranks, void *arg)
{
    (void)num_ranks;
    int number = atomic_fetch_add(&((scene *)arg)->next_doomed, 1);
    struct itimerval end = {.it_value = {0, 300 + 350 * number}};
    ep_group *group;
    ep_buffer *buffer;
    setitimer(ITIMER_REAL, &end, NULL);
    if (open_rank(rank, true, &group, &buffer) == 0)
        pause();
    return 0;
}

static int last_life(int rank, int num_ranks, void *arg)
{
    (void)num_ranks;
    (void)arg;
    for (int tries = 0; tries < 10; tries++) {
        ep_group *group = NULL;
        ep_buffer *buffer = NULL;
        int32_t rows;
        bool stays =
            open_rank(rank, true, &group, &buffer) == 0 && exchange(buffer, rank, &rows) == EP_OK;
        if (stays)
            TEST_CHECK(exchange_some(group, buffer, rank, 2) == 0);
        ep_buffer_destroy(buffer);
        ep_group_destroy(group);
        if (stays)
            return 0;
    }
    return 1;
}

static void killed_while_coming_back(void **state)
{
    (void)state;
    test_processes processes;
    scene *s = test_shared_alloc(sizeof *s);
    assert_non_null(s);
    assert_int_equal(test_processes_start(&processes, RANKS, first_life, s), 0);
    for (int i = 0; i < DOOMED; i++)
        assert_int_equal(test_processes_replace(&processes, LOST, doomed_life, s), 0);
    assert_int_equal(test_processes_replace(&processes, LOST, last_life, s), 0);
    assert_int_equal(test_processes_wait(&processes, 200000), 0);
    print_message("%d readmissions failed, the slowest after %d ms\n", atomic_load(&s->failed),
                  (int)atomic_load(&s->slowest_ms));
    assert_true(atomic_load(&s->slowest_ms) < 4 * TIMEOUT_MS);
    test_shared_free(s, sizeof *s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(killed_while_coming_back)};
    if (TEST_TSAN) /* which sees nothing of other processes */
        return 0;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
