/* SPDX-License-Identifier: MIT */
/*
 * A job: ranks of one program on this machine, from start to the last one's end.
 * Nothing outlives it: ranks die with this process, and what they started and
 * left behind is ended too.
 */
#ifndef APPS_JOB_H
#define APPS_JOB_H

#include <stdbool.h>
#include <sys/types.h>

typedef struct job_rank {
    pid_t pid;  /* 0 once it has ended */
    int code;   /* exit code, 128 + signal when a signal ended it; -1 while it runs */
    int signal; /* that ended it, 0 for none */
} job_rank;

typedef struct job_config {
    const char *name; /* how messages on stderr begin */
    int num_ranks;
    char **program; /* NULL-terminated words */
    bool prefix;    /* begin each line of output with "[RANK] " */
    bool stdout_to_stderr;
    bool keep_going;      /* a failed rank does not end the others */
    double grace_seconds; /* between a failure and the end of the others */
} job_config;

/*
 * Runs the job. `ranks` [num_ranks] is filled in; `id` gets the job's id.
 * Returns the first exit code that was not 0 in order of time, or 0; -1 when
 * ranks could not be started (after a message on stderr).
 */
int job_run(const job_config *config, job_rank *ranks, char *id);

#endif
