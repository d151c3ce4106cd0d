/* SPDX-License-Identifier: MIT */
#include "plan/eplb_change.h"
#include "base/error.h"

#include <stdlib.h>
#include <string.h>

/* As in the swap search: high enough for the hottest GPU to decide, with an eye on the next. */
enum { POWER_LOG2 = 5 };
#define LEAST_GAIN 1e-9

/* One or two slots that get other experts. */
typedef struct change {
    int slot, expert;
    int other_slot, other_expert; /* other_slot -1: none */
    int moves;                    /* replicas to fetch more than before */
    double value;                 /* gain per fetched replica */
} change;

ep_status epi_change_open(epi_change *c, const epi_plan *plan)
{
    static const char call[] = "ep_plan_eplb";
    size_t gpus = (size_t)plan->gpus;
    memset(c, 0, sizeof *c);
    c->plan = plan;
    EPI_TRY(
        epi_cell_open(&c->cell, plan->experts, plan->gpus, plan->gpu_slots, plan->windows, call));
    c->delta = calloc((size_t)plan->windows * gpus, sizeof *c->delta);
    c->touched = malloc(gpus * sizeof *c->touched);
    c->is_touched = calloc(gpus, 1);
    c->first = malloc(((size_t)plan->experts + 1) * sizeof *c->first);
    c->slots = malloc((size_t)plan->replicas * sizeof *c->slots);
    if (c->delta && c->touched && c->is_touched && c->first && c->slots)
        return EP_OK;
    epi_change_close(c);
    return epi_fail(EP_ERR_MEMORY, "%s: no memory for %d replicas", call, plan->replicas);
}

void epi_change_close(epi_change *c)
{
    epi_cell_close(&c->cell);
    free(c->delta);
    free(c->touched);
    free(c->is_touched);
    free(c->first);
    free(c->slots);
    memset(c, 0, sizeof *c);
}

/* Shares, loads and the slots of each expert, from what is held. */
static void refresh(epi_change *c)
{
    epi_cell *cell = &c->cell;
    epi_cell_measure(cell);
    c->first[0] = 0;
    for (int e = 0; e < cell->experts; e++)
        c->first[e + 1] = c->first[e] + cell->count[e];
    /* Filled from the back, each expert's end comes down to its beginning. */
    for (int slot = c->plan->replicas - 1; slot >= 0; slot--)
        c->slots[--c->first[cell->held[slot] + 1]] = slot;
    memmove(c->first, c->first + 1, (size_t)cell->experts * sizeof *c->first);
    c->first[cell->experts] = c->plan->replicas;
    for (int w = 0; w < cell->windows; w++)
        cell->unit[w] = epi_cell_peak(cell, w);
}

void epi_change_start(epi_change *c, const float *load, int layer, const int32_t *current)
{
    epi_cell *cell = &c->cell;
    for (int w = 0; w < cell->windows; w++)
        epi_plan_weigh(c->plan, epi_plan_load(c->plan, load, w, layer),
                       cell->weight + w * cell->experts);
    c->current = current;
    c->moves = 0;
    for (int slot = 0; slot < c->plan->replicas; slot++)
        cell->held[slot] = current[slot];
    refresh(c);
}

double epi_change_balance(const epi_change *c)
{
    double sum = 0;
    for (int w = 0; w < c->cell.windows; w++)
        sum += epi_plan_balance(c->cell.load + w * c->cell.gpus, c->cell.gpus);
    return sum / c->cell.windows;
}

int epi_change_moves(const epi_change *c)
{
    return c->moves;
}

void epi_change_write(const epi_change *c, int32_t *phy2log)
{
    for (int slot = 0; slot < c->plan->replicas; slot++)
        phy2log[slot] = c->cell.held[slot];
}

/* --- trying a change --- */

static double power_of(double x)
{
    for (int k = 0; k < POWER_LOG2; k++)
        x *= x;
    return x;
}

static void touch(epi_change *c, int g)
{
    if (c->is_touched[g])
        return;
    c->is_touched[g] = 1;
    c->touched[c->touched_count++] = g;
}

/* Every replica of `expert` gets heavier by its weight times `factor`. */
static void reweigh(epi_change *c, int expert, double factor)
{
    const epi_cell *cell = &c->cell;
    for (int k = c->first[expert]; k < c->first[expert + 1]; k++) {
        int g = c->slots[k] / cell->slots;
        touch(c, g);
        for (int w = 0; w < cell->windows; w++)
            c->delta[w * cell->gpus + g] += cell->weight[w * cell->experts + expert] * factor;
    }
}

static void add(epi_change *c, int g, int expert, double factor)
{
    const epi_cell *cell = &c->cell;
    touch(c, g);
    for (int w = 0; w < cell->windows; w++)
        c->delta[w * cell->gpus + g] += cell->weight[w * cell->experts + expert] * factor;
}

/* What the trial lowers the cost by; ends the trial. Loads are in units of the window's peak. */
static double settle(epi_change *c)
{
    const epi_cell *cell = &c->cell;
    double gain = 0;
    for (int w = 0; w < cell->windows; w++)
        for (int k = 0; k < c->touched_count && cell->unit[w] > 0; k++) {
            int at = w * cell->gpus + c->touched[k];
            double before = cell->load[at] / cell->unit[w];
            double after = (cell->load[at] + c->delta[at]) / cell->unit[w];
            gain += cell->unit[w] * (power_of(before) - power_of(after));
        }
    for (int k = 0; k < c->touched_count; k++) {
        int g = c->touched[k];
        c->is_touched[g] = 0;
        for (int w = 0; w < cell->windows; w++)
            c->delta[w * cell->gpus + g] = 0;
    }
    c->touched_count = 0;
    return gain;
}

/* 1 when the slot's GPU must fetch the expert, relative to the current placement. */
static int fetches(const epi_change *c, int slot, int expert)
{
    return !epi_plan_holds(c->plan, c->current, slot / c->cell.slots, expert, c->cell.slots);
}

/* More replicas to fetch when the slot gets the expert. */
static int more_moves(const epi_change *c, int slot, int expert)
{
    return fetches(c, slot, expert) - fetches(c, slot, c->cell.held[slot]);
}

/* Keeps the trial if it is the best so far and within the moves left. */
static void keep_best(epi_change *c, change trial, int left, change *best)
{
    double gain = settle(c);
    if (gain <= LEAST_GAIN || trial.moves > left)
        return;
    /* A change that fetches nothing is worth more than any other of the same gain. */
    trial.value = gain / (trial.moves > 0 ? trial.moves : 0.5);
    if (trial.value > best->value)
        *best = trial;
}

static void try_swap(epi_change *c, int here, int there, int left, change *best)
{
    const epi_cell *cell = &c->cell;
    int a = cell->held[here], b = cell->held[there];
    int g = here / cell->slots, h = there / cell->slots;
    if (epi_cell_holds(cell, g, b) || epi_cell_holds(cell, h, a))
        return;
    add(c, g, a, -1.0 / cell->count[a]);
    add(c, h, a, 1.0 / cell->count[a]);
    add(c, g, b, 1.0 / cell->count[b]);
    add(c, h, b, -1.0 / cell->count[b]);
    change trial = {here, b, there, a, more_moves(c, here, b) + more_moves(c, there, a), 0};
    keep_best(c, trial, left, best);
}

static void try_replace(epi_change *c, int slot, int expert, int left, change *best)
{
    const epi_cell *cell = &c->cell;
    int old = cell->held[slot], g = slot / cell->slots;
    int old_count = cell->count[old], count = cell->count[expert];
    if (old_count < 2 || epi_cell_holds(cell, g, expert))
        return;
    reweigh(c, old, 1.0 / (old_count - 1) - 1.0 / old_count);
    add(c, g, old, -1.0 / (old_count - 1));
    reweigh(c, expert, 1.0 / (count + 1) - 1.0 / count);
    add(c, g, expert, 1.0 / (count + 1));
    change trial = {slot, expert, -1, -1, more_moves(c, slot, expert), 0};
    keep_best(c, trial, left, best);
}

/* Everything that may relieve GPU g: its replicas swapped or replaced, its experts put elsewhere.
 */
static void relieve(epi_change *c, int g, int left, change *best)
{
    const epi_cell *cell = &c->cell;
    int node_slots = c->plan->replicas / c->plan->nodes;
    int begin = g * cell->slots / node_slots * node_slots, end = begin + node_slots;
    for (int here = g * cell->slots; here < (g + 1) * cell->slots; here++)
        for (int there = begin; there < end; there++) {
            if (there / cell->slots == g)
                continue;
            int expert = cell->held[there];
            try_swap(c, here, there, left, best);
            if (c->slots[c->first[expert]] == there) /* once for each expert of the node */
                try_replace(c, here, expert, left, best);
            try_replace(c, there, cell->held[here], left, best);
        }
}

static int hottest(const epi_cell *cell, int w)
{
    const double *load = cell->load + w * cell->gpus;
    int best = 0;
    for (int g = 1; g < cell->gpus; g++)
        best = load[g] > load[best] ? g : best;
    return best;
}

int epi_change_step(epi_change *c, int max_moves)
{
    epi_cell *cell = &c->cell;
    change best = {-1, -1, -1, -1, 0, 0};
    for (int w = 0; w < cell->windows; w++)
        relieve(c, hottest(cell, w), max_moves - c->moves, &best);
    if (best.slot < 0)
        return 0;
    cell->held[best.slot] = best.expert;
    if (best.other_slot >= 0)
        cell->held[best.other_slot] = best.other_expert;
    c->moves += best.moves;
    refresh(c);
    return 1;
}
