/* SPDX-License-Identifier: MIT */
/* An environment of any content: what is accepted is in range, what is not is named. */
#include "ep/environment.h"

#include "support/fuzz.h"
#include "transport/fault/options.h"

#include <stdlib.h>
#include <string.h>

/* The input as lines "NAME=VALUE". */
static const char *look(void *context, const char *name)
{
    size_t length = strlen(name);
    for (char *line = context; *line != '\0'; line += strlen(line) + 1)
        if (strncmp(line, name, length) == 0 && line[length] == '=')
            return line + length + 1;
    return NULL;
}

static void require(int condition)
{
    if (!condition)
        abort();
}

static void check_launch(char *lines)
{
    epi_launch launch;
    ep_status status = epi_launch_read(look, lines, &launch);
    require(status == EP_OK || status == EP_ERR_FORMAT || status == EP_ERR_UNSUPPORTED);
    require(status != EP_OK || (launch.num_ranks >= 1 && launch.num_ranks <= EPI_MAX_RANKS &&
                                launch.rank >= 0 && launch.rank < launch.num_ranks));
    require(status == EP_OK || ep_last_error()[0] != '\0');
    int64_t timeout_ms = 1;
    status = epi_environment_timeout(look, lines, &timeout_ms);
    require(status == EP_OK || status == EP_ERR_FORMAT);
    require(timeout_ms >= 1 && timeout_ms <= EPI_MAX_TIMEOUT_MS);
    epi_launch_job(look, lines);
}

static void check_options(const char *text)
{
    epi_fault_options options;
    if (epi_fault_options_parse(text, 4, &options) != EP_OK)
        return;
    require(options.delay_us >= 0 && options.delay_us <= 10000000);
    require(options.repeat >= 0 && options.repeat <= 100);
    require(options.kill_rank < 4 && (options.kill_rank >= 0) == (options.kill_at > 0));
    require(options.stall_rank < 4 && (options.stall_rank >= 0) == (options.stall_ms > 0));
}

static int one_input(const uint8_t *data, size_t size)
{
    char *lines = malloc(size + 2);
    if (lines == NULL)
        return 0;
    memcpy(lines, data, size);
    lines[size] = lines[size + 1] = '\0';
    char *options = strchr(lines, ':');
    if (options != NULL)
        check_options(options + 1);
    for (size_t i = 0; i < size; i++)
        if (lines[i] == '\n')
            lines[i] = '\0';
    check_launch(lines);
    free(lines);
    return 0;
}

static const char *const seeds[] = {
    "EP_RANK=1\nEP_NUM_RANKS=2\nEP_JOB=17\nEP_TIMEOUT_MS=1000\n",
    "OMPI_COMM_WORLD_RANK=0\nOMPI_COMM_WORLD_SIZE=4\nOMPI_COMM_WORLD_LOCAL_SIZE=4\n"
    "PMIX_NAMESPACE=3\n",
    "PMI_RANK=0\nPMI_SIZE=4\nMPI_LOCALNRANKS=4\n",
    "SLURM_PROCID=0\nSLURM_NTASKS=4\nSLURM_STEP_ID=1\nSLURM_NNODES=1\nSLURM_JOB_ID=4\n",
    "RANK=0\nWORLD_SIZE=4\nLOCAL_WORLD_SIZE=4\nMASTER_PORT=29500\n",
    "fault(shm):seed=1,delay_us=100,reorder=1,repeat=20,stall_rank=1,stall_at=5,stall_ms=10",
    "fault(threads):kill_rank=3,kill_at=9",
    NULL,
};
static const char *const words[] = {
    "EP_RANK=",
    "EP_NUM_RANKS=",
    "EP_TIMEOUT_MS=",
    "SLURM_STEP_ID=",
    "SLURM_STEP_NUM_NODES=",
    "\n",
    "65536",
    "-1",
    "99999999999999",
    "kill_at=",
    ",",
    "=",
    NULL,
};
static const struct fuzz_target target = {"environment", one_input, seeds, words, 512, NULL};
FUZZ_MAIN(target)
