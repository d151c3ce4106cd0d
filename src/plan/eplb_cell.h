/* SPDX-License-Identifier: MIT */
/*
 * One cell: experts that may live on any of a set of GPUs with equally many
 * slots. Without groups a layer is one cell, with groups each node is one, and
 * dealing groups to nodes is one more, with groups for experts. The searching
 * policies all work on cells, in double, over one or more load windows.
 */
#ifndef EPI_PLAN_EPLB_CELL_H
#define EPI_PLAN_EPLB_CELL_H

#include "entrepot/status.h"

typedef struct epi_cell {
    int experts, gpus, windows;
    int slots;       /* per GPU */
    int distinct;    /* whether no GPU may hold an expert twice, when avoidable */
    double *weight;  /* [windows][experts], set by the caller; the layer's mean GPU load is 1 */
    double *most;    /* [experts] weight in the heaviest window */
    int *count;      /* [experts] replicas */
    int *held;       /* [gpus][slots] experts; -1: free */
    double *share;   /* [windows][experts] weight / count */
    double *load;    /* [windows][gpus] */
    double *cost;    /* [windows][gpus] of the swap search */
    double *unit;    /* [windows] of the swap search */
    double *scratch; /* [4 * (gpus * slots) + 8] */
    int *order;      /* [2 * (gpus * slots)] scratch */
    void *block;
} epi_cell;

/* All fields but `distinct` and the weights' values are set. */
ep_status epi_cell_open(epi_cell *cell, int experts, int gpus, int slots, int windows,
                        const char *call);
void epi_cell_close(epi_cell *cell);

/* Finds each expert's heaviest window; call when the weights are set. */
void epi_cell_size_up(epi_cell *cell);

/* Decides each expert's replicas. */
void epi_cell_count(epi_cell *cell);

/* Places the replicas, heaviest first, each on the lightest GPU. */
void epi_cell_fill(epi_cell *cell);

/* Counts, shares and loads from `held`. */
void epi_cell_measure(epi_cell *cell);

/* Swaps replicas between GPUs while that lowers the sum of load^power over GPUs and windows. */
void epi_cell_swap(epi_cell *cell, int power);

/* The largest GPU load of window w. */
double epi_cell_peak(const epi_cell *cell, int w);

/* Whether GPU g holds the expert. */
int epi_cell_holds(const epi_cell *cell, int g, int expert);

#endif
