/* SPDX-License-Identifier: MIT */
#include "ep/environment.h"

#include "base/error.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

/* The variables of one launcher; of alternatives the first that is set counts. */
typedef struct launcher {
    const char *name;
    const char *rank;
    const char *num_ranks[2];
    const char *needs;       /* counts only where this is set as well */
    const char *local_ranks; /* ranks on this host */
    const char *num_hosts[2];
    const char *job[3]; /* those that are set, together, tell jobs apart */
    bool generic;       /* names that others use too: one of them alone means nothing */
} launcher;

static const launcher launchers[] = {
    {.name = "entrepot run", .rank = "EP_RANK", .num_ranks = {"EP_NUM_RANKS"}},
    {.name = "Open MPI",
     .rank = "OMPI_COMM_WORLD_RANK",
     .num_ranks = {"OMPI_COMM_WORLD_SIZE"},
     .local_ranks = "OMPI_COMM_WORLD_LOCAL_SIZE",
     .job = {"PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"}},
    {.name = "PMI",
     .rank = "PMI_RANK",
     .num_ranks = {"PMI_SIZE"},
     .local_ranks = "MPI_LOCALNRANKS",
     .job = {"PMI_JOBID", "SLURM_JOB_ID", "SLURM_STEP_ID"}},
    /* A batch script has Slurm's rank 0 of N as well, but is no step of N tasks. */
    {.name = "Slurm",
     .rank = "SLURM_PROCID",
     .num_ranks = {"SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"},
     .needs = "SLURM_STEP_ID",
     .num_hosts = {"SLURM_STEP_NUM_NODES", "SLURM_NNODES"},
     .job = {"SLURM_JOB_ID", "SLURM_STEP_ID"}},
    {.name = "torchrun",
     .rank = "RANK",
     .num_ranks = {"WORLD_SIZE"},
     .local_ranks = "LOCAL_WORLD_SIZE",
     .job = {"TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT"},
     .generic = true},
};

typedef struct source {
    epi_getenv_fn get;
    void *context;
} source;

const char *epi_getenv(void *context, const char *name)
{
    (void)context;
    return getenv(name);
}

static const char *look(const source *from, const char *name)
{
    return name != NULL ? from->get(from->context, name) : NULL;
}

/* The first of two alternatives that is set, by name, or NULL. */
static const char *which_is_set(const source *from, const char *const names[2])
{
    for (int i = 0; i < 2; i++)
        if (look(from, names[i]) != NULL)
            return names[i];
    return NULL;
}

/* Decimal digits and nothing else. */
static ep_status parse(const source *from, const char *name, int64_t least, int64_t most,
                       int64_t *value)
{
    const char *text = look(from, name);
    int64_t number = 0;
    const char *at = text;
    while (*at >= '0' && *at <= '9' && number <= most)
        number = number * 10 + (*at++ - '0');
    if (at == text || *at != '\0' || number < least || number > most)
        return epi_fail(EP_ERR_FORMAT, "environment variable %s is \"%.64s\"; it can be %lld..%lld",
                        name, text, (long long)least, (long long)most);
    *value = number;
    return EP_OK;
}

/* FNV-1a, 64 bits. */
static uint64_t hash_text(uint64_t hash, const char *text)
{
    for (; *text != '\0'; text++)
        hash = (hash ^ (uint8_t)*text) * UINT64_C(0x100000001b3);
    return (hash ^ 0xff) * UINT64_C(0x100000001b3); /* so that "ab","c" and "a","bc" differ */
}

/* EP_JOB decides alone where it is set. A launcher that names no job is told apart by the process
   that started the ranks. */
static uint64_t identify_job(const source *from, const launcher *by)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    const char *job = look(from, "EP_JOB");
    if (job != NULL)
        return hash_text(hash, job);
    bool named = false;
    hash = hash_text(hash, by != NULL ? by->name : "");
    for (size_t i = 0; by != NULL && i < sizeof by->job / sizeof *by->job; i++) {
        const char *part = look(from, by->job[i]);
        named = named || part != NULL;
        hash = hash_text(hash, part != NULL ? part : "");
    }
    if (!named) {
        char parent[24];
        snprintf(parent, sizeof parent, "%lld", (long long)getppid());
        hash = hash_text(hash, parent);
    }
    return hash;
}

static ep_status check_one_host(const source *from, const launcher *by, int64_t num_ranks)
{
    int64_t value;
    if (look(from, by->local_ranks) != NULL) {
        EPI_TRY(parse(from, by->local_ranks, 1, EPI_MAX_RANKS, &value));
        if (value != num_ranks)
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "%lld of %lld ranks are on this host (%s); ranks on several hosts "
                            "are not supported",
                            (long long)value, (long long)num_ranks, by->local_ranks);
    }
    const char *hosts = which_is_set(from, by->num_hosts);
    if (hosts != NULL) {
        EPI_TRY(parse(from, hosts, 1, INT32_MAX, &value));
        if (value != 1)
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "the ranks are on %lld hosts (%s); ranks on several hosts are not "
                            "supported",
                            (long long)value, hosts);
    }
    return EP_OK;
}

/* Whether it has started this process; half of its variables is an error. */
static ep_status detect(const source *from, const launcher *by, bool *found)
{
    const char *num_ranks = which_is_set(from, by->num_ranks);
    bool has_rank = look(from, by->rank) != NULL;
    *found = false;
    if (by->needs != NULL && look(from, by->needs) == NULL)
        return EP_OK;
    *found = has_rank && num_ranks != NULL;
    if (*found || by->generic || (!has_rank && num_ranks == NULL))
        return EP_OK;
    return epi_fail(EP_ERR_FORMAT, "environment variable %s is set but %s is not",
                    has_rank ? by->rank : num_ranks, has_rank ? by->num_ranks[0] : by->rank);
}

static ep_status read_launcher(const source *from, const launcher *by, epi_launch *launch)
{
    int64_t rank, num_ranks;
    EPI_TRY(parse(from, which_is_set(from, by->num_ranks), 1, EPI_MAX_RANKS, &num_ranks));
    EPI_TRY(parse(from, by->rank, 0, num_ranks - 1, &rank));
    EPI_TRY(check_one_host(from, by, num_ranks));
    launch->launcher = by->name;
    launch->rank = (int)rank;
    launch->num_ranks = (int)num_ranks;
    launch->job = identify_job(from, by);
    return EP_OK;
}

ep_status epi_launch_read(epi_getenv_fn get, void *context, epi_launch *launch)
{
    const source from = {get, context};
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++) {
        bool found;
        EPI_TRY(detect(&from, &launchers[i], &found));
        if (found)
            return read_launcher(&from, &launchers[i], launch);
    }
    *launch = (epi_launch){.num_ranks = 1, .job = identify_job(&from, NULL)};
    return EP_OK;
}

uint64_t epi_launch_job(epi_getenv_fn get, void *context)
{
    const source from = {get, context};
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++) {
        bool found;
        if (detect(&from, &launchers[i], &found) == EP_OK && found)
            return identify_job(&from, &launchers[i]);
    }
    return identify_job(&from, NULL);
}

ep_status epi_environment_timeout(epi_getenv_fn get, void *context, int64_t *timeout_ms)
{
    const source from = {get, context};
    if (look(&from, "EP_TIMEOUT_MS") == NULL)
        return EP_OK;
    return parse(&from, "EP_TIMEOUT_MS", 1, EPI_MAX_TIMEOUT_MS, timeout_ms);
}
