/* SPDX-License-Identifier: MIT */
/* The state of a cell and its first placement. */
#include "plan/eplb_cell.h"
#include "base/error.h"

#include <stdlib.h>
#include <string.h>

/* The next `n` items of a block; NULL while there is none, to find its size. */
static void *take(char *block, size_t *used, size_t n, size_t width)
{
    size_t at = *used;
    *used += (n * width + 7) / 8 * 8;
    return block ? block + at : NULL;
}

/* Lays the arrays out in `block`, which may be NULL; returns the bytes that they take. */
static size_t lay_out(epi_cell *cell, char *block)
{
    size_t e = (size_t)cell->experts, g = (size_t)cell->gpus, w = (size_t)cell->windows;
    size_t p = g * (size_t)cell->slots, used = 0;
    cell->weight = take(block, &used, w * e, sizeof(double));
    cell->most = take(block, &used, e, sizeof(double));
    cell->share = take(block, &used, w * e, sizeof(double));
    cell->load = take(block, &used, w * g, sizeof(double));
    cell->cost = take(block, &used, w * g, sizeof(double));
    cell->unit = take(block, &used, w, sizeof(double));
    cell->scratch = take(block, &used, 4 * p + 8, sizeof(double));
    cell->count = take(block, &used, e, sizeof(int));
    cell->held = take(block, &used, p, sizeof(int));
    cell->order = take(block, &used, 2 * p, sizeof(int));
    return used;
}

ep_status epi_cell_open(epi_cell *cell, int experts, int gpus, int slots, int windows,
                        const char *call)
{
    *cell = (epi_cell){.experts = experts, .gpus = gpus, .slots = slots, .windows = windows};
    size_t bytes = lay_out(cell, NULL);
    cell->block = malloc(bytes);
    if (!cell->block)
        return epi_fail(EP_ERR_MEMORY, "%s: no memory for %zu bytes of search state", call, bytes);
    lay_out(cell, cell->block);
    return EP_OK;
}

void epi_cell_close(epi_cell *cell)
{
    free(cell->block);
    memset(cell, 0, sizeof *cell);
}

void epi_cell_size_up(epi_cell *cell)
{
    for (int e = 0; e < cell->experts; e++) {
        cell->most[e] = 0;
        for (int w = 0; w < cell->windows; w++)
            if (cell->weight[w * cell->experts + e] > cell->most[e])
                cell->most[e] = cell->weight[w * cell->experts + e];
    }
}

static void share_out(epi_cell *cell)
{
    for (int w = 0; w < cell->windows; w++)
        for (int e = 0; e < cell->experts; e++)
            cell->share[w * cell->experts + e] =
                cell->weight[w * cell->experts + e] / cell->count[e];
}

void epi_cell_measure(epi_cell *cell)
{
    int replicas = cell->gpus * cell->slots;
    memset(cell->count, 0, (size_t)cell->experts * sizeof *cell->count);
    for (int slot = 0; slot < replicas; slot++)
        cell->count[cell->held[slot]]++;
    share_out(cell);
    for (int w = 0; w < cell->windows; w++)
        for (int g = 0; g < cell->gpus; g++) {
            double sum = 0;
            for (int s = 0; s < cell->slots; s++)
                sum += cell->share[w * cell->experts + cell->held[g * cell->slots + s]];
            cell->load[w * cell->gpus + g] = sum;
        }
}

double epi_cell_peak(const epi_cell *cell, int w)
{
    double peak = 0;
    for (int g = 0; g < cell->gpus; g++)
        peak = cell->load[w * cell->gpus + g] > peak ? cell->load[w * cell->gpus + g] : peak;
    return peak;
}

int epi_cell_holds(const epi_cell *cell, int g, int expert)
{
    const int *held = cell->held + g * cell->slots;
    for (int s = 0; s < cell->slots; s++)
        if (held[s] == expert)
            return 1;
    return 0;
}

/* --- the first placement --- */

/* Lists the replicas in descending order of their share: a merge sort of experts, since the
 * replicas of one weigh the same. */
static void sort_experts(const double *share, int *order, int *spare, int n)
{
    for (int width = 1; width < n; width *= 2) {
        for (int low = 0; low < n; low += 2 * width) {
            int middle = low + width < n ? low + width : n;
            int high = low + 2 * width < n ? low + 2 * width : n;
            for (int a = low, b = middle, k = low; k < high; k++)
                spare[k] = b >= high || (a < middle && share[order[a]] >= share[order[b]])
                               ? order[a++]
                               : order[b++];
        }
        memcpy(order, spare, (size_t)n * sizeof *order);
    }
}

/* The lightest GPU with a free slot, without the expert where `apart`; -1 when there is none. */
static int lightest_gpu(const epi_cell *cell, const double *sum, int expert, int apart)
{
    int best = -1;
    for (int g = 0; g < cell->gpus; g++) {
        if (cell->held[(g + 1) * cell->slots - 1] >= 0 || (best >= 0 && sum[g] >= sum[best]))
            continue;
        if (!apart || !epi_cell_holds(cell, g, expert))
            best = g;
    }
    return best;
}

static int first_free(const epi_cell *cell, int g)
{
    int slot = g * cell->slots;
    while (cell->held[slot] >= 0)
        slot++;
    return slot;
}

/*
 * Every GPU with a free slot holds the expert already. Some full GPU does not,
 * as no expert has more replicas than there are GPUs; of its experts, more than
 * the other GPU holds besides are missing there, so one can move over. Returns
 * the slot that it leaves.
 */
static int make_room(epi_cell *cell, double *sum, const double *share, int expert)
{
    int to = lightest_gpu(cell, sum, expert, 0), best = -1;
    for (int slot = 0; slot < cell->gpus * cell->slots; slot++) {
        int moved = cell->held[slot];
        if (moved < 0 || epi_cell_holds(cell, slot / cell->slots, expert) ||
            epi_cell_holds(cell, to, moved))
            continue;
        if (best < 0 || share[moved] < share[cell->held[best]])
            best = slot;
    }
    int moved = cell->held[best];
    cell->held[first_free(cell, to)] = moved;
    sum[to] += share[moved];
    sum[best / cell->slots] -= share[moved];
    return best;
}

void epi_cell_fill(epi_cell *cell)
{
    int n = cell->experts, replicas = cell->gpus * cell->slots;
    double *sum = cell->scratch, *share = cell->scratch + cell->gpus;
    for (int e = 0; e < n; e++) {
        cell->order[e] = e;
        share[e] = cell->most[e] / cell->count[e];
    }
    sort_experts(share, cell->order, cell->order + replicas, n);
    memset(sum, 0, (size_t)cell->gpus * sizeof *sum);
    for (int slot = 0; slot < replicas; slot++)
        cell->held[slot] = -1;
    for (int k = 0; k < n; k++)
        for (int e = cell->order[k], r = 0; r < cell->count[e]; r++) {
            int g = lightest_gpu(cell, sum, e, cell->distinct);
            int slot = g >= 0 ? first_free(cell, g) : make_room(cell, sum, share, e);
            cell->held[slot] = e;
            sum[slot / cell->slots] += share[e];
        }
    epi_cell_measure(cell);
}
