/* SPDX-License-Identifier: MIT */
/* Changes to one layer's placement, the best one at a time: the incremental policy, and the last
 * step of the searching ones. */
#ifndef EPI_PLAN_EPLB_CHANGE_H
#define EPI_PLAN_EPLB_CHANGE_H

#include "plan/eplb.h"
#include "plan/eplb_cell.h"

typedef struct epi_change {
    const epi_plan *plan;
    const int32_t *current; /* [replicas] */
    epi_cell cell;          /* all GPUs of the layer; nodes bound the changes */
    double *delta;          /* [windows][gpus] change of load under trial, else 0 */
    int *touched;           /* [gpus] GPUs that the trial changes */
    int touched_count;
    char *is_touched; /* [gpus] */
    int *first;       /* [experts + 1] where each expert's slots begin in `slots` */
    int *slots;       /* [replicas] slots by expert */
    int moves;        /* replicas to fetch so far */
} epi_change;

ep_status epi_change_open(epi_change *c, const epi_plan *plan);
void epi_change_close(epi_change *c);

/* Begins a layer; load [windows][layers][experts], current [replicas]. */
void epi_change_start(epi_change *c, const float *load, int layer, const int32_t *current);

/* Makes the change with the most gain per fetched replica, keeping within max_moves;
 * returns 0 when none helps. */
int epi_change_step(epi_change *c, int max_moves);

/* Mean over windows of the layer's balancedness. */
double epi_change_balance(const epi_change *c);

int epi_change_moves(const epi_change *c);

void epi_change_write(const epi_change *c, int32_t *phy2log);

#endif
