/* SPDX-License-Identifier: MIT */
/*
 * Ranks for tests: the same function as N processes or N threads.
 *
 * A body returns 0 when all is well. It must not use cmocka's assertions, which
 * would jump out of the thread or process; TEST_CHECK reports and returns 1.
 */
#ifndef EP_TEST_RANKS_H
#define EP_TEST_RANKS_H

#include "entrepot/group.h"

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>

typedef int (*test_rank_fn)(int rank, int num_ranks, void *arg);
typedef int (*test_group_fn)(ep_group *group, void *arg);

/* Leaves the body with 1 unless `condition`. */
#define TEST_CHECK(condition)                                                           \
    do {                                                                                \
        if (!(condition)) {                                                             \
            fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, \
                    #condition, ep_last_error());                                       \
            return 1;                                                                   \
        }                                                                               \
    } while (0)

/* Leaves the body with 1 unless the call returns EP_OK. */
#define TEST_OK(call) TEST_CHECK((call) == EP_OK)

/* Runs `body` as ranks 0..num_ranks-1, each a process forked from this one. Returns how many did
   not return 0. After a minute (TEST_TIMEOUT_S of the environment) all are killed and count as
   failed. */
int test_run_processes(int num_ranks, test_rank_fn body, void *arg);

/* The same as threads of this process. */
int test_run_threads(int num_ranks, test_rank_fn body, void *arg);

/* Makes a group of num_ranks ranks on `transport` ("shm", "threads", "fault(shm):..."), as threads
   where the name has "threads" in it and as processes otherwise, and runs `body` on every rank.
   With EP_TEST_DEVICE only the transport of test_transport() is run; others count as passed. */
int test_run_groups(const char *transport, int num_ranks, test_group_fn body, void *arg);

/* Like test_run_groups with a configuration of which rank, num_ranks and bootstrap are filled in.
 */
int test_run_groups_with(const ep_group_config *config, int num_ranks, test_group_fn body,
                         void *arg);

/* Processes that a test handles one by one. */
typedef struct test_processes {
    int num_ranks;
    pid_t pid[256];
    int result[256]; /* -1 still running, 0..255 what the body returned, 256 + N ended by signal N
                      */
} test_processes;

/* Returns 0, or -1 when a process could not be started. */
int test_processes_start(test_processes *processes, int num_ranks, test_rank_fn body, void *arg);
/* Waits until a rank has ended, however it did, and starts it anew with `body`. Returns 0 or -1. */
int test_processes_replace(test_processes *processes, int rank, test_rank_fn body, void *arg);
void test_processes_signal(test_processes *processes, int rank, int signal);
/* Waits until all have ended; those that have not after timeout_ms are killed. Returns how many did
   not return 0. */
int test_processes_wait(test_processes *processes, int64_t timeout_ms);

/* Memory, zero at first, that processes forked later share with this one. */
void *test_shared_alloc(size_t bytes);
void test_shared_free(void *memory, size_t bytes);

/* Milliseconds of a monotonic clock. */
int64_t test_now_ms(void);
void test_sleep_ms(int64_t ms);

#endif
