/* SPDX-License-Identifier: MIT */
/*
 * What it costs ranks to hear of each other.
 *
 *   notify_bench RANKS [ROUNDS]
 *
 * RANKS processes (an even number) in pairs answer each other's notifications,
 * all pairs at once; then all of them meet in barriers, in which each notifies
 * every other.
 */
#include "base/clock.h"
#include "ep/group.h"
#include "ep/wait.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

typedef struct answer {
    const epi_window *window;
    int from;
    uint64_t value;
} answer;

static bool not_come(void *context, int rank)
{
    const answer *wait = context;
    return rank == wait->from && epi_slot_load(wait->window, rank, 0) < wait->value;
}

static bool has_come(void *context)
{
    const answer *wait = context;
    return epi_slot_load(wait->window, wait->from, 0) >= wait->value;
}

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Rank 0's times in ns of each round, sorted. */
static ep_status ping(ep_group *group, uint64_t rounds, int64_t *times)
{
    const epi_transport_ops *ops = group->transport->ops;
    epi_window *window = NULL;
    ep_status status = ops->window_create(group->transport, 65536, 65536, &window);
    if (status != EP_OK)
        return status;
    int other = group->rank ^ 1;
    for (uint64_t round = 1; round <= rounds && status == EP_OK; round++) {
        answer wait = {window, other, round};
        int64_t start = epi_clock_ns();
        if (group->rank % 2 == 0)
            ops->notify(window, other, 0, round);
        status = epi_wait(group, window, "ping", round, has_come, not_come, &wait, 0);
        if (group->rank % 2 == 1)
            ops->notify(window, other, 0, round);
        times[round - 1] = epi_clock_ns() - start;
    }
    ops->window_destroy(window);
    qsort(times, rounds, sizeof *times, compare);
    return status;
}

static ep_status barriers(ep_group *group, uint64_t rounds, int64_t *times)
{
    for (uint64_t round = 0; round < rounds; round++) {
        int64_t start = epi_clock_ns();
        ep_status status = ep_group_barrier(group);
        if (status != EP_OK)
            return status;
        times[round] = epi_clock_ns() - start;
    }
    qsort(times, rounds, sizeof *times, compare);
    return EP_OK;
}

/* Mean: time of all, over the rounds, whatever the cores did in between. */
static void print_times(const char *name, const int64_t *times, uint64_t rounds, int64_t all_ns)
{
    printf("%-20s mean %8.2f us   median %8.2f us   p99 %8.2f us\n", name,
           (double)all_ns / (double)rounds / 1e3, (double)times[rounds / 2] / 1e3,
           (double)times[rounds * 99 / 100] / 1e3);
    fflush(stdout);
}

typedef ep_status (*bench_work)(ep_group *group, uint64_t rounds, int64_t *times);

/* Until the last rank has finished. */
static ep_status measure(const char *name, bench_work work, ep_group *group, uint64_t rounds,
                         int64_t *times)
{
    ep_status status = ep_group_barrier(group);
    int64_t start = epi_clock_ns();
    if (status == EP_OK)
        status = work(group, rounds, times);
    if (status == EP_OK)
        status = ep_group_barrier(group);
    if (status == EP_OK && group->rank == 0)
        print_times(name, times, rounds, epi_clock_ns() - start);
    return status;
}

static int run_rank(int rank, int num_ranks, uint64_t rounds)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = rank;
    config.num_ranks = num_ranks;
    ep_group *group = NULL;
    int64_t *times = calloc(rounds, sizeof *times);
    ep_status status = times != NULL ? ep_group_create(&config, &group) : EP_ERR_MEMORY;
    if (status == EP_OK)
        status = measure("there and back", ping, group, rounds, times);
    if (status == EP_OK)
        status = measure("barrier", barriers, group, rounds, times);
    if (status != EP_OK)
        fprintf(stderr, "rank %d: %s\n", rank, ep_last_error());
    ep_group_destroy(group);
    free(times);
    return status != EP_OK;
}

int main(int argc, char **argv)
{
    int num_ranks = argc > 1 ? atoi(argv[1]) : 0;
    long rounds = argc > 2 ? atol(argv[2]) : 20000;
    if (num_ranks < 2 || num_ranks > 1024 || num_ranks % 2 != 0 || rounds < 1) {
        fprintf(stderr, "usage: notify_bench RANKS [ROUNDS]   RANKS even, 2..1024\n");
        return 2;
    }
    for (int rank = 0; rank < num_ranks; rank++)
        if (fork() == 0)
            _exit(run_rank(rank, num_ranks, (uint64_t)rounds));
    int failed = 0, status;
    while (wait(&status) > 0)
        failed |= status != 0;
    return failed ? 3 : 0;
}
