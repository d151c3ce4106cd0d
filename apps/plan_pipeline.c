/* SPDX-License-Identifier: MIT */
/* `entrepot plan pipeline`: prints, times, draws and chooses pipeline schedules. */
#include "plan_pipeline.h"
#include "commands.h"
#include "exit.h"
#include "json.h"
#include "options.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { F, B, W, FB, COMM, COSTS };

static const struct {
    const char *name;
    size_t field;
} costs_given[COSTS] = {{"f", offsetof(ep_schedule_costs, forward)},
                        {"b", offsetof(ep_schedule_costs, backward)},
                        {"w", offsetof(ep_schedule_costs, weight_grad)},
                        {"fb", offsetof(ep_schedule_costs, pair)},
                        {"comm", offsetof(ep_schedule_costs, comm)}};

typedef struct request {
    const options_spec *spec;
    const char *schedule, *svg, *cost[COSTS];
    int64_t ranks, chunks, model_chunks;
    double memory, activations, parameters;
    bool bounded, simulate, choose, json;
} request;

static int failed(ep_status status)
{
    fprintf(stderr, "entrepot plan pipeline: %s\n",
            status == EP_ERR_MEMORY ? "out of memory" : ep_last_error());
    return status == EP_ERR_ARGUMENT   ? EXIT_USAGE
           : status == EP_ERR_CAPACITY ? EXIT_CHECK_FAILED
                                       : EXIT_RUNTIME;
}

static int examine(const request *q)
{
    if (q->choose == (q->schedule != NULL))
        return options_misuse(q->spec, "one of --schedule and --choose is needed, not both");
    if (!q->ranks || !q->chunks)
        return options_misuse(q->spec, "--%s is missing", q->ranks ? "chunks" : "ranks");
    if (q->choose && q->simulate)
        return options_misuse(q->spec, "--simulate goes with --schedule; --choose always does");
    if (!q->choose && (q->bounded || q->activations >= 0 || q->parameters >= 0))
        return options_misuse(q->spec, "--memory, --activations and --parameters go with --choose");
    for (int i = 0; i < COSTS; i++)
        if (q->cost[i] && !q->choose && !q->simulate && !q->svg)
            return options_misuse(q->spec, "--%s goes with --simulate, --svg or --choose",
                                  costs_given[i].name);
    return EXIT_OK;
}

static void set_cost(ep_schedule_costs *costs, int which, double value)
{
    memcpy((char *)costs + costs_given[which].field, &value, sizeof value);
}

/* One number for all of `count` ranks, or one for each with commas between. */
static int parse_cost(const request *q, int which, int32_t count, ep_schedule_costs *costs)
{
    const char *name = costs_given[which].name, *text = q->cost[which];
    const char *expected =
        q->choose ? "a number from 0 to 1e12" : "a number from 0 to 1e12, or one for each rank";
    double value = 0;
    int32_t given = 0;
    for (const char *at = text; at; at = strchr(at, ',') ? strchr(at, ',') + 1 : NULL) {
        char one[40];
        int length = (int)strcspn(at, ",");
        snprintf(one, sizeof one, "%.*s", length, at);
        if (length >= (int)sizeof one || !parse_real(one, 0, 1e12, &value) || given == count)
            return options_bad_value(q->spec, name, text, expected);
        set_cost(&costs[given++], which, value);
    }
    if (given != 1 && given != count)
        return options_bad_value(q->spec, name, text, expected);
    for (int32_t i = 1; given == 1 && i < count; i++)
        set_cost(&costs[i], which, value);
    return EXIT_OK;
}

static int parse_costs(const request *q, int32_t count, ep_schedule_costs *costs)
{
    for (int32_t i = 0; i < count; i++)
        costs[i] = (ep_schedule_costs)EP_SCHEDULE_COSTS_INIT;
    for (int i = 0; i < COSTS; i++)
        if (q->cost[i] && parse_cost(q, i, count, costs) != EXIT_OK)
            return EXIT_USAGE;
    for (int32_t i = 0; i < count; i++)
        if (costs[i].weight_grad > costs[i].backward)
            return options_misuse(q->spec, "--w is %g, --b is %g; W is a part of B, so at most B",
                                  costs[i].weight_grad, costs[i].backward);
    return EXIT_OK;
}

/* A schedule with everything that is known of it. */
typedef struct result {
    ep_schedule *schedule;
    ep_schedule_shape shape;
    double makespan;
    double *bubble, *start, *end;
    int32_t *peak;
} result;

static void release(result *r)
{
    ep_schedule_destroy(r->schedule);
    free(r->bubble);
    free(r->start);
    free(r->end);
    free(r->peak);
}

static ep_status allocate(result *r)
{
    const ep_schedule_op *ops;
    size_t ranks = (size_t)r->shape.ranks, count, first;
    ep_status status = ep_schedule_ops(r->schedule, r->shape.ranks - 1, &ops, &count, &first);
    if (status != EP_OK)
        return status;
    r->bubble = malloc(ranks * sizeof *r->bubble);
    r->peak = malloc(ranks * sizeof *r->peak);
    r->start = malloc((first + count) * sizeof *r->start);
    r->end = malloc((first + count) * sizeof *r->end);
    return r->bubble && r->peak && r->start && r->end ? EP_OK : EP_ERR_MEMORY;
}

static ep_status work_out(const ep_schedule_config *config, const ep_schedule_costs *costs,
                          int32_t cost_count, result *r)
{
    ep_status status = ep_schedule_create(config, &r->schedule);
    if (status == EP_OK)
        status = ep_schedule_get_shape(r->schedule, &r->shape);
    if (status == EP_OK)
        status = allocate(r);
    if (status == EP_OK)
        status = ep_schedule_check(r->schedule, r->peak, NULL);
    if (status == EP_OK)
        status = ep_schedule_simulate(r->schedule, costs, cost_count, &r->makespan, r->bubble,
                                      r->start, r->end);
    return status;
}

static void json_head(json *j, const result *r)
{
    json_start(j, stdout);
    json_open_object(j, NULL);
    json_text(j, "schedule", ep_schedule_method_name(r->shape.method));
    json_integer(j, "ranks", r->shape.ranks);
    json_integer(j, "chunks", (int64_t)r->shape.chunks * r->shape.streams);
    json_integer(j, "stages", r->shape.stages);
}

static int json_tail(json *j)
{
    json_close_array(j);
    json_close_object(j);
    return json_finish(j) ? EXIT_OK : EXIT_RUNTIME;
}

static int print_figures(const result *r)
{
    json j;
    json_head(&j, r);
    json_real(&j, "makespan", r->makespan);
    json_open_array(&j, "bubble");
    for (int32_t i = 0; i < r->shape.ranks; i++)
        json_real(&j, NULL, r->bubble[i]);
    json_close_array(&j);
    json_open_array(&j, "peak_activations");
    for (int32_t i = 0; i < r->shape.ranks; i++)
        json_integer(&j, NULL, r->peak[i]);
    return json_tail(&j);
}

/* A rank's order, to be freed; NULL when memory is out. */
static char *order_of(const ep_schedule *schedule, int32_t rank)
{
    size_t needed = 0;
    char *text = NULL;
    if (ep_schedule_format(schedule, rank, NULL, 0, &needed) == EP_OK)
        text = malloc(needed);
    if (text && ep_schedule_format(schedule, rank, text, needed, NULL) != EP_OK) {
        free(text);
        text = NULL;
    }
    return text;
}

static int print_orders(const result *r, bool as_json)
{
    json j;
    if (as_json) {
        json_head(&j, r);
        json_open_array(&j, "orders");
    }
    for (int32_t i = 0; i < r->shape.ranks; i++) {
        char *text = order_of(r->schedule, i);
        if (!text)
            return failed(EP_ERR_MEMORY);
        if (as_json)
            json_text(&j, NULL, text);
        else
            printf("%d: %s\n", (int)i, text);
        free(text);
    }
    if (as_json)
        return json_tail(&j);
    return fflush(stdout) == 0 ? EXIT_OK : EXIT_RUNTIME;
}

static int draw(const char *path, const result *r)
{
    const pipeline_figures figures = {r->makespan, r->bubble, r->peak, r->start, r->end};
    FILE *file = fopen(path, "w");
    if (file)
        pipeline_svg(file, r->schedule, &figures);
    bool written = file && !ferror(file);
    if (file && fclose(file) != 0)
        written = false;
    if (!written)
        fprintf(stderr, "entrepot plan pipeline: %s: %s\n", path, strerror(errno));
    return written ? EXIT_OK : EXIT_RUNTIME;
}

static int show(const request *q, int32_t method, const ep_schedule_costs *costs,
                int32_t cost_count)
{
    ep_schedule_config config = EP_SCHEDULE_CONFIG_INIT;
    result r = {0};
    config.method = method;
    config.ranks = (int32_t)q->ranks;
    config.chunks = (int32_t)q->chunks;
    if (method == EP_SCHEDULE_INTERLEAVED || !q->choose)
        config.model_chunks = (int32_t)q->model_chunks;
    ep_status status = work_out(&config, costs, cost_count, &r);
    int code = status == EP_OK ? EXIT_OK : failed(status);
    if (code == EXIT_OK && q->simulate)
        code = print_figures(&r);
    else if (code == EXIT_OK && !q->choose)
        code = print_orders(&r, q->json);
    if (code == EXIT_OK && q->svg)
        code = draw(q->svg, &r);
    release(&r);
    return code;
}

static int print_choice_json(const request *q, const ep_schedule_candidate *c, const char *choice)
{
    json j;
    json_start(&j, stdout);
    json_open_object(&j, NULL);
    json_integer(&j, "ranks", q->ranks);
    json_integer(&j, "chunks", q->chunks);
    json_text(&j, "choice", choice);
    json_open_array(&j, "candidates");
    for (int i = 0; i < EP_SCHEDULE_METHODS; i++) {
        json_open_object(&j, NULL);
        json_text(&j, "schedule", ep_schedule_method_name(c[i].method));
        json_bool(&j, "allowed", c[i].allowed);
        if (c[i].allowed) {
            json_bool(&j, "fits", c[i].fits);
            json_real(&j, "makespan", c[i].makespan);
            json_real(&j, "bubble", c[i].bubble);
            json_real(&j, "memory", c[i].memory);
        }
        json_close_object(&j);
    }
    return json_tail(&j);
}

static void print_choice(const ep_schedule_candidate *c, const char *choice)
{
    printf("%-12s %12s %12s %12s\n", "schedule", "makespan", "bubble", "memory");
    for (int i = 0; i < EP_SCHEDULE_METHODS; i++) {
        const char *name = ep_schedule_method_name(c[i].method), *note = "";
        if (!c[i].allowed) {
            printf("%-12s not for this number of ranks and micro-batches\n", name);
            continue;
        }
        if (choice && strcmp(choice, name) == 0)
            note = "  chosen";
        else if (!c[i].fits)
            note = "  over the bound";
        printf("%-12s %12.6g %12.6g %12.6g%s\n", name, c[i].makespan, c[i].bubble, c[i].memory,
               note);
    }
}

static int choose(const request *q, const ep_schedule_costs *costs)
{
    ep_schedule_choose_config config = EP_SCHEDULE_CHOOSE_CONFIG_INIT;
    ep_schedule_candidate candidates[EP_SCHEDULE_METHODS];
    int32_t method = 0;
    config.ranks = (int32_t)q->ranks;
    config.chunks = (int32_t)q->chunks;
    config.model_chunks = (int32_t)q->model_chunks;
    config.costs = costs;
    if (q->bounded)
        config.memory = q->memory;
    if (q->activations >= 0)
        config.activation_memory = q->activations;
    if (q->parameters >= 0)
        config.parameter_memory = q->parameters;
    ep_status status = ep_schedule_choose(&config, candidates, &method);
    if (status != EP_OK && status != EP_ERR_CAPACITY)
        return failed(status);
    const char *choice = status == EP_OK ? ep_schedule_method_name(method) : NULL;
    if (!q->json)
        print_choice(candidates, choice);
    else if (print_choice_json(q, candidates, choice) != EXIT_OK)
        return EXIT_RUNTIME;
    if (status != EP_OK)
        return failed(status);
    if (!q->svg)
        return EXIT_OK;
    /* From 1/R of the model to one of the method's stages. */
    ep_schedule_costs of_stage = *costs;
    double share = method == EP_SCHEDULE_ZBV || method == EP_SCHEDULE_DUALPIPEV ? 0.5 : 1;
    if (method == EP_SCHEDULE_INTERLEAVED)
        share = 1.0 / (q->model_chunks ? (double)q->model_chunks : 2);
    of_stage.forward *= share;
    of_stage.backward *= share;
    of_stage.weight_grad *= share;
    of_stage.pair *= share;
    return show(q, method, &of_stage, 1);
}

static int run(const request *q)
{
    int32_t count = q->choose ? 1 : (int32_t)q->ranks, method = 0;
    if (q->schedule && ep_schedule_method_parse(q->schedule, &method) != EP_OK)
        return failed(EP_ERR_ARGUMENT);
    ep_schedule_costs *costs = malloc((size_t)count * sizeof *costs);
    if (!costs)
        return failed(EP_ERR_MEMORY);
    int code = parse_costs(q, count, costs);
    if (code == EXIT_OK)
        code = q->choose ? choose(q, costs) : show(q, method, costs, count);
    free(costs);
    return code;
}

int cmd_plan_pipeline(int argc, char **argv)
{
    request q = {.activations = -1, .parameters = -1};
    option memory =
        OPTION_REAL("memory", "M", &q.memory, 0, 1e30, "with --choose: bound on a rank's memory");
    memory.given = &q.bounded;
    const option table[] = {
        OPTION_TEXT("schedule", "NAME", &q.schedule,
                    "1f1b, interleaved, zb1p, zbv, dualpipe or dualpipev"),
        OPTION_INTEGER("ranks", "R", &q.ranks, 1, EP_SCHEDULE_MAX_RANKS, "ranks"),
        OPTION_INTEGER("chunks", "C", &q.chunks, 1, EP_SCHEDULE_MAX_CHUNKS, "micro-batches"),
        OPTION_INTEGER("model-chunks", "V", &q.model_chunks, 1, EP_SCHEDULE_MAX_PHASES,
                       "interleaved: stages a rank holds (default 2)"),
        OPTION_SWITCH("simulate", &q.simulate,
                      "print JSON: makespan, bubble[], peak_activations[]"),
        OPTION_TEXT("f", "X", &q.cost[F], "time of F (default 1); R numbers with commas: per rank"),
        OPTION_TEXT("b", "X", &q.cost[B], "time of B, both gradients (default 2); I is B - W"),
        OPTION_TEXT("w", "X", &q.cost[W], "time of W, the weight gradient (default 1)"),
        OPTION_TEXT("fb", "X", &q.cost[FB], "time of an overlapped pair (default F + B)"),
        OPTION_TEXT("comm", "X", &q.cost[COMM], "time of a message (default 0)"),
        OPTION_TEXT("svg", "FILE", &q.svg, "draw the schedule, or the chosen one"),
        OPTION_SWITCH("choose", &q.choose,
                      "simulate every method and pick the fastest that fits; times are then of "
                      "1/R of the model"),
        memory,
        OPTION_REAL("activations", "A", &q.activations, 0, 1e30,
                    "with --choose: memory of a micro-batch on 1/R of the model (default 1)"),
        OPTION_REAL("parameters", "P", &q.parameters, 0, 1e30,
                    "with --choose: memory of 1/R of the parameters (default 0)"),
        OPTION_SWITCH("json", &q.json, "one JSON object on standard output"),
    };
    const options_spec spec = {"entrepot plan pipeline",
                               "--schedule NAME|--choose --ranks R --chunks C [options]",
                               "Prints each rank's order of computations: F forward, B backward, I "
                               "and W its input\nand weight halves, (F+B) an overlapped pair; "
                               "phase.chunk after each letter.",
                               table,
                               sizeof table / sizeof *table,
                               false};
    int code;
    q.spec = &spec;
    if (options_parse(&spec, argc, argv, &code) < 0)
        return code;
    code = examine(&q);
    return code == EXIT_OK ? run(&q) : code;
}
