/* SPDX-License-Identifier: MIT */
#include "support/ranks.h"

#include "support/tensors.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RUNNING (-1)

int64_t test_now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

void test_sleep_ms(int64_t ms)
{
    struct timespec time = {(time_t)(ms / 1000), (long)(ms % 1000) * 1000000L};
    nanosleep(&time, NULL);
}

void *test_shared_alloc(size_t bytes)
{
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void test_shared_free(void *memory, size_t bytes)
{
    munmap(memory, bytes);
}

static int64_t timeout_ms(void)
{
    const char *text = getenv("TEST_TIMEOUT_S");
    return text != NULL ? atoll(text) * 1000 : 60000;
}

static int start_process(test_processes *processes, int rank, int num_ranks, test_rank_fn body,
                         void *arg)
{
    fflush(NULL); /* or the child would write it again */
    pid_t pid = fork();
    if (pid < 0) {
        perror("fork");
        return -1;
    }
    if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* do not outlive a test that was killed */
        int result = body(rank, num_ranks, arg);
        fflush(NULL);
        _exit(result);
    }
    processes->pid[rank] = pid;
    processes->result[rank] = RUNNING;
    return 0;
}

int test_processes_start(test_processes *processes, int num_ranks, test_rank_fn body, void *arg)
{
    processes->num_ranks = 0;
    for (int rank = 0; rank < num_ranks; rank++) {
        if (start_process(processes, rank, num_ranks, body, arg) != 0) {
            test_processes_wait(processes, 0);
            return -1;
        }
        processes->num_ranks = rank + 1;
    }
    return 0;
}

int test_processes_replace(test_processes *processes, int rank, test_rank_fn body, void *arg)
{
    int status;
    if (processes->result[rank] == RUNNING &&
        waitpid(processes->pid[rank], &status, 0) != processes->pid[rank])
        return -1;
    return start_process(processes, rank, processes->num_ranks, body, arg);
}

void test_processes_signal(test_processes *processes, int rank, int signal)
{
    if (processes->result[rank] == RUNNING)
        kill(processes->pid[rank], signal);
}

/* Takes the result of every process that has ended; returns how many have not. */
static int reap(test_processes *processes)
{
    int running = 0;
    for (int rank = 0; rank < processes->num_ranks; rank++) {
        int status;
        if (processes->result[rank] != RUNNING)
            continue;
        if (waitpid(processes->pid[rank], &status, WNOHANG) == processes->pid[rank])
            processes->result[rank] =
                WIFEXITED(status) ? WEXITSTATUS(status) : 256 + WTERMSIG(status);
        else
            running++;
    }
    return running;
}

int test_processes_wait(test_processes *processes, int64_t wait_ms)
{
    int64_t deadline = test_now_ms() + wait_ms;
    while (reap(processes) > 0) {
        if (test_now_ms() >= deadline)
            for (int rank = 0; rank < processes->num_ranks; rank++)
                if (processes->result[rank] == RUNNING) {
                    fprintf(stderr, "rank %d still runs after %lld ms\n", rank, (long long)wait_ms);
                    kill(processes->pid[rank], SIGKILL);
                }
        test_sleep_ms(1);
    }
    int failed = 0;
    for (int rank = 0; rank < processes->num_ranks; rank++) {
        failed += processes->result[rank] != 0;
        if (processes->result[rank] > 255)
            fprintf(stderr, "rank %d ended by signal %d\n", rank, processes->result[rank] - 256);
    }
    return failed;
}

int test_run_processes(int num_ranks, test_rank_fn body, void *arg)
{
    test_processes processes;
    if (test_processes_start(&processes, num_ranks, body, arg) != 0)
        return num_ranks;
    return test_processes_wait(&processes, timeout_ms());
}

typedef struct thread_rank {
    pthread_t thread;
    int rank;
    int num_ranks;
    test_rank_fn body;
    void *arg;
    int result;
} thread_rank;

static void *run_thread(void *arg)
{
    thread_rank *self = arg;
    self->result = self->body(self->rank, self->num_ranks, self->arg);
    return NULL;
}

int test_run_threads(int num_ranks, test_rank_fn body, void *arg)
{
    thread_rank *ranks = calloc((size_t)num_ranks, sizeof *ranks);
    int failed = 0;
    for (int rank = 0; rank < num_ranks; rank++) {
        ranks[rank] = (thread_rank){.rank = rank, .num_ranks = num_ranks, .body = body, .arg = arg};
        if (pthread_create(&ranks[rank].thread, NULL, run_thread, &ranks[rank]) != 0)
            abort(); /* the others would wait for it */
    }
    for (int rank = 0; rank < num_ranks; rank++) {
        pthread_join(ranks[rank].thread, NULL);
        failed += ranks[rank].result != 0;
    }
    free(ranks);
    return failed;
}

typedef struct group_run {
    ep_group_config config;
    test_group_fn body;
    void *arg;
} group_run;

static int run_group(int rank, int num_ranks, void *arg)
{
    const group_run *run = arg;
    ep_group_config config = run->config;
    config.rank = rank;
    config.num_ranks = num_ranks;
    ep_group *group = NULL;
    TEST_OK(ep_group_create(&config, &group));
    int result = run->body(group, run->arg);
    ep_group_destroy(group);
    return result;
}

int test_run_groups_with(const ep_group_config *config, int num_ranks, test_group_fn body,
                         void *arg)
{
    group_run run = {*config, body, arg};
    if (config->transport && strcmp(config->transport, test_transport(config->transport)) != 0)
        return 0;
    if (config->transport == NULL || strstr(config->transport, "threads") == NULL)
        return test_run_processes(num_ranks, run_group, &run);
    if (ep_thread_world_create(num_ranks, &run.config.world) != EP_OK)
        return num_ranks;
    int failed = test_run_threads(num_ranks, run_group, &run);
    ep_thread_world_destroy(run.config.world);
    return failed;
}

int test_run_groups(const char *transport, int num_ranks, test_group_fn body, void *arg)
{
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.transport = transport;
    return test_run_groups_with(&config, num_ranks, body, arg);
}
