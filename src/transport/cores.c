/* SPDX-License-Identifier: MIT */
#include "transport/cores.h"

#include <math.h>
#include <sched.h>
#include <string.h>
#include <unistd.h>

#define MASK_WORDS 16 /* 1024 cores; beyond them the mask counts as unknown */

typedef struct core_mask {
    uint64_t word[MASK_WORDS];
} core_mask;

/* All zero where the mask cannot be had. */
static core_mask own_mask(void)
{
    core_mask mask = {{0}};
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof set, &set) != 0)
        return mask;
    for (int core = 0; core < 64 * MASK_WORDS && core < CPU_SETSIZE; core++)
        if (CPU_ISSET(core, &set))
            mask.word[core / 64] |= UINT64_C(1) << (core % 64);
    return mask;
}

static int count_cores(const core_mask *mask)
{
    int count = 0;
    for (int i = 0; i < MASK_WORDS; i++)
        count += __builtin_popcountll(mask->word[i]);
    return count;
}

static int count_common(const core_mask *a, const core_mask *b)
{
    int count = 0;
    for (int i = 0; i < MASK_WORDS; i++)
        count += __builtin_popcountll(a->word[i] & b->word[i]);
    return count;
}

ep_status epi_ranks_per_core(epi_bootstrap *bootstrap, int *ranks_per_core)
{
    core_mask mine = own_mask();
    const void *all = NULL;
    ep_status status = epi_gather(bootstrap, &mine, sizeof mine, &all);
    if (status != EP_OK)
        return status;
    const core_mask *masks = all;
    int cores = count_cores(&mine);
    double load = 0; /* ranks on this rank's cores */
    for (int rank = 0; rank < bootstrap->num_ranks; rank++) {
        int theirs = count_cores(&masks[rank]);
        if (theirs > 0)
            load += (double)count_common(&mine, &masks[rank]) / theirs;
    }
    if (cores == 0) {
        cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
        load = bootstrap->num_ranks;
    }
    /* slack against 3 * (1.0 / 3) > 1 */
    *ranks_per_core = cores > 0 ? (int)ceil(load / cores - 1e-6) : 1;
    if (*ranks_per_core < 1)
        *ranks_per_core = 1;
    return EP_OK;
}
