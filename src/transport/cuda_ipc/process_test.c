/* SPDX-License-Identifier: MIT */
/* ctest-wrap: getrandom */
/* The number of a process: one for all its threads however they come, another in a child. */
#include "transport/cuda_ipc/process.c"

#include "support/test.h"

#include <stdbool.h>
#include <stddef.h>
#include <sys/wait.h>
#include <time.h>

#define THREADS 8

static pthread_barrier_t start;
static bool failing;
static _Atomic int draws;

ssize_t __real_getrandom(void *memory, size_t bytes, unsigned flags);
ssize_t __wrap_getrandom(void *memory, size_t bytes, unsigned flags);

/* Slow, so that threads come while one draws. */
ssize_t __wrap_getrandom(void *memory, size_t bytes, unsigned flags)
{
    draws++;
    nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
    return failing ? -1 : __real_getrandom(memory, bytes, flags);
}

static void *ask(void *out)
{
    pthread_barrier_wait(&start);
    *(uint64_t *)out = epi_process_number();
    return NULL;
}

/* Whether many threads are all told `expected`, or where that is 0 the same number. */
static bool threads_agree(uint64_t expected)
{
    pthread_t thread[THREADS];
    uint64_t told[THREADS];
    bool agree = true;
    pthread_barrier_init(&start, NULL, THREADS);
    for (int i = 0; i < THREADS; i++)
        if (pthread_create(&thread[i], NULL, ask, &told[i]))
            return false;
    for (int i = 0; i < THREADS; i++)
        pthread_join(thread[i], NULL);
    pthread_barrier_destroy(&start);
    for (int i = 0; i < THREADS; i++)
        agree = agree && told[i] != 0 && told[i] == (expected ? expected : told[0]);
    return agree;
}

static void threads_are_told_one_number(void **state)
{
    (void)state;
    assert_true(threads_agree(0));
    assert_true(threads_agree(epi_process_number()));
    assert_int_equal(draws, 1);
}

/* What a child of `parent`'s number finds wrong: 0 nothing. */
static int judge_child(uint64_t parent, pid_t pid)
{
    uint64_t mine = epi_process_number();
    if (mine == parent)
        return 1;
    if (failing && mine != (uint64_t)pid)
        return 2;
    return threads_agree(mine) ? 0 : 3;
}

static void a_child_draws_its_own(void **state)
{
    (void)state;
    uint64_t mine = epi_process_number();
    for (int i = 0; i < 2; i++) {
        int status;
        failing = i == 1; /* then it has at least its process number */
        pid_t child = fork();
        if (child == 0)
            _exit(judge_child(mine, getpid()));
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_int_equal(status, 0);
    }
    failing = false;
    assert_true(threads_agree(mine));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(threads_are_told_one_number),
        cmocka_unit_test(a_child_draws_its_own),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
