/* SPDX-License-Identifier: MIT */
/* Chooses a method by simulation under a memory bound. */
#include "base/error.h"
#include "plan/schedule.h"

#include <stdlib.h>
#include <string.h>

static double scaled(double cost, double factor)
{
    return cost < 0 ? cost : cost * factor; /* negative stands for a default */
}

/* Costs of one stage of `shape`, from those of 1/R of the model. */
static ep_schedule_costs stage_costs(const ep_schedule_costs *of_share, double factor)
{
    ep_schedule_costs c = *of_share;
    c.forward = scaled(c.forward, factor);
    c.backward = scaled(c.backward, factor);
    c.input_grad = scaled(c.input_grad, factor);
    c.weight_grad = scaled(c.weight_grad, factor);
    c.pair = scaled(c.pair, factor);
    return c;
}

static double largest(const double *values, int32_t count)
{
    double most = 0;
    for (int32_t i = 0; i < count; i++)
        most = values[i] > most ? values[i] : most;
    return most;
}

static ep_status measure(const ep_schedule *s, const ep_schedule_choose_config *c,
                         const ep_schedule_costs *costs, double *bubble, int32_t *peak,
                         ep_schedule_candidate *out)
{
    double share = (double)s->shape.ranks / s->shape.stages;
    ep_schedule_costs of_stage = stage_costs(costs, share);
    EPI_TRY(ep_schedule_check(s, peak, NULL));
    EPI_TRY(ep_schedule_simulate(s, &of_stage, 1, &out->makespan, bubble, NULL, NULL));
    int32_t most = 0;
    for (int32_t rank = 0; rank < s->shape.ranks; rank++)
        most = peak[rank] > most ? peak[rank] : most;
    out->allowed = 1;
    out->bubble = largest(bubble, s->shape.ranks);
    out->memory = share * (most * c->activation_memory + s->shape.phases * c->parameter_memory);
    out->fits = c->memory < 0 || out->memory <= c->memory;
    return EP_OK;
}

static ep_status evaluate(const ep_schedule_choose_config *c, const ep_schedule_costs *costs,
                          int32_t method, double *bubble, int32_t *peak, ep_schedule_candidate *out)
{
    ep_schedule_config config = EP_SCHEDULE_CONFIG_INIT;
    ep_schedule *s;
    *out = (ep_schedule_candidate){.method = method};
    config.method = method;
    config.ranks = c->ranks;
    config.chunks = c->chunks;
    if (method == EP_SCHEDULE_INTERLEAVED)
        config.model_chunks = c->model_chunks;
    ep_status status = ep_schedule_create(&config, &s);
    if (status == EP_ERR_ARGUMENT)
        return EP_OK; /* the configuration was examined: this is the method's own rule */
    EPI_TRY(status);
    status = measure(s, c, costs, bubble, peak, out);
    ep_schedule_destroy(s);
    return status;
}

static bool better(const ep_schedule_candidate *a, const ep_schedule_candidate *b)
{
    if (a->makespan != b->makespan)
        return a->makespan < b->makespan;
    return a->memory < b->memory;
}

static ep_status examine(const ep_schedule_choose_config *c)
{
    if (c->ranks < 1 || c->ranks > EP_SCHEDULE_MAX_RANKS)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_choose: ranks is %d; allowed 1 to %d",
                        (int)c->ranks, EP_SCHEDULE_MAX_RANKS);
    if (c->chunks < 1 || c->chunks > EP_SCHEDULE_MAX_CHUNKS)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_choose: chunks is %d; allowed 1 to %d",
                        (int)c->chunks, EP_SCHEDULE_MAX_CHUNKS);
    if (c->model_chunks < 0 || c->model_chunks > EP_SCHEDULE_MAX_PHASES)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_choose: model_chunks is %d; allowed 0 to %d",
                        (int)c->model_chunks, EP_SCHEDULE_MAX_PHASES);
    if (!(c->activation_memory >= 0) || !(c->parameter_memory >= 0))
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_schedule_choose: activation_memory is %g, parameter_memory is %g; "
                        "allowed from 0",
                        c->activation_memory, c->parameter_memory);
    return EP_OK;
}

static ep_status pick(const ep_schedule_choose_config *c, const ep_schedule_candidate *candidates,
                      int32_t *method)
{
    const ep_schedule_candidate *best = NULL, *least = NULL;
    for (int32_t i = 0; i < EP_SCHEDULE_METHODS; i++) {
        const ep_schedule_candidate *one = &candidates[i];
        if (one->fits && (!best || better(one, best)))
            best = one;
        if (one->allowed && (!least || one->memory < least->memory))
            least = one;
    }
    if (!best)
        return epi_fail(EP_ERR_CAPACITY,
                        "ep_schedule_choose: memory is %g; the smallest method, %s, takes %g",
                        c->memory, ep_schedule_method_name(least->method), least->memory);
    *method = best->method;
    return EP_OK;
}

ep_status ep_schedule_choose(const ep_schedule_choose_config *config,
                             ep_schedule_candidate *candidates, int32_t *method)
{
    ep_schedule_choose_config c = EP_SCHEDULE_CHOOSE_CONFIG_INIT;
    ep_schedule_costs costs = EP_SCHEDULE_COSTS_INIT;
    ep_schedule_candidate all[EP_SCHEDULE_METHODS];
    if (!method)
        return epi_fail(EP_ERR_ARGUMENT, "ep_schedule_choose: method is NULL");
    EPI_TRY(epi_take_config("ep_schedule_choose", config, &c, sizeof c));
    if (c.costs)
        EPI_TRY(epi_take_config("ep_schedule_choose: costs", c.costs, &costs, sizeof costs));
    costs.size = sizeof costs;
    EPI_TRY(examine(&c));
    double *bubble = malloc((size_t)c.ranks * sizeof *bubble);
    int32_t *peak = malloc((size_t)c.ranks * sizeof *peak);
    ep_status status = EP_OK;
    if (!bubble || !peak)
        status =
            epi_fail(EP_ERR_MEMORY, "ep_schedule_choose: no memory for %d ranks", (int)c.ranks);
    for (int32_t i = 0; status == EP_OK && i < EP_SCHEDULE_METHODS; i++)
        status = evaluate(&c, &costs, i, bubble, peak, &all[i]);
    free(bubble);
    free(peak);
    EPI_TRY(status);
    if (candidates)
        memcpy(candidates, all, sizeof all);
    return pick(&c, all, method);
}
