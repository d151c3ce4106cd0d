/* SPDX-License-Identifier: MIT */
#include "child.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <unistd.h>

bool job_id_create(char id[JOB_ID_SIZE])
{
    unsigned char bytes[(JOB_ID_SIZE - 1) / 2];
    if (getrandom(bytes, sizeof bytes, 0) != (ssize_t)sizeof bytes)
        return false;
    for (size_t i = 0; i < sizeof bytes; i++)
        snprintf(id + 2 * i, 3, "%02x", bytes[i]);
    return true;
}

bool child_tie_to_parent(pid_t parent)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL))
        return false;
    /* The parent may have died between fork and prctl; then no signal would ever come. */
    return getppid() == parent;
}

bool child_set_rank(int rank, int num_ranks, const char *job)
{
    char text[16];
    snprintf(text, sizeof text, "%d", rank);
    if (setenv("EP_RANK", text, 1))
        return false;
    snprintf(text, sizeof text, "%d", num_ranks);
    return setenv("EP_NUM_RANKS", text, 1) == 0 && setenv("EP_JOB", job, 1) == 0;
}
