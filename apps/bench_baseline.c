/* SPDX-License-Identifier: MIT */
/* Starts the MPI baseline program through mpirun and reads what it prints. */
#include "bench.h"
#include "exit.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROGRAM "entrepot-mpi-baseline"
#define MAX_WORDS 40

#ifndef EP_MPIEXEC
#define EP_MPIEXEC ""
#define EP_MPI_IS_OPEN_MPI 0
#endif

typedef struct words {
    char *word[MAX_WORDS];
    int count;
    char numbers[10][24];
    int num_numbers;
} words;

static void add(words *w, const char *word)
{
    w->word[w->count++] = (char *)word; /* execvp takes them so, and changes none */
}

static void add_number(words *w, const char *name, int64_t value)
{
    char *text = w->numbers[w->num_numbers++];
    snprintf(text, sizeof w->numbers[0], "%lld", (long long)value);
    add(w, name);
    add(w, text);
}

/* The baseline lies beside this command. False when it is not there. */
static bool find_program(char *path, size_t size)
{
    ssize_t n = readlink("/proc/self/exe", path, size - 1);
    if (n <= 0)
        return false;
    path[n] = 0;
    char *slash = strrchr(path, '/');
    size_t left = size - (size_t)(slash + 1 - path);
    if (snprintf(slash + 1, left, "%s", PROGRAM) >= (int)left)
        return false;
    return access(path, X_OK) == 0;
}

bool bench_baseline_present(void)
{
    char path[4096];
    return EP_MPIEXEC[0] && find_program(path, sizeof path);
}

static void build_words(words *w, const bench_options *o, const char *program)
{
    add(w, EP_MPIEXEC);
    add_number(w, "-n", o->ranks);
    if (EP_MPI_IS_OPEN_MPI)
        add(w, "--oversubscribe");
    add(w, program);
    add_number(w, "--tokens", o->tokens);
    add_number(w, "--hidden", o->hidden);
    add_number(w, "--topk", o->topk);
    add_number(w, "--experts", o->experts);
    add_number(w, "--iters", o->iters);
    add_number(w, "--warmup", o->warmup);
    add_number(w, "--seed", o->seed);
    if (o->trace_path) {
        add(w, "--trace");
        add(w, o->trace_path);
    }
    if (o->plan_path) {
        add(w, "--plan");
        add(w, o->plan_path);
        add_number(w, "--plan-layer", o->plan_layer);
    }
    if (o->check)
        add(w, "--check");
    w->word[w->count] = NULL;
}

static void become_mpirun(const words *w, int out, pid_t parent)
{
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* mpirun then ends its ranks itself */
    if (getppid() != parent)
        _exit(1);
    dup2(out, STDOUT_FILENO);
    if (EP_MPI_IS_OPEN_MPI && geteuid() == 0) {
        /* Open MPI refuses to run as root unless told twice. */
        setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
        setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    }
    execvp(w->word[0], w->word);
    fprintf(stderr, "entrepot bench ep: %s: %s\n", w->word[0], strerror(errno));
    _exit(127);
}

/* Keeps the better of two runs of a phase. */
static void keep(double us, const char *text, bool first, double *best, char *how)
{
    if (first || us < *best) {
        *best = us;
        snprintf(how, BENCH_EXCHANGE_MAX, "%.*s", BENCH_EXCHANGE_MAX - 1, text);
    }
}

/* Reads "KEY NUMBER TEXT" lines to the end; counts those understood. */
static int read_results(FILE *in, bench_baseline *b)
{
    char line[512], key[32], text[128];
    double value;
    int known = 0;
    while (fgets(line, sizeof line, in)) {
        if (sscanf(line, "%31s %lf %127[^\n]", key, &value, text) != 3)
            continue;
        known++;
        if (strcmp(key, "dispatch") == 0)
            keep(value, text, !b->present, &b->dispatch_us, b->dispatch_exchange);
        else if (strcmp(key, "combine") == 0)
            keep(value, text, !b->present, &b->combine_us, b->combine_exchange);
        else if (strcmp(key, "library") == 0)
            snprintf(b->library, sizeof b->library, "%s", text);
        else
            known--;
    }
    return known;
}

static int finish(pid_t pid, int known, bench_baseline *b)
{
    int status = 0;
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_RUNTIME;
    if (code == EXIT_OK && known == 3) {
        b->present = true;
        return EXIT_OK;
    }
    fprintf(stderr, "entrepot bench ep: the MPI baseline %s\n",
            code == EXIT_CHECK_FAILED ? "gave wrong results" : "failed");
    return code == EXIT_CHECK_FAILED ? EXIT_CHECK_FAILED : EXIT_RUNTIME;
}

int bench_run_baseline(const bench_options *o, bench_baseline *b)
{
    char program[4096];
    int out[2];
    words w = {.count = 0};
    if (!EP_MPIEXEC[0]) {
        fprintf(stderr, "entrepot bench ep: --baseline mpi: this build has no MPI baseline\n");
        return EXIT_RUNTIME;
    }
    if (!find_program(program, sizeof program) || pipe(out)) {
        fprintf(stderr, "entrepot bench ep: %s is not beside this command\n", PROGRAM);
        return EXIT_RUNTIME;
    }
    build_words(&w, o, program);
    pid_t parent = getpid(), pid = fork();
    if (pid == 0) {
        close(out[0]);
        become_mpirun(&w, out[1], parent);
    }
    close(out[1]);
    FILE *in = pid > 0 ? fdopen(out[0], "r") : NULL;
    if (!in) {
        fprintf(stderr, "entrepot bench ep: mpirun could not be started: %s\n", strerror(errno));
        close(out[0]);
        return EXIT_RUNTIME;
    }
    int known = read_results(in, b);
    fclose(in);
    return finish(pid, known, b);
}
