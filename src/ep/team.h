/* SPDX-License-Identifier: MIT */
/* A quota of helper threads that split a loop with the thread that asks. */
#ifndef EPI_EP_TEAM_H
#define EPI_EP_TEAM_H

#include "entrepot/status.h"

#include <stdint.h>

typedef struct epi_team epi_team;

/* Part `part` of `parts` of the loop. */
typedef void (*epi_team_fn)(void *context, int part, int parts);

/* `helpers` >= 0 threads; with 0 the team is only its caller. */
ep_status epi_team_create(int helpers, epi_team **team);
void epi_team_destroy(epi_team *team);

/* Runs all parts and returns when they are done; one caller at a time. NULL runs them here. */
void epi_team_run(epi_team *team, epi_team_fn fn, void *context);

/* How many parts epi_team_run makes. */
int epi_team_parts(const epi_team *team);

/* The share [*begin, *end) of `count` things that a part has. */
static inline void epi_team_share(int64_t count, int part, int parts, int64_t *begin, int64_t *end)
{
    *begin = count * part / parts;
    *end = count * (part + 1) / parts;
}

#endif
