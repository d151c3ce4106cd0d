/* SPDX-License-Identifier: MIT */
/* `entrepot plan eplb`: places experts by their load. */
#include "plan_eplb.h"
#include "commands.h"
#include "exit.h"
#include "json.h"
#include "json_matrix.h"
#include "options.h"

#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

typedef struct request {
    const options_spec *spec;
    option_texts load;
    const char *current, *layers, *svg;
    int64_t replicas, groups, nodes, gpus, max_moves;
    int policy;
    bool json;
} request;

/* Everything read, planned and worked out. */
typedef struct result {
    ep_plan_config config;
    ep_plan_report report;
    int first_layer;
    float *load;                /* [windows][layers][experts] */
    int32_t *current;           /* [layers][replicas], NULL: none given */
    int32_t *phy2log, *phyrank; /* [layers][replicas] */
    int32_t max_count;
    int32_t *log2phy, *logcnt; /* [layers][experts][max_count], [layers][experts] */
} result;

static void release(result *r)
{
    free(r->load);
    free(r->current);
    free(r->phy2log);
    free(r->phyrank);
    free(r->log2phy);
    free(r->logcnt);
}

static int out_of_memory(void)
{
    fprintf(stderr, "entrepot plan eplb: out of memory\n");
    return EXIT_RUNTIME;
}

static int failed(ep_status status)
{
    if (status == EP_ERR_MEMORY)
        return out_of_memory();
    fprintf(stderr, "entrepot plan eplb: %s\n", ep_last_error());
    return status == EP_ERR_ARGUMENT ? EXIT_USAGE : EXIT_RUNTIME;
}

static int bad_file(const char *path, const char *message)
{
    fprintf(stderr, "entrepot plan eplb: %s: %s\n", path, message);
    return EXIT_USAGE;
}

static int examine(const request *q)
{
    bool incremental = q->policy == EP_PLAN_INCREMENTAL;
    if (!q->load.count)
        return options_misuse(q->spec, "--load is missing");
    if (!q->replicas || !q->gpus)
        return options_misuse(q->spec, "--%s is missing", q->replicas ? "gpus" : "replicas");
    if (incremental && (!q->current || q->max_moves < 0))
        return options_misuse(q->spec, "--policy incremental needs --%s",
                              q->current ? "max-moves" : "current");
    if (!incremental && q->max_moves >= 0)
        return options_misuse(q->spec, "--max-moves goes with --policy incremental");
    return EXIT_OK;
}

/* --layers A:B, as slices are written: from A up to, not including, B. */
static int parse_layers(const request *q, size_t rows, int64_t *first, int64_t *end)
{
    char expected[96], from[24] = "", to[24] = "";
    const char *text = q->layers, *colon = text ? strchr(text, ':') : NULL;
    *first = 0;
    *end = (int64_t)rows;
    if (!text)
        return EXIT_OK;
    snprintf(expected, sizeof expected, "A:B with 0 <= A < B <= %zu, the rows of the file", rows);
    if (!colon || colon - text >= (ptrdiff_t)sizeof from || strlen(colon + 1) >= sizeof to)
        return options_bad_value(q->spec, "layers", text, expected);
    memcpy(from, text, (size_t)(colon - text));
    strcpy(to, colon + 1);
    if ((from[0] && !parse_integer(from, 0, *end - 1, first)) ||
        (to[0] && !parse_integer(to, *first + 1, *end, end)))
        return options_bad_value(q->spec, "layers", text, expected);
    return EXIT_OK;
}

/* Copies the chosen rows of a file into window w; the first file sets the shape. */
static int use_matrix(const request *q, const json_matrix *m, int w, result *r)
{
    int64_t first, end;
    int code = parse_layers(q, m->rows, &first, &end);
    if (code != EXIT_OK)
        return code;
    ep_plan_config *c = &r->config;
    if (w == 0) {
        c->layers = (int32_t)(end - first);
        c->experts = (int32_t)m->columns;
        r->first_layer = (int)first;
        r->load =
            malloc((size_t)q->load.count * (size_t)(end - first) * m->columns * sizeof *r->load);
        if (!r->load)
            return out_of_memory();
    } else if (end - first != c->layers || m->columns != (size_t)c->experts) {
        char message[128];
        snprintf(message, sizeof message,
                 "expected %" PRId32 " layers of %" PRId32 " experts as in %s, found %" PRId64
                 " of %zu",
                 c->layers, c->experts, "the first file", end - first, m->columns);
        return bad_file(q->load.text[w], message);
    }
    size_t count = (size_t)c->layers * m->columns;
    for (size_t i = 0; i < count; i++)
        r->load[(size_t)w * count + i] = (float)m->values[(size_t)first * m->columns + i];
    return EXIT_OK;
}

static int read_loads(const request *q, result *r)
{
    static const json_matrix_spec spec = {"logical_count", 0, (double)FLT_MAX, false};
    for (int w = 0; w < q->load.count; w++) {
        char message[JSON_MATRIX_MESSAGE_MAX];
        json_matrix m;
        if (!json_matrix_load(q->load.text[w], &spec, &m, message))
            return bad_file(q->load.text[w], message);
        int code = use_matrix(q, &m, w, r);
        json_matrix_free(&m);
        if (code != EXIT_OK)
            return code;
    }
    return EXIT_OK;
}

static int read_current(const request *q, result *r)
{
    const ep_plan_config *c = &r->config;
    const json_matrix_spec spec = {"phy2log", 0, c->experts - 1, true};
    char message[JSON_MATRIX_MESSAGE_MAX];
    json_matrix m;
    if (!json_matrix_load(q->current, &spec, &m, message))
        return bad_file(q->current, message);
    int code = EXIT_OK;
    size_t count = m.rows * m.columns;
    if (m.rows != (size_t)c->layers || m.columns != (size_t)c->replicas) {
        snprintf(message, sizeof message,
                 "expected %" PRId32 " layers of %" PRId32 " slots, found %zu of %zu", c->layers,
                 c->replicas, m.rows, m.columns);
        code = bad_file(q->current, message);
    } else if (!(r->current = malloc(count * sizeof *r->current))) {
        code = out_of_memory();
    }
    for (size_t i = 0; code == EXIT_OK && i < count; i++)
        r->current[i] = (int32_t)m.values[i];
    json_matrix_free(&m);
    return code;
}

static int plan(const request *q, result *r)
{
    ep_plan_config *c = &r->config;
    int code = q->current ? read_current(q, r) : EXIT_OK;
    if (code != EXIT_OK)
        return code;
    size_t slots = (size_t)c->layers * (size_t)c->replicas;
    size_t experts = (size_t)c->layers * (size_t)c->experts;
    r->report.size = sizeof r->report;
    r->phy2log = malloc(slots * sizeof *r->phy2log);
    r->phyrank = malloc(slots * sizeof *r->phyrank);
    r->logcnt = malloc(experts * sizeof *r->logcnt);
    if (!r->phy2log || !r->phyrank || !r->logcnt)
        return out_of_memory();
    ep_status status = ep_plan_eplb(c, r->load, r->current, r->phy2log, r->phyrank, &r->report);
    if (status == EP_OK)
        status = ep_plan_max_count(c, r->phy2log, &r->max_count);
    if (status != EP_OK)
        return failed(status);
    r->log2phy = malloc(experts * (size_t)r->max_count * sizeof *r->log2phy);
    if (!r->log2phy)
        return out_of_memory();
    status = ep_plan_tables(c, r->phy2log, r->phyrank, r->max_count, r->log2phy, r->logcnt);
    return status == EP_OK ? EXIT_OK : failed(status);
}

/* --- output --- */

static void print_row(json *j, const int32_t *row, int32_t n)
{
    json_open_array(j, NULL);
    for (int32_t i = 0; i < n; i++)
        json_integer(j, NULL, row[i]);
    json_close_array(j);
}

static void print_rows(json *j, const char *key, const int32_t *rows, int32_t layers, int32_t n)
{
    json_open_array(j, key);
    for (int32_t l = 0; l < layers; l++)
        print_row(j, rows + (size_t)l * (size_t)n, n);
    json_close_array(j);
}

static void print_log2phy(json *j, const result *r)
{
    const int32_t *at = r->log2phy;
    json_open_array(j, "log2phy");
    for (int32_t l = 0; l < r->config.layers; l++) {
        json_open_array(j, NULL);
        for (int32_t e = 0; e < r->config.experts; e++, at += r->max_count)
            print_row(j, at, r->max_count);
        json_close_array(j);
    }
    json_close_array(j);
}

/* The replicas to fetch, when it is known from where. */
static int print_moves(json *j, const result *r)
{
    int64_t count = r->report.moves;
    ep_plan_move *moves = malloc((size_t)(count + 1) * sizeof *moves);
    if (!moves)
        return out_of_memory();
    ep_status status = ep_plan_moves(&r->config, r->current, r->phy2log, moves, count, &count);
    json_open_array(j, "move_list");
    for (int64_t i = 0; status == EP_OK && i < count; i++) {
        json_open_object(j, NULL);
        json_integer(j, "layer", moves[i].layer);
        json_integer(j, "slot", moves[i].slot);
        json_integer(j, "expert", moves[i].expert);
        json_integer(j, "source", moves[i].source);
        json_close_object(j);
    }
    json_close_array(j);
    free(moves);
    return status == EP_OK ? EXIT_OK : failed(status);
}

static int print_plan(const result *r)
{
    const ep_plan_config *c = &r->config;
    json j;
    json_start(&j, stdout);
    json_open_object(&j, NULL);
    json_text(&j, "policy", ep_plan_policy_name(c->policy));
    json_integer(&j, "layers", c->layers);
    json_integer(&j, "experts", c->experts);
    json_integer(&j, "replicas", c->replicas);
    json_integer(&j, "groups", c->groups);
    json_integer(&j, "nodes", c->nodes);
    json_integer(&j, "gpus", c->gpus);
    json_integer(&j, "windows", c->windows);
    json_real(&j, "balancedness_before", r->report.balancedness_before);
    json_real(&j, "balancedness", r->report.balancedness);
    json_integer(&j, "moves", r->report.moves);
    json_integer(&j, "duplicates", r->report.duplicates);
    json_integer(&j, "duplicates_unavoidable", r->report.duplicates_unavoidable);
    print_rows(&j, "phy2log", r->phy2log, c->layers, c->replicas);
    print_rows(&j, "logcnt", r->logcnt, c->layers, c->experts);
    print_log2phy(&j, r);
    int code = r->current ? print_moves(&j, r) : EXIT_OK;
    json_close_object(&j);
    return json_finish(&j) ? code : EXIT_RUNTIME;
}

static void print_summary(const result *r)
{
    fprintf(stderr,
            "%s: balancedness %.4f before, %.4f after; %" PRId64 " replicas to fetch, %" PRId64
            " duplicates on one GPU\n",
            ep_plan_policy_name(r->config.policy), r->report.balancedness_before,
            r->report.balancedness, r->report.moves, r->report.duplicates);
}

static int write_svg(const char *path, const eplb_figures *figures)
{
    FILE *file = fopen(path, "w");
    int drawn = file && eplb_svg(file, figures);
    bool written = file && !ferror(file);
    if (file && fclose(file) != 0)
        written = false;
    if (!written)
        fprintf(stderr, "entrepot plan eplb: %s: %s\n", path, strerror(errno));
    else if (!drawn)
        return out_of_memory();
    return written ? EXIT_OK : EXIT_RUNTIME;
}

static int draw(const request *q, const result *r)
{
    const ep_plan_config *c = &r->config;
    size_t count = (size_t)c->windows * (size_t)c->layers * (size_t)c->gpus;
    double *before = malloc(count * sizeof *before), *after = malloc(count * sizeof *after);
    int code = before && after ? EXIT_OK : out_of_memory();
    if (code == EXIT_OK) {
        ep_status status = ep_plan_gpu_load(c, r->load, r->current, before);
        if (status == EP_OK)
            status = ep_plan_gpu_load(c, r->load, r->phy2log, after);
        const eplb_figures figures = {c,
                                      &r->report,
                                      r->current ? "the current placement" : "experts in order",
                                      r->first_layer,
                                      before,
                                      after};
        code = status == EP_OK ? write_svg(q->svg, &figures) : failed(status);
    }
    free(before);
    free(after);
    return code;
}

static int run(const request *q)
{
    result r = {.config = EP_PLAN_CONFIG_INIT};
    r.config.replicas = (int32_t)q->replicas;
    r.config.groups = (int32_t)q->groups;
    r.config.nodes = (int32_t)q->nodes;
    r.config.gpus = (int32_t)q->gpus;
    r.config.policy = q->policy;
    r.config.windows = q->load.count;
    if (q->max_moves >= 0)
        r.config.max_moves = (int32_t)q->max_moves;
    int code = read_loads(q, &r);
    if (code == EXIT_OK)
        code = plan(q, &r);
    if (code == EXIT_OK && q->svg)
        code = draw(q, &r);
    if (code == EXIT_OK)
        code = print_plan(&r);
    if (code == EXIT_OK && !q->json)
        print_summary(&r);
    release(&r);
    return code;
}

int cmd_plan_eplb(int argc, char **argv)
{
    enum { MOST = 1 << 20 };
    const char *policies[EP_PLAN_POLICIES + 1] = {NULL};
    request q = {.groups = 1, .nodes = 1, .max_moves = -1};
    for (int i = 0; i < EP_PLAN_POLICIES; i++)
        policies[i] = ep_plan_policy_name(i);
    const option table[] = {
        OPTION_TEXTS("load", "FILE", &q.load,
                     "{\"logical_count\": [[...], ...]}, layers by experts; again for each further "
                     "window of time"),
        OPTION_INTEGER("replicas", "P", &q.replicas, 1, MOST, "slots per layer, over all GPUs"),
        OPTION_INTEGER("groups", "G", &q.groups, 1, MOST, "groups of experts (default 1)"),
        OPTION_INTEGER("nodes", "D", &q.nodes, 1, MOST,
                       "nodes (default 1); groups stay on one node if D divides G"),
        OPTION_INTEGER("gpus", "U", &q.gpus, 1, MOST, "GPUs"),
        OPTION_TEXT("layers", "A:B", &q.layers, "rows A to B - 1 of the files (default all)"),
        OPTION_CHOICE("policy", "NAME", &q.policy, policies, "how (default reference)"),
        OPTION_TEXT("current", "FILE", &q.current,
                    "{\"phy2log\": [[...], ...]}, the placement now: what moves are counted from"),
        OPTION_INTEGER("max-moves", "N", &q.max_moves, 0, INT32_MAX,
                       "incremental: replicas to fetch at most, over all layers"),
        OPTION_TEXT("svg", "FILE", &q.svg, "draw load per GPU before and after"),
        OPTION_SWITCH("json", &q.json, "no summary on standard error beside the JSON"),
    };
    const options_spec spec = {"entrepot plan eplb",
                               "--load FILE --replicas P --gpus U [options]",
                               "Places the experts of every layer on GPUs by their load, with "
                               "replicas of heavy ones.\nPrints JSON: phy2log, log2phy, logcnt, "
                               "balancedness before and after, moves, duplicates.",
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
