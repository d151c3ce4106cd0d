/* SPDX-License-Identifier: MIT */
#include "ranks.h"

#include "child.h"
#include "exit.h"
#include "progress.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define END_AFTER_NS 40000000000 /* others get to end by themselves once a rank has failed */

typedef struct outcome {
    _Atomic int ended; /* set by the rank itself, in good or bad */
    ep_status status;
    char message[RANK_MESSAGE_MAX];
} outcome;

typedef struct shared {
    _Atomic int64_t done;
    outcome rank[];
} shared;

typedef struct run_state {
    const ranks_config *config;
    rank_fn fn;
    void *context;
    shared *shared;
    size_t shared_bytes;
    ep_thread_world *world;
    pid_t *pid;        /* processes, 0 once ended; else NULL */
    pthread_t *thread; /* threads; else NULL */
    int started;
} run_state;

typedef struct thread_start {
    run_state *state;
    int rank;
} thread_start;

int64_t clock_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

void *ranks_shared_alloc(size_t bytes)
{
    void *memory = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void ranks_shared_free(void *memory, size_t bytes)
{
    if (memory)
        munmap(memory, bytes ? bytes : 1);
}

ep_status rank_fail(rank_self *self, ep_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(self->message, RANK_MESSAGE_MAX, format, args);
    va_end(args);
    return status;
}

/* One rank from group to the end of its function. */
static void rank_main(run_state *s, int rank)
{
    outcome *o = &s->shared->rank[rank];
    ep_group_config config = EP_GROUP_CONFIG_INIT;
    config.rank = s->world ? rank : -1; /* processes have it in their environment */
    config.num_ranks = s->world ? s->config->num_ranks : -1;
    config.world = s->world;
    rank_self self = {NULL, rank, s->config->num_ranks, s->context, &s->shared->done, o->message};
    ep_status status = ep_group_create(&config, &self.group);
    if (status == EP_OK)
        status = s->fn(&self);
    if (status != EP_OK && !o->message[0])
        snprintf(o->message, RANK_MESSAGE_MAX, "%s", ep_last_error());
    ep_group_destroy(self.group);
    o->status = status;
    atomic_store_explicit(&o->ended, 1, memory_order_release); /* meets the acquire of report() */
}

static bool start_failed(const run_state *s, int rank, int error)
{
    fprintf(stderr, "%s: rank %d could not be started: %s\n", s->config->command, rank,
            strerror(error));
    return false;
}

static bool start_processes(run_state *s)
{
    char job[JOB_ID_SIZE];
    pid_t parent = getpid();
    s->pid = calloc((size_t)s->config->num_ranks, sizeof *s->pid);
    if (!s->pid || !job_id_create(job))
        return start_failed(s, 0, s->pid ? errno : ENOMEM);
    fflush(NULL); /* or children would print what is buffered once more */
    for (int r = 0; r < s->config->num_ranks; r++) {
        pid_t pid = fork();
        if (pid < 0)
            return start_failed(s, r, errno);
        if (pid == 0) {
            if (child_tie_to_parent(parent) && child_set_rank(r, s->config->num_ranks, job))
                rank_main(s, r);
            fflush(NULL);
            _exit(0);
        }
        s->pid[r] = pid;
        s->started++;
    }
    return true;
}

static void *thread_main(void *argument)
{
    thread_start *start = argument;
    rank_main(start->state, start->rank);
    free(start);
    return NULL;
}

static bool start_threads(run_state *s)
{
    s->thread = calloc((size_t)s->config->num_ranks, sizeof *s->thread);
    if (!s->thread)
        return start_failed(s, 0, ENOMEM);
    if (ep_thread_world_create(s->config->num_ranks, &s->world) != EP_OK) {
        fprintf(stderr, "%s: %s\n", s->config->command, ep_last_error());
        return false;
    }
    for (int r = 0; r < s->config->num_ranks; r++) {
        thread_start *start = malloc(sizeof *start);
        int error = ENOMEM;
        if (start) {
            *start = (thread_start){s, r};
            error = pthread_create(&s->thread[r], NULL, thread_main, start);
        }
        if (error) {
            free(start);
            return start_failed(s, r, error);
        }
        s->started++;
    }
    return true;
}

static void note_signal(run_state *s, int rank, int signal)
{
    outcome *o = &s->shared->rank[rank];
    if (atomic_load_explicit(&o->ended, memory_order_acquire))
        return;
    o->status = EP_ERR_SYSTEM;
    if (signal)
        snprintf(o->message, RANK_MESSAGE_MAX, "ended by signal %d (%s)", signal,
                 strsignal(signal));
    else
        snprintf(o->message, RANK_MESSAGE_MAX, "ended early");
    atomic_store_explicit(&o->ended, 1, memory_order_release);
}

/* Counts the ranks that have ended; reaps them where they are processes. */
static int count_ended(run_state *s, bool *failed)
{
    int count = 0;
    for (int r = 0; r < s->started; r++) {
        outcome *o = &s->shared->rank[r];
        int status;
        if (s->pid && s->pid[r] && waitpid(s->pid[r], &status, WNOHANG) == s->pid[r]) {
            s->pid[r] = 0;
            note_signal(s, r, WIFSIGNALED(status) ? WTERMSIG(status) : 0);
        }
        bool over = s->pid ? !s->pid[r] : atomic_load_explicit(&o->ended, memory_order_acquire);
        count += over;
        *failed |= over && o->status != EP_OK;
    }
    return count;
}

static void kill_all(const run_state *s)
{
    for (int r = 0; s->pid && r < s->started; r++) {
        if (s->pid[r])
            kill(s->pid[r], SIGKILL);
    }
}

/* Waits for all ranks; each wait of theirs is bounded, a hung process is killed all the same. */
static void wait_all(run_state *s)
{
    int64_t deadline = INT64_MAX;
    bool failed = s->started < s->config->num_ranks;
    if (failed)
        kill_all(s);
    while (count_ended(s, &failed) < s->started) {
        if (failed && deadline == INT64_MAX)
            deadline = clock_ns() + END_AFTER_NS;
        if (clock_ns() > deadline)
            kill_all(s);
        int64_t done = atomic_load_explicit(&s->shared->done, memory_order_relaxed);
        progress_draw(s->config->what, done, s->config->steps);
        struct timespec pause = {0, 20000000};
        nanosleep(&pause, NULL);
    }
    progress_clear();
    for (int r = 0; s->thread && r < s->started; r++)
        pthread_join(s->thread[r], NULL);
}

/* A rank that only noticed the failure of another is no rank to name first. */
static bool is_consequence(ep_status status)
{
    return status == EP_ERR_ABORTED || status == EP_ERR_RANK_DEAD || status == EP_ERR_TIMEOUT;
}

static int report(const run_state *s)
{
    int worst = -1;
    for (int r = 0; r < s->started; r++) {
        ep_status status = s->shared->rank[r].status;
        if (status == EP_OK)
            continue;
        if (worst < 0 || (is_consequence(s->shared->rank[worst].status) && !is_consequence(status)))
            worst = r;
    }
    if (worst < 0)
        return s->started == s->config->num_ranks ? EXIT_OK : EXIT_RUNTIME;
    const outcome *o = &s->shared->rank[worst];
    fprintf(stderr, "%s: rank %d: %s (%s)\n", s->config->command, worst, o->message,
            ep_status_string(o->status));
    return EXIT_RUNTIME;
}

int ranks_run(const ranks_config *config, rank_fn fn, void *context)
{
    run_state s = {.config = config, .fn = fn, .context = context};
    s.shared_bytes = sizeof(shared) + (size_t)config->num_ranks * sizeof(outcome);
    s.shared = ranks_shared_alloc(s.shared_bytes);
    if (!s.shared) {
        fprintf(stderr, "%s: out of memory\n", config->command);
        return EXIT_RUNTIME;
    }
    int code = EXIT_RUNTIME;
    if (config->threads ? start_threads(&s) : start_processes(&s)) {
        wait_all(&s);
        code = report(&s);
    } else {
        wait_all(&s);
    }
    ep_thread_world_destroy(s.world);
    free(s.pid);
    free(s.thread);
    ranks_shared_free(s.shared, s.shared_bytes);
    return code;
}
