/* SPDX-License-Identifier: MIT */
#include "job.h"

#include "child.h"
#include "lines.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define KILL_AFTER_SECONDS 2.0 /* between asking ranks to end and killing them */

typedef struct job {
    const job_config *config;
    job_rank *ranks;
    const char *id;
    pid_t self;
    int alive;
    int first_failure;
    int signals;         /* signalfd */
    sigset_t old_mask;   /* of signals, restored in ranks */
    lines *output;       /* [2 * num_ranks] with --prefix, else NULL */
    struct pollfd *poll; /* the signalfd, then one per output */
    double deadline;     /* when the next step of ending the job is due; INFINITY: never */
    int next_signal;     /* that step */
    bool ending;         /* ranks fall because they were told to */
} job;

static double now_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

/* ---------------------------------------------------------------- starting */

static void redirect_input(int rank)
{
    if (rank == 0)
        return; /* rank 0 reads what this command was given */
    int null = open("/dev/null", O_RDONLY);
    if (null >= 0) {
        dup2(null, STDIN_FILENO);
        close(null);
    }
}

/* The child's part. `report` tells the parent why the program could not be started. */
static void become_rank(const job *j, int rank, const int *out, int report)
{
    const job_config *config = j->config;
    sigprocmask(SIG_SETMASK, &j->old_mask, NULL);
    if (!child_tie_to_parent(j->self))
        _exit(1);
    redirect_input(rank);
    if (config->prefix) {
        dup2(out[0], STDOUT_FILENO);
        dup2(out[1], STDERR_FILENO);
    } else if (config->stdout_to_stderr) {
        dup2(STDERR_FILENO, STDOUT_FILENO);
    }
    if (child_set_rank(rank, config->num_ranks, j->id))
        execvp(config->program[0], config->program);
    int error = errno;
    ssize_t ignored = write(report, &error, sizeof error);
    (void)ignored;
    _exit(127);
}

static bool make_output(job *j, int rank, int *out)
{
    char prefix[24];
    snprintf(prefix, sizeof prefix, "[%d] ", rank);
    for (int i = 0; i < 2; i++) {
        int ends[2];
        if (pipe2(ends, O_CLOEXEC))
            return false;
        int to = i == 0 && !j->config->stdout_to_stderr ? STDOUT_FILENO : STDERR_FILENO;
        lines_start(&j->output[2 * rank + i], ends[0], to, prefix);
        out[i] = ends[1];
    }
    return true;
}

static bool start_failed(const job *j, int rank, const char *what, int error)
{
    fprintf(stderr, "%s: rank %d: %s: %s\n", j->config->name, rank, what, strerror(error));
    return false;
}

static bool start_rank(job *j, int rank)
{
    int report[2], out[2] = {-1, -1}, error = 0;
    if (pipe2(report, O_CLOEXEC))
        return start_failed(j, rank, "pipe", errno);
    if (j->config->prefix && !make_output(j, rank, out)) {
        error = errno;
        close(report[0]);
        close(report[1]);
        return start_failed(j, rank, "pipe", error);
    }
    pid_t pid = fork();
    if (pid == 0)
        become_rank(j, rank, out, report[1]);
    error = pid < 0 ? errno : 0;
    close(report[1]);
    for (int i = 0; i < 2; i++) {
        if (out[i] >= 0)
            close(out[i]);
    }
    if (pid > 0) {
        j->ranks[rank].pid = pid;
        j->alive++;
        /* The pipe closes without a word when the program was started. */
        if (read(report[0], &error, sizeof error) != (ssize_t)sizeof error)
            error = 0;
    }
    close(report[0]);
    return error == 0 || start_failed(j, rank, j->config->program[0], error);
}

/* ------------------------------------------------------------------ ending */

static void signal_ranks(const job *j, int signal)
{
    for (int r = 0; r < j->config->num_ranks; r++) {
        if (j->ranks[r].pid)
            kill(j->ranks[r].pid, signal);
    }
}

static void end_in(job *j, double seconds, int signal)
{
    double when = now_seconds() + seconds;
    if (when < j->deadline) {
        j->deadline = when;
        j->next_signal = signal;
    }
}

static void take_step(job *j)
{
    j->ending = true;
    signal_ranks(j, j->next_signal);
    j->deadline = INFINITY;
    if (j->next_signal == SIGTERM)
        end_in(j, KILL_AFTER_SECONDS, SIGKILL);
}

static void report_end(const job *j, int rank)
{
    const job_rank *r = &j->ranks[rank];
    if (r->signal)
        fprintf(stderr, "%s: rank %d was ended by signal %d (%s)\n", j->config->name, rank,
                r->signal, strsignal(r->signal));
    else if (r->code)
        fprintf(stderr, "%s: rank %d exited with code %d\n", j->config->name, rank, r->code);
}

static void rank_ended(job *j, int rank, int status)
{
    job_rank *r = &j->ranks[rank];
    r->pid = 0;
    r->signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    r->code = r->signal ? 128 + r->signal : WEXITSTATUS(status);
    j->alive--;
    /* Those that fall because the job is being ended need no line each. */
    if (!j->ending)
        report_end(j, rank);
    if (r->code && !j->first_failure) {
        j->first_failure = r->code;
        if (!j->config->keep_going)
            end_in(j, j->config->grace_seconds, SIGTERM);
    }
}

/* Also reaps what ranks left behind, which comes to this process as their subreaper. */
static void reap(job *j)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        for (int r = 0; r < j->config->num_ranks; r++) {
            if (j->ranks[r].pid == pid)
                rank_ended(j, r, status);
        }
    }
}

static void take_signals(job *j)
{
    struct signalfd_siginfo info;
    while (read(j->signals, &info, sizeof info) == (ssize_t)sizeof info) {
        int signal = (int)info.ssi_signo;
        if (signal == SIGCHLD) {
            reap(j);
            continue;
        }
        /* A key pressed at the terminal has reached the ranks already. */
        if (info.ssi_code != SI_KERNEL)
            signal_ranks(j, signal);
        j->ending |= signal != SIGUSR1 && signal != SIGUSR2;
        if (signal != SIGUSR1 && signal != SIGUSR2)
            end_in(j, j->config->grace_seconds, SIGKILL);
    }
}

/* Kills every child that is left: programs that ranks started and did not wait for. */
static void end_strays(void)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/task/%d/children", (int)getpid());
    /* A killed child's own children come to this process next, hence the loop. */
    for (;;) {
        pid_t ended = waitpid(-1, NULL, WNOHANG);
        if (ended < 0)
            return;
        FILE *file = ended == 0 ? fopen(path, "re") : NULL;
        if (ended == 0 && !file)
            return; /* no telling whom to end */
        long pid;
        while (file && fscanf(file, "%ld", &pid) == 1)
            kill((pid_t)pid, SIGKILL);
        if (file)
            fclose(file);
        if (ended == 0)
            poll(NULL, 0, 1);
    }
}

/* ---------------------------------------------------------------- the loop */

static int wait_ms(const job *j)
{
    if (j->deadline == INFINITY)
        return -1;
    double left = (j->deadline - now_seconds()) * 1e3;
    return left <= 0 ? 0 : left > 60000 ? 60000 : (int)left + 1;
}

static void copy_output(job *j)
{
    for (int i = 0; j->output && i < 2 * j->config->num_ranks; i++) {
        if (j->output[i].from >= 0 && !lines_copy(&j->output[i]))
            j->poll[1 + i].fd = -1;
    }
}

static void supervise(job *j)
{
    int count = 1 + (j->output ? 2 * j->config->num_ranks : 0);
    j->poll[0] = (struct pollfd){.fd = j->signals, .events = POLLIN};
    for (int i = 1; i < count; i++)
        j->poll[i] = (struct pollfd){.fd = j->output[i - 1].from, .events = POLLIN};
    while (j->alive > 0) {
        int ready = poll(j->poll, (nfds_t)count, wait_ms(j));
        if (ready < 0 && errno != EINTR)
            end_in(j, 0, SIGKILL);
        take_signals(j);
        copy_output(j);
        if (now_seconds() >= j->deadline)
            take_step(j);
    }
    copy_output(j);
}

static bool open_signals(job *j)
{
    static const int watched[] = {SIGCHLD, SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2};
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < sizeof watched / sizeof watched[0]; i++)
        sigaddset(&set, watched[i]);
    sigprocmask(SIG_BLOCK, &set, &j->old_mask);
    j->signals = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    return j->signals >= 0;
}

static bool set_up(job *j)
{
    size_t outputs = j->config->prefix ? 2 * (size_t)j->config->num_ranks : 0;
    j->poll = calloc(1 + outputs, sizeof *j->poll);
    j->output = outputs ? calloc(outputs, sizeof *j->output) : NULL;
    for (size_t i = 0; j->output && i < outputs; i++)
        j->output[i].from = -1;
    if (!j->poll || (outputs && !j->output)) {
        fprintf(stderr, "%s: out of memory\n", j->config->name);
        return false;
    }
    if (!open_signals(j) || prctl(PR_SET_CHILD_SUBREAPER, 1)) {
        fprintf(stderr, "%s: %s\n", j->config->name, strerror(errno));
        return false;
    }
    return true;
}

int job_run(const job_config *config, job_rank *ranks, char *id)
{
    job j = {.config = config,
             .ranks = ranks,
             .id = id,
             .self = getpid(),
             .signals = -1,
             .deadline = INFINITY};
    bool started = false;
    for (int r = 0; r < config->num_ranks; r++)
        ranks[r] = (job_rank){0, -1, 0};
    if (!job_id_create(id))
        fprintf(stderr, "%s: no random bytes: %s\n", config->name, strerror(errno));
    else
        started = set_up(&j);
    for (int r = 0; started && r < config->num_ranks; r++)
        started = start_rank(&j, r);
    j.ending = !started;
    if (!started)
        signal_ranks(&j, SIGKILL);
    if (j.signals >= 0)
        supervise(&j);
    end_strays();
    for (int i = 0; j.output && i < 2 * config->num_ranks; i++)
        lines_end(&j.output[i]);
    free(j.output);
    free(j.poll);
    if (j.signals >= 0)
        close(j.signals);
    return started ? j.first_failure : -1;
}
