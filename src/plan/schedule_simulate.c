/* SPDX-License-Identifier: MIT */
/* Times a schedule. */
#include "base/error.h"
#include "plan/schedule.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

typedef struct clockwork {
    const ep_schedule *s;
    double (*cost)[EP_OP_SEND + 1]; /* [ranks or 1] by kind; that of EP_OP_SEND is comm */
    int32_t cost_count;
    double *now;     /* [ranks] end of the last operation */
    double *busy;    /* [ranks] */
    double *arrival; /* [lanes][chunks] by number in the lane */
} clockwork;

static ep_status duration(int32_t index, const char *field, double value)
{
    if (isfinite(value) && value >= 0)
        return EP_OK;
    return epi_fail(EP_ERR_ARGUMENT,
                    "ep_schedule_simulate: %s of costs[%d] is %g; allowed finite, from 0", field,
                    (int)index, value);
}

static ep_status take_costs(const ep_schedule_costs *costs, int32_t index, double *by_kind)
{
    ep_schedule_costs c = EP_SCHEDULE_COSTS_INIT;
    EPI_TRY(epi_take_config("ep_schedule_simulate", costs, &c, sizeof c));
    EPI_TRY(duration(index, "forward", c.forward));
    EPI_TRY(duration(index, "backward", c.backward));
    EPI_TRY(duration(index, "weight_grad", c.weight_grad));
    EPI_TRY(duration(index, "comm", c.comm));
    /* Both have a default that other fields give, taken for any negative value. */
    double input_grad = c.input_grad < 0 ? c.backward - c.weight_grad : c.input_grad;
    double pair = c.pair < 0 ? c.forward + c.backward : c.pair;
    EPI_TRY(duration(index, "input_grad", input_grad));
    EPI_TRY(duration(index, "pair", pair));
    by_kind[EP_OP_FORWARD] = c.forward;
    by_kind[EP_OP_BACKWARD] = c.backward;
    by_kind[EP_OP_INPUT_GRAD] = input_grad;
    by_kind[EP_OP_WEIGHT_GRAD] = c.weight_grad;
    by_kind[EP_OP_PAIR] = pair;
    by_kind[EP_OP_SEND] = c.comm;
    return EP_OK;
}

static ep_status take_all_costs(clockwork *w, const ep_schedule_costs *costs)
{
    const char *at = (const char *)costs;
    for (int32_t i = 0; i < w->cost_count; i++) {
        EPI_TRY(take_costs((const void *)at, i, w->cost[i]));
        at += costs->size; /* the caller's stride, which may be shorter than ours */
    }
    return EP_OK;
}

static void step(clockwork *w, int32_t rank, size_t index, int32_t lane, int32_t number,
                 double *start, double *end)
{
    const ep_schedule_op *op = &w->s->ops[index];
    const double *cost = w->cost[w->cost_count == 1 ? 0 : rank];
    double begin = w->now[rank];
    if (op->kind == EP_OP_SEND || op->kind == EP_OP_RECV) {
        double *arrival = &w->arrival[(size_t)lane * (size_t)w->s->shape.chunks + (size_t)number];
        if (op->kind == EP_OP_SEND)
            *arrival = begin + cost[EP_OP_SEND];
        else if (*arrival > begin)
            w->now[rank] = *arrival;
    } else {
        w->now[rank] += cost[op->kind];
        w->busy[rank] += cost[op->kind];
    }
    if (start)
        start[index] = begin;
    if (end)
        end[index] = w->now[rank];
}

static ep_status run(clockwork *w, double *start, double *end)
{
    epi_walk walk;
    int32_t rank, lane = 0, number = 0;
    size_t index;
    EPI_TRY(epi_walk_begin(&walk, w->s, 0));
    while (epi_walk_next(&walk, &rank, &index, &lane, &number))
        step(w, rank, index, lane, number, start, end);
    epi_walk_end(&walk);
    return EP_OK;
}

static ep_status allocate(clockwork *w)
{
    size_t ranks = (size_t)w->s->shape.ranks;
    size_t messages = 2 * (size_t)epi_schedule_places(w->s) * (size_t)w->s->shape.chunks;
    w->cost = malloc((size_t)w->cost_count * sizeof *w->cost);
    w->now = calloc(ranks, sizeof *w->now);
    w->busy = calloc(ranks, sizeof *w->busy);
    w->arrival = malloc(messages * sizeof *w->arrival);
    if (w->cost && w->now && w->busy && w->arrival)
        return EP_OK;
    return epi_fail(EP_ERR_MEMORY, "ep_schedule_simulate: no memory for %zu messages", messages);
}

static void results(const clockwork *w, double *makespan, double *bubble)
{
    double last = 0;
    for (int32_t rank = 0; rank < w->s->shape.ranks; rank++)
        last = w->now[rank] > last ? w->now[rank] : last;
    *makespan = last;
    for (int32_t rank = 0; bubble && rank < w->s->shape.ranks; rank++)
        bubble[rank] = last - w->busy[rank];
}

ep_status ep_schedule_simulate(const ep_schedule *s, const ep_schedule_costs *costs,
                               int32_t cost_count, double *makespan, double *bubble, double *start,
                               double *end)
{
    if (!s || !costs || !makespan)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_simulate: %s is NULL",
                        !s       ? "schedule"
                        : !costs ? "costs"
                                 : "makespan");
    if (cost_count != 1 && cost_count != s->shape.ranks)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_schedule_simulate: cost_count is %d; allowed 1 or ranks (%d)",
                        (int)cost_count, (int)s->shape.ranks);
    if (!s->proven)
        EPI_TRY(ep_schedule_check(s, NULL, NULL));
    clockwork w = {.s = s, .cost_count = cost_count};
    ep_status status = allocate(&w);
    if (status == EP_OK)
        status = take_all_costs(&w, costs);
    if (status == EP_OK)
        status = run(&w, start, end);
    if (status == EP_OK)
        results(&w, makespan, bubble);
    free(w.cost);
    free(w.now);
    free(w.busy);
    free(w.arrival);
    return status;
}
