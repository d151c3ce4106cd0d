/* SPDX-License-Identifier: MIT */
/*
 * Swap search: the hottest GPU exchanges a replica with whichever other GPU
 * lowers the cost most, until no exchange of any GPU helps. The cost, the sum of
 * load^power over GPUs and windows, is close to the maximum for a high power and
 * still rewards progress on the second hottest. Each swap lowers it, so the
 * search ends.
 */
#include "plan/eplb_cell.h"

#define LEAST_GAIN                                                                 \
    1e-9 /* of the cost of both GPUs, far above rounding errors: no swap is undone \
          */

static double power_of(double x, int power)
{
    double result = 1;
    for (; power; power >>= 1, x *= x)
        if (power & 1)
            result *= x;
    return result;
}

typedef struct swap {
    int here, there; /* slots */
    double gain;
} swap;

typedef struct search {
    epi_cell *cell;
    int power;
    int *stuck; /* [gpus] */
} search;

/* Loads are in units of the window's peak, so that no power overflows; the factor makes a step down
 * from the peak worth the same in every window. */
static double cost_of(const search *s, int w, double load)
{
    return s->cell->unit[w] * power_of(load, s->power);
}

static double gpu_cost(const search *s, int g)
{
    double sum = 0;
    for (int w = 0; w < s->cell->windows; w++)
        sum += s->cell->cost[w * s->cell->gpus + g];
    return sum;
}

/* What exchanging experts a of GPU g and b of GPU h lowers the cost by. */
static double gain_of(const search *s, int g, int a, int h, int b)
{
    const epi_cell *cell = s->cell;
    double gain = 0;
    for (int w = 0; w < cell->windows; w++) {
        const double *share = cell->share + w * cell->experts;
        const double *load = cell->load + w * cell->gpus, *cost = cell->cost + w * cell->gpus;
        double more = share[b] - share[a];
        gain += cost[g] + cost[h] - cost_of(s, w, load[g] + more) - cost_of(s, w, load[h] - more);
    }
    return gain;
}

/* Whether in some window the exchange brings the two loads closer; else it cannot help. */
static int may_help(const epi_cell *cell, int g, int a, int h, int b)
{
    for (int w = 0; w < cell->windows; w++) {
        const double *share = cell->share + w * cell->experts;
        const double *load = cell->load + w * cell->gpus;
        double more = share[b] - share[a];
        if (more * (load[g] - load[h] + more) < 0)
            return 1;
    }
    return 0;
}

static int allowed(const epi_cell *cell, int g, int a, int h, int b)
{
    return !cell->distinct || (!epi_cell_holds(cell, g, b) && !epi_cell_holds(cell, h, a));
}

/* Tries one slot of GPU g against all slots of GPU h. */
static void try_gpu(const search *s, int here, int g, int h, swap *best)
{
    const epi_cell *cell = s->cell;
    int a = cell->held[here];
    double least = LEAST_GAIN * (gpu_cost(s, g) + gpu_cost(s, h));
    for (int there = h * cell->slots; there < (h + 1) * cell->slots; there++) {
        int b = cell->held[there];
        if (a == b || !may_help(cell, g, a, h, b))
            continue;
        double gain = gain_of(s, g, a, h, b);
        if (gain > least && gain > best->gain && allowed(cell, g, a, h, b))
            *best = (swap){here, there, gain};
    }
}

static swap best_swap(const search *s, int g)
{
    const epi_cell *cell = s->cell;
    swap best = {-1, -1, 0};
    for (int here = g * cell->slots; here < (g + 1) * cell->slots; here++)
        for (int h = 0; h < cell->gpus; h++)
            if (h != g)
                try_gpu(s, here, g, h, &best);
    return best;
}

static void refresh(search *s, int g)
{
    epi_cell *cell = s->cell;
    for (int w = 0; w < cell->windows; w++) {
        double sum = 0;
        for (int k = g * cell->slots; k < (g + 1) * cell->slots; k++)
            sum += cell->share[w * cell->experts + cell->held[k]];
        cell->load[w * cell->gpus + g] = sum;
        cell->cost[w * cell->gpus + g] = cost_of(s, w, sum);
    }
    s->stuck[g] = 0;
}

static int hottest(const search *s)
{
    int best = -1;
    double most = 0;
    for (int g = 0; g < s->cell->gpus; g++) {
        double cost = s->stuck[g] ? 0 : gpu_cost(s, g);
        if (cost > most) {
            best = g;
            most = cost;
        }
    }
    return best;
}

/* Goes on until every GPU is stuck; returns whether anything was swapped. */
static int pass(search *s)
{
    epi_cell *cell = s->cell;
    int swapped = 0;
    for (int g = 0; g < cell->gpus; g++)
        refresh(s, g);
    for (int g = hottest(s); g >= 0; g = hottest(s)) {
        swap best = best_swap(s, g);
        s->stuck[g] = 1;
        if (best.here < 0)
            continue;
        int expert = cell->held[best.here];
        cell->held[best.here] = cell->held[best.there];
        cell->held[best.there] = expert;
        refresh(s, g);
        refresh(s, best.there / cell->slots);
        swapped = 1;
    }
    return swapped;
}

/* Turns shares into units of their window's peak load; without a load there is nothing to do. */
static int scale(epi_cell *cell)
{
    int any = 0;
    for (int w = 0; w < cell->windows; w++) {
        double peak = epi_cell_peak(cell, w);
        cell->unit[w] = peak;
        any |= peak > 0;
        for (int e = 0; e < cell->experts && peak > 0; e++)
            cell->share[w * cell->experts + e] /= peak;
    }
    return any;
}

void epi_cell_swap(epi_cell *cell, int power)
{
    search s = {.cell = cell, .power = power, .stuck = cell->order};
    if (scale(cell))
        while (pass(&s))
            ;
    epi_cell_measure(cell);
}
