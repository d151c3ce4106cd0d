/* SPDX-License-Identifier: MIT */
/*
 * How many replicas each expert gets.
 *
 * The largest replica is least when each further slot goes to the expert with
 * the heaviest replicas, as in the reference; of several windows the heaviest
 * decides, which held better on windows not planned for than their mean did.
 *
 * With two slots per GPU that is not the best: what counts is the heaviest
 * pair, and a light expert cut in two makes two good partners. The best pairing
 * of given replicas is heaviest with lightest, so counts can be judged exactly
 * and are improved slot by slot. With several windows no one pairing is best.
 */
#include "plan/eplb_cell.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* High enough that the heaviest pair decides, low enough that the next ones still count. */
enum { PAIR_POWER_LOG2 = 8 };
/* Pairs below this part of the heaviest add less than 1e-11 to the cost. */
#define PAIR_NEGLIGIBLE 0.9
/* Slots are moved to relieve pairs above this part of the heaviest. */
#define PAIR_CRITICAL 0.98
/* Shares looked at before the search ends anyway, some tenths of a second: the need grows with a
 * high power of the slots. 288 slots stay far below it. */
#define PAIR_WORK ((int64_t)1 << 28)

static void count_greedily(epi_cell *cell, double *share, int most)
{
    int n = cell->experts;
    for (int e = 0; e < n; e++) {
        cell->count[e] = 1;
        share[e] = cell->most[e];
    }
    for (int slot = n; slot < cell->gpus * cell->slots; slot++) {
        int heaviest = -1;
        for (int e = 0; e < n; e++)
            if (cell->count[e] < most && (heaviest < 0 || share[e] > share[heaviest]))
                heaviest = e;
        share[heaviest] = cell->most[heaviest] / ++cell->count[heaviest];
    }
}

/* Sum of (pair / unit)^256 over the pairs of ascending shares, heaviest with lightest. */
static double pair_cost(const double *share, int n, double unit)
{
    double sum = 0;
    for (int i = 0; i < n / 2; i++) {
        double pair = (share[i] + share[n - 1 - i]) / unit;
        if (pair < PAIR_NEGLIGIBLE)
            continue;
        for (int k = 0; k < PAIR_POWER_LOG2; k++)
            pair *= pair;
        sum += pair;
    }
    return sum;
}

/* Index of the first share that is not below `value`. */
static int lower_bound(const double *share, int n, double value)
{
    int low = 0;
    while (low < n) {
        int middle = (low + n) / 2;
        if (share[middle] < value)
            low = middle + 1;
        else
            n = middle;
    }
    return low;
}

/* Replaces `from` shares of weight / from by `to` of weight / to in ascending order; returns n. */
static int recount(double *share, int n, double weight, int from, int to)
{
    if (from) {
        int at = lower_bound(share, n, weight / from);
        memmove(share + at, share + at + from, (size_t)(n - at - from) * sizeof *share);
        n -= from;
    }
    if (to) {
        int at = lower_bound(share, n, weight / to);
        memmove(share + at + to, share + at, (size_t)(n - at) * sizeof *share);
        for (int i = 0; i < to; i++)
            share[at + i] = weight / to;
        n += to;
    }
    return n;
}

typedef struct pairing {
    epi_cell *cell;
    int n, most;
    int64_t work;                   /* shares that may still be looked at */
    double unit;                    /* heaviest pair at the start */
    double heavy;                   /* least of the heavy halves of the critical pairs */
    double light;                   /* greatest of their light halves */
    double *share, *without, *with; /* [n], [n], [n + 1] */
} pairing;

static void find_critical(pairing *p)
{
    double peak = 0;
    p->heavy = INFINITY;
    p->light = 0;
    for (int i = 0; i < p->n / 2; i++)
        peak = fmax(peak, p->share[i] + p->share[p->n - 1 - i]);
    for (int i = 0; i < p->n / 2; i++)
        if (p->share[i] + p->share[p->n - 1 - i] >= PAIR_CRITICAL * peak) {
            p->heavy = fmin(p->heavy, p->share[p->n - 1 - i]);
            p->light = fmax(p->light, p->share[i]);
        }
}

/* Only cutting a heavy half or making a lighter partner does. */
static int relieves(const pairing *p, int e)
{
    double weight = p->cell->most[e];
    int count = p->cell->count[e];
    return weight / count >= p->heavy || weight / (count + 1) <= p->light;
}

/* The best receiver of a slot that `giver` loses, and its cost when below `best`. */
static int best_receiver(pairing *p, int giver, double *best)
{
    epi_cell *cell = p->cell;
    int found = -1, count = cell->count[giver];
    memcpy(p->without, p->share, (size_t)p->n * sizeof *p->share);
    int left = recount(p->without, p->n, cell->most[giver], count, count - 1);
    for (int e = 0; e < cell->experts && p->work > 0; e++) {
        if (e == giver || cell->count[e] >= p->most || !relieves(p, e))
            continue;
        p->work -= p->n;
        memcpy(p->with, p->without, (size_t)left * sizeof *p->with);
        recount(p->with, left, cell->most[e], cell->count[e], cell->count[e] + 1);
        double cost = pair_cost(p->with, p->n, p->unit);
        if (cost < *best) {
            *best = cost;
            found = e;
        }
    }
    return found;
}

static void move_slot(pairing *p, int giver, int receiver)
{
    epi_cell *cell = p->cell;
    int n = recount(p->share, p->n, cell->most[giver], cell->count[giver], cell->count[giver] - 1);
    recount(p->share, n, cell->most[receiver], cell->count[receiver], cell->count[receiver] + 1);
    cell->count[giver]--;
    cell->count[receiver]++;
}

/* Lets each giver make its best move in turn; returns whether any helped. */
static int move_slots(pairing *p, double *cost)
{
    epi_cell *cell = p->cell;
    int moved = 0;
    for (int giver = 0; giver < cell->experts; giver++) {
        double best = *cost * (1 - 1e-9);
        if (cell->count[giver] < 2)
            continue;
        find_critical(p);
        int receiver = best_receiver(p, giver, &best);
        if (receiver < 0)
            continue;
        move_slot(p, giver, receiver);
        *cost = best;
        moved = 1;
    }
    return moved;
}

static void improve_pairs(epi_cell *cell, int most)
{
    int n = 0, replicas = cell->gpus * cell->slots;
    pairing p = {
        .cell = cell, .n = replicas, .most = most, .work = PAIR_WORK, .share = cell->scratch};
    p.without = p.share + replicas + 1;
    p.with = p.without + replicas + 1;
    for (int e = 0; e < cell->experts; e++)
        n = recount(p.share, n, cell->most[e], 0, cell->count[e]);
    for (int i = 0; i < n / 2; i++) {
        double pair = p.share[i] + p.share[n - 1 - i];
        p.unit = pair > p.unit ? pair : p.unit;
    }
    if (p.unit <= 0)
        return;
    double cost = pair_cost(p.share, n, p.unit);
    while (move_slots(&p, &cost))
        ;
}

void epi_cell_count(epi_cell *cell)
{
    int replicas = cell->gpus * cell->slots;
    int most = cell->distinct ? cell->gpus : replicas;
    count_greedily(cell, cell->scratch, most);
    if (cell->slots == 2 && replicas > cell->experts && cell->windows == 1)
        improve_pairs(cell, most);
}
