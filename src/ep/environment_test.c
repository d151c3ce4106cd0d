/* SPDX-License-Identifier: MIT */
/* What launchers leave in the environment, and what they might by mistake. */
#include "ep/environment.h"

#include "support/test.h"

#include <stdlib.h>
#include <string.h>

/* An environment as "NAME=VALUE" strings, NULL at the end. */
static const char *look(void *context, const char *name)
{
    size_t length = strlen(name);
    for (const char *const *entry = context; *entry != NULL; entry++)
        if (strncmp(*entry, name, length) == 0 && (*entry)[length] == '=')
            return *entry + length + 1;
    return NULL;
}

static ep_status parse(const char *const *environment, epi_launch *launch)
{
    return epi_launch_read(look, (void *)(uintptr_t)environment, launch);
}

static void finds_each_launcher(void **state)
{
    (void)state;
    static const struct {
        const char *environment[9];
        const char *launcher;
        int rank, num_ranks;
    } cases[] = {
        {{"PATH=/bin"}, NULL, 0, 1},
        {{"EP_RANK=3", "EP_NUM_RANKS=8", "EP_JOB=x"}, "entrepot run", 3, 8},
        {{"OMPI_COMM_WORLD_RANK=1", "OMPI_COMM_WORLD_SIZE=2", "OMPI_COMM_WORLD_LOCAL_SIZE=2"},
         "Open MPI",
         1,
         2},
        {{"PMI_RANK=0", "PMI_SIZE=4", "MPI_LOCALNRANKS=4"}, "PMI", 0, 4},
        {{"SLURM_PROCID=5", "SLURM_NTASKS=6", "SLURM_STEP_ID=0", "SLURM_NNODES=1"}, "Slurm", 5, 6},
        /* a step of fewer tasks, on fewer nodes, than the allocation around it */
        {{"SLURM_PROCID=1", "SLURM_NTASKS=64", "SLURM_STEP_NUM_TASKS=2", "SLURM_STEP_ID=3",
          "SLURM_NNODES=8", "SLURM_STEP_NUM_NODES=1"},
         "Slurm",
         1,
         2},
        /* a batch script is no rank, though it has the variables of one */
        {{"SLURM_PROCID=0", "SLURM_NTASKS=64", "SLURM_NNODES=8"}, NULL, 0, 1},
        {{"SLURM_NTASKS=64", "SLURM_STEP_NUM_TASKS=4"}, NULL, 0, 1},
        {{"RANK=1", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=2", "MASTER_PORT=29500"}, "torchrun", 1, 2},
        {{"RANK=captain"}, NULL, 0, 1}, /* somebody else's variable */
        {{"WORLD_SIZE=big"}, NULL, 0, 1},
        /* the earlier in the list counts */
        {{"RANK=1", "WORLD_SIZE=2", "EP_RANK=2", "EP_NUM_RANKS=3"}, "entrepot run", 2, 3},
        {{"PMI_RANK=0", "PMI_SIZE=4", "OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=1"},
         "Open MPI",
         0,
         1},
        {{"EP_RANK=65535", "EP_NUM_RANKS=65536"}, "entrepot run", 65535, 65536},
        {{"EP_RANK=007", "EP_NUM_RANKS=08"}, "entrepot run", 7, 8},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        epi_launch launch;
        assert_int_equal(parse(cases[i].environment, &launch), EP_OK);
        assert_int_equal(launch.rank, cases[i].rank);
        assert_int_equal(launch.num_ranks, cases[i].num_ranks);
        if (cases[i].launcher == NULL)
            assert_null(launch.launcher);
        else
            assert_string_equal(launch.launcher, cases[i].launcher);
    }
}

static void names_what_is_malformed(void **state)
{
    (void)state;
    static const struct {
        const char *environment[5];
        ep_status status;
        const char *message;
    } cases[] = {
        {{"EP_RANK=0"},
         EP_ERR_FORMAT,
         "environment variable EP_RANK is set but EP_NUM_RANKS is not"},
        {{"EP_NUM_RANKS=2"},
         EP_ERR_FORMAT,
         "environment variable EP_NUM_RANKS is set but EP_RANK is not"},
        {{"PMI_SIZE=2"}, EP_ERR_FORMAT, "environment variable PMI_SIZE is set but PMI_RANK is not"},
        {{"EP_RANK=2", "EP_NUM_RANKS=2"},
         EP_ERR_FORMAT,
         "environment variable EP_RANK is \"2\"; it can be 0..1"},
        {{"EP_RANK=-1", "EP_NUM_RANKS=2"},
         EP_ERR_FORMAT,
         "environment variable EP_RANK is \"-1\"; it can be 0..1"},
        {{"EP_RANK=", "EP_NUM_RANKS=2"},
         EP_ERR_FORMAT,
         "environment variable EP_RANK is \"\"; it can be 0..1"},
        {{"EP_RANK=1 ", "EP_NUM_RANKS=2"},
         EP_ERR_FORMAT,
         "environment variable EP_RANK is \"1 \"; it can be 0..1"},
        {{"EP_RANK=+1", "EP_NUM_RANKS=2"},
         EP_ERR_FORMAT,
         "environment variable EP_RANK is \"+1\"; it can be 0..1"},
        {{"EP_RANK=0", "EP_NUM_RANKS=0"},
         EP_ERR_FORMAT,
         "environment variable EP_NUM_RANKS is \"0\"; it can be 1..65536"},
        {{"EP_RANK=0", "EP_NUM_RANKS=99999999999999999999999"},
         EP_ERR_FORMAT,
         "environment variable EP_NUM_RANKS is \"99999999999999999999999\"; it can be 1..65536"},
        {{"EP_RANK=0x1", "EP_NUM_RANKS=2"},
         EP_ERR_FORMAT,
         "environment variable EP_RANK is \"0x1\"; it can be 0..1"},
        {{"RANK=0", "WORLD_SIZE=2", "LOCAL_WORLD_SIZE=two"},
         EP_ERR_FORMAT,
         "environment variable LOCAL_WORLD_SIZE is \"two\"; it can be 1..65536"},
        {{"RANK=0", "WORLD_SIZE=16", "LOCAL_WORLD_SIZE=8"},
         EP_ERR_UNSUPPORTED,
         "8 of 16 ranks are on this host (LOCAL_WORLD_SIZE); ranks on several hosts are not "
         "supported"},
        {{"SLURM_PROCID=0", "SLURM_NTASKS=16", "SLURM_STEP_ID=0", "SLURM_NNODES=2"},
         EP_ERR_UNSUPPORTED,
         "the ranks are on 2 hosts (SLURM_NNODES); ranks on several hosts are not supported"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        epi_launch launch;
        assert_int_equal(parse(cases[i].environment, &launch), cases[i].status);
        assert_string_equal(ep_last_error(), cases[i].message);
    }
}

static uint64_t job_of(const char *const *environment)
{
    return epi_launch_job(look, (void *)(uintptr_t)environment);
}

static void tells_jobs_apart(void **state)
{
    (void)state;
    static const char *const jobs[][5] = {
        {"EP_JOB=a"},
        {"EP_JOB=b"},
        {"EP_RANK=0", "EP_NUM_RANKS=2"},
        {"OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=2", "PMIX_NAMESPACE=1"},
        {"OMPI_COMM_WORLD_RANK=0", "OMPI_COMM_WORLD_SIZE=2", "PMIX_NAMESPACE=2"},
        {"SLURM_PROCID=0", "SLURM_NTASKS=2", "SLURM_JOB_ID=11", "SLURM_STEP_ID=1"},
        {"SLURM_PROCID=0", "SLURM_NTASKS=2", "SLURM_JOB_ID=1", "SLURM_STEP_ID=11"},
        {"RANK=0", "WORLD_SIZE=2", "MASTER_PORT=29500"},
        {"RANK=0", "WORLD_SIZE=2", "MASTER_PORT=29501"},
        {"RANK=0", "WORLD_SIZE=2", "MASTER_PORT=29500", "TORCHELASTIC_RESTART_COUNT=1"},
    };
    enum { JOBS = sizeof jobs / sizeof *jobs };
    for (int i = 0; i < JOBS; i++)
        for (int j = 0; j < JOBS; j++)
            assert_true((job_of(jobs[i]) == job_of(jobs[j])) == (i == j));
    /* ranks of one job agree, and EP_JOB decides alone */
    static const char *const other[] = {"RANK=1", "WORLD_SIZE=2", "MASTER_PORT=29500", NULL};
    static const char *const forced[] = {"RANK=1", "WORLD_SIZE=2", "MASTER_PORT=1", "EP_JOB=a",
                                         NULL};
    assert_true(job_of(other) == job_of(jobs[7]));
    assert_true(job_of(forced) == job_of(jobs[0]));
}

static void reads_the_timeout(void **state)
{
    (void)state;
    static const char *const none[] = {NULL}, *const good[] = {"EP_TIMEOUT_MS=86400000", NULL},
                             *const zero[] = {"EP_TIMEOUT_MS=0", NULL},
                             *const text[] = {"EP_TIMEOUT_MS=10s", NULL};
    int64_t timeout_ms = 5;
    assert_int_equal(epi_environment_timeout(look, (void *)(uintptr_t)none, &timeout_ms), EP_OK);
    assert_int_equal(timeout_ms, 5);
    assert_int_equal(epi_environment_timeout(look, (void *)(uintptr_t)good, &timeout_ms), EP_OK);
    assert_int_equal(timeout_ms, 86400000);
    assert_int_equal(epi_environment_timeout(look, (void *)(uintptr_t)zero, &timeout_ms),
                     EP_ERR_FORMAT);
    assert_string_equal(ep_last_error(),
                        "environment variable EP_TIMEOUT_MS is \"0\"; it can be 1..86400000");
    assert_int_equal(epi_environment_timeout(look, (void *)(uintptr_t)text, &timeout_ms),
                     EP_ERR_FORMAT);
    assert_string_equal(ep_last_error(),
                        "environment variable EP_TIMEOUT_MS is \"10s\"; it can be 1..86400000");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(finds_each_launcher),
        cmocka_unit_test(names_what_is_malformed),
        cmocka_unit_test(tells_jobs_apart),
        cmocka_unit_test(reads_the_timeout),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
