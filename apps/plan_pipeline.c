/* SPDX-License-Identifier: MIT */
/* `entrepot plan pipeline`: prints, times, draws and chooses pipeline schedules. */
#include "plan_pipeline.h"

#include <errno.h>
#include <getopt.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, CHECK_FAILED = 1, USAGE = 2, RUN_FAILED = 3 };

static const char help[] =
    "usage: entrepot plan pipeline --schedule NAME --ranks R --chunks C [options]\n"
    "       entrepot plan pipeline --choose --ranks R --chunks C [--memory M] [options]\n"
    "\n"
    "Prints each rank's order of computations: F forward, B backward, I and W its input\n"
    "and weight halves, (F+B) an overlapped pair; phase.chunk after each letter.\n"
    "\n"
    "  --schedule NAME     1f1b, interleaved, zb1p, zbv, dualpipe or dualpipev\n"
    "  --ranks R           ranks\n"
    "  --chunks C          micro-batches\n"
    "  --model-chunks V    interleaved: stages a rank (default 2)\n"
    "  --simulate          print JSON: makespan, bubble[], peak_activations[]\n"
    "  --f X --b X --w X   time of F, B and W of one stage (defaults 1, 2, 1); I is B - W\n"
    "  --fb X              time of an overlapped pair (default F + B)\n"
    "  --comm X            time of a message (default 0)\n"
    "                      Each X is one number, or R of them separated by commas\n"
    "  --svg FILE          draw the schedule\n"
    "  --choose            simulate every method and pick the fastest; F, B, W then are of\n"
    "                      1/R of the model, whatever number of stages a method makes\n"
    "  --memory M          --choose: bound on a rank's memory (default none)\n"
    "  --activations A     --choose: memory of a micro-batch on 1/R of the model (default 1)\n"
    "  --parameters P      --choose: memory of 1/R of the parameters (default 0)\n"
    "  --json              one JSON object on standard output\n";

enum {
    SCHEDULE = 256,
    RANKS,
    CHUNKS,
    MODEL_CHUNKS,
    SIMULATE,
    F,
    B,
    W,
    FB,
    COMM,
    SVG,
    CHOOSE,
    MEMORY,
    ACTIVATIONS,
    PARAMETERS,
    JSON,
    HELP
};

static const struct option options[] = {{"schedule", 1, NULL, SCHEDULE},
                                        {"ranks", 1, NULL, RANKS},
                                        {"chunks", 1, NULL, CHUNKS},
                                        {"model-chunks", 1, NULL, MODEL_CHUNKS},
                                        {"simulate", 0, NULL, SIMULATE},
                                        {"f", 1, NULL, F},
                                        {"b", 1, NULL, B},
                                        {"w", 1, NULL, W},
                                        {"fb", 1, NULL, FB},
                                        {"comm", 1, NULL, COMM},
                                        {"svg", 1, NULL, SVG},
                                        {"choose", 0, NULL, CHOOSE},
                                        {"memory", 1, NULL, MEMORY},
                                        {"activations", 1, NULL, ACTIVATIONS},
                                        {"parameters", 1, NULL, PARAMETERS},
                                        {"json", 0, NULL, JSON},
                                        {"help", 0, NULL, HELP},
                                        {NULL, 0, NULL, 0}};

typedef struct request {
    const char *schedule, *svg;
    char *cost[COMM - F + 1]; /* as given, by option */
    ep_schedule_config config;
    ep_schedule_choose_config choose;
    bool simulate, choosing, json;
    unsigned given; /* bit per option from SCHEDULE */
} request;

static int usage(const char *format, ...) __attribute__((format(printf, 1, 2)));

static int usage(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "entrepot plan pipeline: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, "\n");
    va_end(args);
    return USAGE;
}

static int failed(ep_status status)
{
    fprintf(stderr, "entrepot plan pipeline: %s\n", ep_last_error());
    return status == EP_ERR_ARGUMENT   ? USAGE
           : status == EP_ERR_CAPACITY ? CHECK_FAILED
                                       : RUN_FAILED;
}

static int parse_count(const char *option, const char *text, int32_t *value)
{
    char *end;
    errno = 0;
    long number = strtol(text, &end, 10);
    if (errno || *end || end == text || number < 1 || number > 1000000)
        return usage("--%s is \"%s\"; allowed a number from 1 to 1000000", option, text);
    *value = (int32_t)number;
    return OK;
}

static int parse_amount(const char *option, const char *text, double *value)
{
    char *end;
    double number = strtod(text, &end);
    if (*end || end == text || !isfinite(number) || number < 0)
        return usage("--%s is \"%s\"; allowed a number from 0", option, text);
    *value = number;
    return OK;
}

static int take_option(request *r, int id, char *value)
{
    r->given |= 1u << (id - SCHEDULE);
    switch (id) {
    case SCHEDULE:
        r->schedule = value;
        return OK;
    case RANKS:
        return parse_count("ranks", value, &r->config.ranks);
    case CHUNKS:
        return parse_count("chunks", value, &r->config.chunks);
    case MODEL_CHUNKS:
        return parse_count("model-chunks", value, &r->config.model_chunks);
    case SIMULATE:
        r->simulate = true;
        return OK;
    case SVG:
        r->svg = value;
        return OK;
    case CHOOSE:
        r->choosing = true;
        return OK;
    case MEMORY:
        return parse_amount("memory", value, &r->choose.memory);
    case ACTIVATIONS:
        return parse_amount("activations", value, &r->choose.activation_memory);
    case PARAMETERS:
        return parse_amount("parameters", value, &r->choose.parameter_memory);
    case JSON:
        r->json = true;
        return OK;
    default: /* F .. COMM, read when the number of ranks is known */
        r->cost[id - F] = value;
        return OK;
    }
}

static bool is_given(const request *r, int id)
{
    return r->given >> (id - SCHEDULE) & 1;
}

static int examine(const request *r)
{
    if (r->choosing == (r->schedule != NULL))
        return usage("give one of --schedule and --choose");
    if (!is_given(r, RANKS) || !is_given(r, CHUNKS))
        return usage("--%s is missing", is_given(r, RANKS) ? "chunks" : "ranks");
    if (r->config.ranks > EP_SCHEDULE_MAX_RANKS)
        return usage("--ranks is %d; allowed 1 to %d", (int)r->config.ranks, EP_SCHEDULE_MAX_RANKS);
    if (r->choosing && r->simulate)
        return usage("--choose simulates already; --simulate goes with --schedule only");
    for (int id = MEMORY; id <= PARAMETERS; id++)
        if (is_given(r, id) && !r->choosing)
            return usage("--%s goes with --choose only", options[id - SCHEDULE].name);
    for (int id = F; id <= COMM; id++)
        if (is_given(r, id) && !r->choosing && !r->simulate && !r->svg)
            return usage("--%s goes with --simulate, --svg or --choose",
                         options[id - SCHEDULE].name);
    return OK;
}

/* One number for all of `count` ranks, or one for each. */
static int parse_cost(const request *r, int id, int32_t count, ep_schedule_costs *costs,
                      size_t field)
{
    const char *option = options[id - SCHEDULE].name;
    char *text = r->cost[id - F], *rest = NULL;
    double value = 0;
    int32_t given = 0;
    for (char *one = strtok_r(text, ",", &rest); one; one = strtok_r(NULL, ",", &rest)) {
        if (parse_amount(option, one, &value) != OK)
            return USAGE;
        if (given < count)
            memcpy((char *)&costs[given] + field, &value, sizeof value);
        given++;
    }
    if (given != 1 && given != count)
        return usage("--%s has %d numbers; allowed 1%s", option, (int)given,
                     r->choosing ? "" : " or one per rank");
    for (int32_t i = 0; given == 1 && i < count; i++)
        memcpy((char *)&costs[i] + field, &value, sizeof value);
    return OK;
}

static int parse_costs(const request *r, int32_t count, ep_schedule_costs *costs)
{
    static const size_t fields[] = {
        offsetof(ep_schedule_costs, forward), offsetof(ep_schedule_costs, backward),
        offsetof(ep_schedule_costs, weight_grad), offsetof(ep_schedule_costs, pair),
        offsetof(ep_schedule_costs, comm)};
    for (int32_t i = 0; i < count; i++)
        costs[i] = (ep_schedule_costs)EP_SCHEDULE_COSTS_INIT;
    for (int id = F; id <= COMM; id++)
        if (is_given(r, id) && parse_cost(r, id, count, costs, fields[id - F]) != OK)
            return USAGE;
    return OK;
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

static ep_status work_out(const ep_schedule_config *config, const ep_schedule_costs *costs,
                          int32_t cost_count, result *r)
{
    const ep_schedule_op *ops;
    size_t count, first;
    ep_status status = ep_schedule_create(config, &r->schedule);
    if (status == EP_OK)
        status = ep_schedule_get_shape(r->schedule, &r->shape);
    if (status == EP_OK)
        status = ep_schedule_ops(r->schedule, config->ranks - 1, &ops, &count, &first);
    if (status != EP_OK)
        return status;
    r->bubble = malloc((size_t)config->ranks * sizeof *r->bubble);
    r->peak = malloc((size_t)config->ranks * sizeof *r->peak);
    r->start = malloc((first + count) * sizeof *r->start);
    r->end = malloc((first + count) * sizeof *r->end);
    if (!r->bubble || !r->peak || !r->start || !r->end)
        return EP_ERR_MEMORY;
    status = ep_schedule_check(r->schedule, r->peak, NULL);
    if (status != EP_OK)
        return status;
    return ep_schedule_simulate(r->schedule, costs, cost_count, &r->makespan, r->bubble, r->start,
                                r->end);
}

static void print_figures(const request *q, const result *r)
{
    printf("{\"schedule\": \"%s\", \"ranks\": %d, \"chunks\": %d, \"stages\": %d, "
           "\"makespan\": %.15g, \"bubble\": [",
           ep_schedule_method_name(r->shape.method), (int)r->shape.ranks, (int)q->config.chunks,
           (int)r->shape.stages, r->makespan);
    for (int32_t i = 0; i < r->shape.ranks; i++)
        printf("%s%.15g", i ? ", " : "", r->bubble[i]);
    printf("], \"peak_activations\": [");
    for (int32_t i = 0; i < r->shape.ranks; i++)
        printf("%s%d", i ? ", " : "", (int)r->peak[i]);
    printf("]}\n");
}

static ep_status print_order(const result *r, int32_t rank, const char *before, const char *after)
{
    size_t needed;
    ep_status status = ep_schedule_format(r->schedule, rank, NULL, 0, &needed);
    if (status != EP_OK)
        return status;
    char *text = malloc(needed);
    if (!text)
        return EP_ERR_MEMORY;
    status = ep_schedule_format(r->schedule, rank, text, needed, NULL);
    if (status == EP_OK)
        printf("%s%s%s", before, text, after);
    free(text);
    return status;
}

static ep_status print_orders(const request *q, const result *r)
{
    char before[32] = "";
    ep_status status = EP_OK;
    if (q->json)
        printf("{\"schedule\": \"%s\", \"ranks\": %d, \"chunks\": %d, \"stages\": %d, "
               "\"orders\": [",
               ep_schedule_method_name(r->shape.method), (int)r->shape.ranks, (int)q->config.chunks,
               (int)r->shape.stages);
    for (int32_t i = 0; status == EP_OK && i < r->shape.ranks; i++) {
        if (!q->json)
            snprintf(before, sizeof before, "%d: ", (int)i);
        status = print_order(r, i, q->json ? (i ? ", \"" : "\"") : before, q->json ? "\"" : "\n");
    }
    if (q->json)
        printf("]}\n");
    return status;
}

static int draw(const char *path, const result *r)
{
    const pipeline_figures figures = {r->makespan, r->bubble, r->peak, r->start, r->end};
    FILE *file = fopen(path, "w");
    if (file)
        pipeline_svg(file, r->schedule, &figures);
    bool bad = !file || ferror(file);
    if ((file && fclose(file) != 0) || bad) {
        fprintf(stderr, "entrepot plan pipeline: %s: %s\n", path, strerror(errno));
        return RUN_FAILED;
    }
    return OK;
}

static int show(const request *q, const ep_schedule_costs *costs, int32_t cost_count)
{
    result r = {0};
    ep_status status = work_out(&q->config, costs, cost_count, &r);
    if (status == EP_OK && q->simulate)
        print_figures(q, &r);
    else if (status == EP_OK && !q->choosing)
        status = print_orders(q, &r);
    int code = status == EP_OK ? OK : failed(status);
    if (code == OK && q->svg)
        code = draw(q->svg, &r);
    release(&r);
    return code;
}

static void print_choice_json(const request *q, const ep_schedule_candidate *c, const char *choice)
{
    printf("{\"ranks\": %d, \"chunks\": %d, \"choice\": ", (int)q->config.ranks,
           (int)q->config.chunks);
    printf(choice ? "\"%s\"" : "null", choice);
    printf(", \"candidates\": [");
    for (int i = 0; i < EP_SCHEDULE_METHODS; i++) {
        printf("%s{\"schedule\": \"%s\", \"allowed\": %s", i ? ", " : "",
               ep_schedule_method_name(c[i].method), c[i].allowed ? "true" : "false");
        if (c[i].allowed)
            printf(", \"fits\": %s, \"makespan\": %.15g, \"bubble\": %.15g, \"memory\": %.15g",
                   c[i].fits ? "true" : "false", c[i].makespan, c[i].bubble, c[i].memory);
        printf("}");
    }
    printf("]}\n");
}

static void print_choice(const ep_schedule_candidate *c, const char *choice)
{
    printf("%-12s %12s %12s %12s\n", "schedule", "makespan", "bubble", "memory");
    for (int i = 0; i < EP_SCHEDULE_METHODS; i++) {
        const char *name = ep_schedule_method_name(c[i].method);
        if (!c[i].allowed) {
            printf("%-12s ranks and chunks are outside its rules\n", name);
            continue;
        }
        printf("%-12s %12.6g %12.6g %12.6g%s\n", name, c[i].makespan, c[i].bubble, c[i].memory,
               choice && strcmp(choice, name) == 0 ? "  <- chosen"
               : c[i].fits                         ? ""
                                                   : "  over the bound");
    }
}

static int choose(request *q, const ep_schedule_costs *costs)
{
    ep_schedule_candidate candidates[EP_SCHEDULE_METHODS];
    int32_t method = 0;
    q->choose.ranks = q->config.ranks;
    q->choose.chunks = q->config.chunks;
    q->choose.model_chunks = q->config.model_chunks;
    q->choose.costs = costs;
    ep_status status = ep_schedule_choose(&q->choose, candidates, &method);
    if (status != EP_OK && status != EP_ERR_CAPACITY)
        return failed(status);
    const char *choice = status == EP_OK ? ep_schedule_method_name(method) : NULL;
    if (q->json)
        print_choice_json(q, candidates, choice);
    else
        print_choice(candidates, choice);
    if (status != EP_OK)
        return failed(status);
    q->config.method = method;
    if (method != EP_SCHEDULE_INTERLEAVED)
        q->config.model_chunks = 0;
    return q->svg ? show(q, costs, 1) : OK;
}

static int run(request *q)
{
    int32_t count = q->choosing ? 1 : q->config.ranks;
    ep_schedule_costs *costs = malloc((size_t)count * sizeof *costs);
    if (!costs) {
        fprintf(stderr, "entrepot plan pipeline: no memory for %d ranks\n", (int)count);
        return RUN_FAILED;
    }
    int code = parse_costs(q, count, costs);
    if (code == OK && q->schedule &&
        ep_schedule_method_parse(q->schedule, &q->config.method) != EP_OK)
        code = failed(EP_ERR_ARGUMENT);
    if (code == OK)
        code = q->choosing ? choose(q, costs) : show(q, costs, count);
    free(costs);
    return code;
}

int cmd_plan_pipeline(int argc, char **argv)
{
    request q = {.config = EP_SCHEDULE_CONFIG_INIT, .choose = EP_SCHEDULE_CHOOSE_CONFIG_INIT};
    int id, code = OK;
    optind = 1;
    while (code == OK && (id = getopt_long(argc, argv, "", options, NULL)) != -1) {
        if (id == HELP) {
            fputs(help, stdout);
            return OK;
        }
        code = id == '?' ? USAGE : take_option(&q, id, optarg);
    }
    if (code == OK && optind < argc)
        code = usage("\"%s\" is not an option", argv[optind]);
    if (code == OK)
        code = examine(&q);
    if (code == OK)
        code = run(&q);
    if (code == USAGE)
        fprintf(stderr, "Try --help.\n");
    return code;
}
