/* SPDX-License-Identifier: MIT */
#include "gpu.h"

#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

/* What the child found: devices, or why there are none. */
typedef struct finding {
    int32_t count;
    char reason[RANK_MESSAGE_MAX];
} finding;

static void look(finding *f)
{
    ep_device_info info = {.size = sizeof info};
    ep_status status = ep_device_count(EP_DEVICE_CUDA, &f->count);
    if (status == EP_OK && f->count == 0)
        status = ep_device_query(EP_DEVICE_CUDA, 0, &info); /* says why */
    if (status != EP_OK)
        snprintf(f->reason, sizeof f->reason, "%s", ep_last_error());
}

/* A driver or module that crashes, or ends the process, says nothing here. */
static void note_end(finding *f, int status)
{
    if (WIFSIGNALED(status))
        snprintf(f->reason, sizeof f->reason, "looking for one was ended by signal %d (%s)",
                 WTERMSIG(status), strsignal(WTERMSIG(status)));
    else if (!f->reason[0] && (f->count == 0 || WEXITSTATUS(status) != 0))
        snprintf(f->reason, sizeof f->reason, "looking for one ended with code %d and no reason",
                 WEXITSTATUS(status));
    if (f->reason[0])
        f->count = 0;
}

static const char *next_step(const char *reason)
{
    if (strstr(reason, "support could not be opened"))
        return "build the module where nvcc is (cmake --preset cuda; cmake --build --preset cuda), "
               "or name its file in EP_CUDA_MODULE";
    return "see whether nvidia-smi lists a GPU and a driver for CUDA 13";
}

/* How many GPUs there are; 0 after a message. */
static int count_gpus(const char *command)
{
    finding *f = ranks_shared_alloc(sizeof *f);
    int count = 0, status;
    pid_t child = f ? fork() : -1;
    if (child == 0) {
        look(f);
        _exit(0);
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
        fprintf(stderr, "%s: --backend cuda: no process could be started to look for GPUs\n",
                command);
    else {
        note_end(f, status);
        count = f->count;
        if (count == 0)
            fprintf(stderr,
                    "%s: --backend cuda: no GPU can be used: %s; %s, or run with --backend cpu\n",
                    command, f->reason, next_step(f->reason));
    }
    ranks_shared_free(f, sizeof *f);
    return count;
}

bool gpu_prepare(const char *command, int ranks, bool mps)
{
    int count = count_gpus(command);
    if (count == 0)
        return false;
    if (mps)
        return mps_start(command);
    if (count < ranks && !mps_runs())
        fprintf(stderr,
                "%s: %d ranks share %d GPU%s without MPS and take turns of milliseconds; --mps "
                "lets them run at once\n",
                command, ranks, count, count > 1 ? "s" : "");
    return true;
}
