/* SPDX-License-Identifier: MIT */
#include "gpu.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static char folder[64];
static pid_t owner; /* forked ranks inherit atexit, and must not end the daemon */

/* A process that ends the daemon when this one asks, or is killed. */
enum { QUIT = 'q', NO_DAEMON = 'n' };
static pid_t minder;
static int lifeline;

/* Runs the control program with `input` as its standard input; its exit code. */
static int control(const char *argument, const char *input)
{
    int ends[2];
    if (pipe(ends))
        return -1;
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[0], STDIN_FILENO);
        close(ends[0]);
        close(ends[1]);
        execlp("nvidia-cuda-mps-control", "nvidia-cuda-mps-control", argument, (char *)NULL);
        _exit(127);
    }
    close(ends[0]);
    if (child > 0 && write(ends[1], input, strlen(input)) < 0)
        perror("entrepot: nvidia-cuda-mps-control");
    close(ends[1]);
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child)
        return -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static void remove_folder(void)
{
    pid_t child = fork();
    if (child == 0) {
        execlp("rm", "rm", "-rf", "--", folder, (char *)NULL);
        _exit(127);
    }
    if (child > 0)
        waitpid(child, NULL, 0);
}

/* ---------------------------------------------------------------- the minder */

/* Waits for a word from this process, or for its end and that of all ranks, whatever ended them. */
static _Noreturn void mind(int end)
{
    char word = QUIT;
    setsid(); /* Ctrl-C is not meant for it */
    if (read(end, &word, 1) < 0 || word == QUIT)
        control(NULL, "quit\n");
    remove_folder();
    _exit(0);
}

static bool minder_start(void)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) /* open in forked ranks, but in no program they start */
        return false;
    fflush(NULL);
    minder = fork();
    if (minder == 0) {
        close(ends[1]);
        mind(ends[0]);
    }
    close(ends[0]);
    lifeline = ends[1];
    if (minder < 0)
        close(lifeline);
    return minder > 0;
}

static void minder_end(char word)
{
    if (write(lifeline, &word, 1) < 0)
        perror("entrepot: --mps");
    close(lifeline);
    waitpid(minder, NULL, 0);
    folder[0] = 0;
}

/* ---------------------------------------------------------------- start and stop */

static bool folder_create(const char *command)
{
    snprintf(folder, sizeof folder, "/tmp/entrepot-mps.XXXXXX");
    if (!mkdtemp(folder)) {
        fprintf(stderr, "%s: --mps: no folder for the daemon in /tmp\n", command);
        folder[0] = 0;
        return false;
    }
    setenv("CUDA_MPS_PIPE_DIRECTORY", folder, 1);
    setenv("CUDA_MPS_LOG_DIRECTORY", folder, 1);
    if (minder_start())
        return true;
    fprintf(stderr, "%s: --mps: no process could be started to end the daemon\n", command);
    remove_folder();
    folder[0] = 0;
    return false;
}

bool mps_start(const char *command)
{
    if (!folder_create(command))
        return false;
    int code = control("-d", "");
    if (code != 0) {
        fprintf(stderr, "%s: --mps: nvidia-cuda-mps-control -d ended with %d%s\n", command, code,
                code == 127 ? " (not found)" : "");
        minder_end(NO_DAEMON);
        return false;
    }
    owner = getpid();
    atexit(mps_stop);
    return true;
}

void mps_stop(void)
{
    if (folder[0] && owner == getpid())
        minder_end(QUIT);
}

bool mps_runs(void)
{
    const char *where = getenv("CUDA_MPS_PIPE_DIRECTORY");
    char path[4096];
    struct stat found;
    snprintf(path, sizeof path, "%s/control", where && *where ? where : "/tmp/nvidia-mps");
    return stat(path, &found) == 0;
}
