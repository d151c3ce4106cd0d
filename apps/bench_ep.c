/* SPDX-License-Identifier: MIT */
/* entrepot bench ep: options, and the order of things. */
#include "bench_stats.h"
#include "commands.h"
#include "exit.h"
#include "gpu.h"
#include "options.h"

#include <stdio.h>
#include <string.h>

const char *const bench_modes[] = {"normal", "ll", NULL};
const char *const bench_backends[] = {"cpu", "cuda", NULL};
const char *const bench_wires[] = {"bf16", "fp8", NULL};
const char *const bench_ranks_as[] = {"processes", "threads", NULL};
static const char *const baselines[] = {"none", "mpi", NULL};

const char *const bench_phase_names[BENCH_NUM_PHASES] = {
    "layout",           "dispatch",          "dispatch cached",  "combine",
    "combine ordinary", "dispatch send",     "dispatch receive", "combine send",
    "combine receive",  "notify round trip", "dispatch given",   "round in a graph"};

/* Marks between calls on a GPU are of a fixed number. */
#define GPU_MAX_CALLS ((GPU_MAX_MARKS - 1) / 3)

static int too_many_calls(const options_spec *spec, const char *name, int64_t value)
{
    char text[32], expected[48];
    snprintf(text, sizeof text, "%lld", (long long)value);
    snprintf(expected, sizeof expected, "at most %d with --backend cuda", GPU_MAX_CALLS);
    return options_bad_value(spec, name, text, expected);
}

/* Options that only one backend has, or bounds. */
static int check_backend(const options_spec *spec, const bench_options *o)
{
    bool cuda = o->backend == BENCH_BACKEND_CUDA;
    if (o->mps && !cuda)
        return options_misuse(spec, "--mps is given without --backend cuda");
    if (o->sms && !cuda)
        return options_misuse(spec, "--sms is given without --backend cuda");
    if (o->threads && cuda)
        return options_misuse(spec, "--threads is given with --backend cuda, which uses none");
    if (cuda && o->iters > GPU_MAX_CALLS)
        return too_many_calls(spec, "iters", o->iters);
    if (cuda && o->warmup > GPU_MAX_CALLS)
        return too_many_calls(spec, "warmup", o->warmup);
    return EXIT_OK;
}

static int parse(int argc, char **argv, bench_options *o)
{
    const option table[] = {
        OPTION_CHOICE("mode", "MODE", &o->mode, bench_modes, "kernels to time"),
        OPTION_CHOICE("backend", "NAME", &o->backend, bench_backends, "where tensors live"),
        OPTION_INTEGER("ranks", "R", &o->ranks, 1, 1024, "ranks on this machine, default 8"),
        OPTION_INTEGER("tokens", "T", &o->tokens, 0, 1 << 20, "tokens per rank, default 1024"),
        OPTION_INTEGER("hidden", "H", &o->hidden, 8, 1 << 20,
                       "elements per row, a multiple of 8, default 7168"),
        OPTION_INTEGER("topk", "K", &o->topk, 1, 1024, "experts per token, default 8"),
        OPTION_INTEGER("experts", "E", &o->experts, 1, 1 << 20,
                       "experts, a multiple of the ranks, default 256"),
        OPTION_CHOICE("wire", "TYPE", &o->wire, bench_wires, "what dispatched rows travel as"),
        OPTION_INTEGER("iters", "N", &o->iters, 1, 1000000, "timed iterations, default 20"),
        OPTION_INTEGER("warmup", "N", &o->warmup, 0, 1000000, "untimed ones before, default 3"),
        OPTION_INTEGER("seed", "S", &o->seed, 0, INT64_MAX, "of rows and routing, default 1"),
        OPTION_CHOICE("ranks-as", "KIND", &o->ranks_as, bench_ranks_as, "what a rank is"),
        OPTION_INTEGER("threads", "N", &o->threads, 0, 256,
                       "threads a rank may use beside its own with --backend cpu, default 0"),
        OPTION_INTEGER("sms", "N", &o->sms, 0, 1024,
                       "multiprocessors a rank may use with --backend cuda, 0: the default"),
        OPTION_SWITCH("mps", &o->mps,
                      "with --backend cuda: run under an MPS daemon of its own, which ranks that "
                      "share a GPU need"),
        OPTION_TEXT("trace", "FILE", &o->trace_path,
                    "take the routing from FILE: per line K expert ids a token, an empty column, "
                    "as many weights, tab-separated"),
        OPTION_TEXT("plan", "FILE", &o->plan_path,
                    "place experts as `entrepot plan eplb --json` wrote to FILE; also times the "
                    "same routing without"),
        OPTION_INTEGER("plan-layer", "N", &o->plan_layer, 0, 1 << 20,
                       "layer of the plan, counted from 0, default 0"),
        OPTION_SWITCH("check", &o->check, "compare with an independent reference; exit 1 if wrong"),
        OPTION_CHOICE("baseline", "NAME", &o->baseline, baselines,
                      "time the traditional path as well"),
        OPTION_TEXT("trace-out", "FILE", &o->trace_out_path,
                    "write the timeline as Chrome trace events"),
        OPTION_SWITCH("json", &o->json, "one JSON object on standard output"),
    };
    const options_spec spec = {
        "entrepot bench ep",
        "[options]",
        "Times dispatch and combine between ranks on this machine. Each time is the median over\n"
        "iterations of the slowest rank; ranks are aligned by a barrier before each timed call.",
        table,
        sizeof table / sizeof table[0],
        false};
    int code;
    char text[32];
    if (options_parse(&spec, argc, argv, &code) < 0)
        return code == EXIT_OK ? -1 : code;
    if ((code = check_backend(&spec, o)) != EXIT_OK)
        return code;
    if (o->plan_layer && !o->plan_path)
        return options_misuse(&spec, "--plan-layer is given without --plan");
    snprintf(text, sizeof text, "%lld", (long long)o->hidden);
    if (o->hidden % 8)
        return options_bad_value(&spec, "hidden", text, "a multiple of 8");
    snprintf(text, sizeof text, "%lld", (long long)o->experts);
    if (o->experts % o->ranks)
        return options_bad_value(&spec, "experts", text, "a multiple of --ranks");
    snprintf(text, sizeof text, "%lld", (long long)o->topk);
    if (o->topk > o->experts)
        return options_bad_value(&spec, "topk", text, "at most --experts");
    return EXIT_OK;
}

/* Ranks write their findings here; false after a message. */
static bool alloc_shared(bench_context *c, size_t *bytes)
{
    size_t ranks = (size_t)c->options->ranks;
    size_t spans = BENCH_NUM_PHASES * (size_t)c->options->iters * ranks;
    size_t copies = 2 * COPY_ROUNDS * ranks;
    *bytes = ranks * sizeof *c->results + spans * sizeof *c->spans + copies * sizeof *c->copies;
    char *memory = ranks_shared_alloc(*bytes);
    if (!memory) {
        fprintf(stderr, "entrepot bench ep: no memory for %zu bytes of results\n", *bytes);
        return false;
    }
    c->results = (bench_rank_result *)memory;
    c->spans = (span *)(memory + ranks * sizeof *c->results);
    c->copies = (copy_round *)(c->spans + spans);
    return true;
}

static rank_fn rank_of(const bench_options *o)
{
    if (o->backend == BENCH_BACKEND_CUDA)
        return o->mode == BENCH_MODE_LL ? bench_cuda_ll_rank : bench_cuda_rank;
    return o->mode == BENCH_MODE_LL ? bench_ll_rank : bench_normal_rank;
}

static int run_ranks(bench_context *c, const char *what)
{
    const bench_options *o = c->options;
    const ranks_config config = {"entrepot bench ep", what, (int)o->ranks,
                                 o->ranks_as == BENCH_RANKS_THREADS,
                                 o->ranks * (o->warmup + o->iters)};
    return ranks_run(&config, rank_of(o), c);
}

/* The same routing with experts in equal blocks. */
static int measure_unplanned(const bench_context *planned, bench_unplanned *u)
{
    bench_context c = {.options = planned->options, .load = planned->load};
    size_t bytes = 0;
    c.load.placement = NULL;
    c.load.num_experts = c.options->experts;
    int code = alloc_shared(&c, &bytes) ? run_ranks(&c, "without plan") : EXIT_RUNTIME;
    if (code == EXIT_OK) {
        bench_totals t = bench_sum(&c);
        int ranks = (int)c.options->ranks;
        *u = (bench_unplanned){
            true,
            span_median_us(bench_span_at(&c, BENCH_DISPATCH, 0, 0), c.options->iters, ranks),
            span_median_us(bench_span_at(&c, BENCH_COMBINE, 0, 0), c.options->iters, ranks),
            t.recv_tokens,
            t.most_recv_tokens,
            t.most_pairs};
    }
    ranks_shared_free(c.results, bytes);
    return code;
}

static int measure(bench_context *c)
{
    const bench_options *o = c->options;
    bench_baseline baseline = {0};
    bench_unplanned unplanned = {0};
    int code = EXIT_OK;
    /* The baseline runs before and after, and its better run counts: a machine that slows down
       or speeds up in between must not favour this library. */
    if (o->baseline == BENCH_BASELINE_MPI)
        code = bench_run_baseline(o, &baseline);
    if (code == EXIT_OK && o->plan_path)
        code = measure_unplanned(c, &unplanned);
    if (code == EXIT_OK)
        code = run_ranks(c, "bench ep");
    if (code == EXIT_OK && o->baseline == BENCH_BASELINE_MPI)
        code = bench_run_baseline(o, &baseline);
    if (code == EXIT_OK && o->trace_out_path && !bench_write_trace(c))
        code = EXIT_RUNTIME;
    return code == EXIT_OK ? bench_report(c, &baseline, &unplanned) : code;
}

static int bad_file(const char *name, const char *path, const char *message)
{
    fprintf(stderr, "entrepot bench ep: %s %s: %s\n", name, path, message);
    return EXIT_USAGE;
}

/* Reads the files that shape the routing; an exit code. */
static int load_files(const bench_options *o, trace *routing, placement *plan)
{
    char message[PLACEMENT_MESSAGE_MAX];
    if (o->trace_path && !trace_load(o->trace_path, (int)o->topk, o->experts, routing, message))
        return bad_file("--trace", o->trace_path, message);
    if (o->plan_path &&
        !placement_load(o->plan_path, o->plan_layer, o->experts, o->ranks, plan, message))
        return bad_file("--plan", o->plan_path, message);
    return EXIT_OK;
}

static int run(const bench_options *o, const trace *routing, const placement *plan)
{
    bench_context c = {.options = o};
    size_t bytes = 0;
    c.load = (workload){(uint64_t)o->seed,
                        (int)o->ranks,
                        o->tokens,
                        o->hidden,
                        (int)o->topk,
                        o->plan_path ? plan->slots : o->experts,
                        o->trace_path ? routing : NULL,
                        o->plan_path ? plan : NULL};
    int code = alloc_shared(&c, &bytes) ? measure(&c) : EXIT_RUNTIME;
    ranks_shared_free(c.results, bytes);
    return code;
}

int cmd_bench_ep(int argc, char **argv)
{
    bench_options o = {.ranks = 8,
                       .tokens = 1024,
                       .hidden = 7168,
                       .topk = 8,
                       .experts = 256,
                       .iters = 20,
                       .warmup = 3,
                       .seed = 1};
    trace routing = {0};
    placement plan = {0};
    int code = parse(argc, argv, &o);
    if (code)
        return code < 0 ? EXIT_OK : code;
    code = load_files(&o, &routing, &plan);
    if (code == EXIT_OK && o.backend == BENCH_BACKEND_CUDA &&
        !gpu_prepare("entrepot bench ep", (int)o.ranks, o.mps))
        code = EXIT_RUNTIME;
    if (code == EXIT_OK)
        code = run(&o, &routing, &plan);
    mps_stop();
    trace_free(&routing);
    placement_free(&plan);
    return code;
}
