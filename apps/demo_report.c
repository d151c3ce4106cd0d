/* SPDX-License-Identifier: MIT */
/* Prints what the demo found out: one JSON object, or tables. */
#include "demo.h"
#include "exit.h"
#include "json.h"

#include <stdio.h>

#define BAR_WIDTH 40

typedef struct report {
    const demo_context *c;
    const demo_check *check;
    double us[DEMO_NUM_PHASES];
    double limit_us[DEMO_NUM_PHASES]; /* of the copy limit; 0 where it does not apply */
    int64_t tokens, pairs, rows, own_rows, most_rows;
    int gpus; /* 0: on the CPU */
    bool ok[DEMO_NUM_WIRES], old_agrees;
} report;

static report collect(const demo_context *c, const demo_check *check)
{
    int ranks = (int)c->options->ranks;
    report r = {.c = c,
                .check = check,
                .tokens = c->options->ranks * c->options->tokens,
                .old_agrees = true};
    bool cuda = c->options->backend == DEMO_BACKEND_CUDA;
    for (int i = 0; i < ranks; i++) {
        const demo_rank_result *result = &c->results[i];
        r.pairs += result->pairs;
        r.rows += result->rows;
        r.own_rows += result->own_rows;
        r.most_rows = result->rows > r.most_rows ? result->rows : r.most_rows;
        r.old_agrees &= result->old_agrees;
        r.gpus = cuda && result->gpu >= r.gpus ? result->gpu + 1 : r.gpus;
    }
    for (int p = 0; p < DEMO_NUM_PHASES; p++) {
        int iterations = p == DEMO_ROUTER    ? 1
                         : p == DEMO_EXPERTS ? DEMO_NUM_WIRES
                                             : DEMO_ITERATIONS;
        r.us[p] = span_median_us(demo_span_at(c, p, 0, 0), iterations, ranks);
    }
    double rate = copy_limit_rate(c->copies, demo_copy_rounds(c->options), ranks);
    r.limit_us[DEMO_DISPATCH] = (double)(r.rows * DEMO_ROW_BF16) / rate;
    r.limit_us[DEMO_DISPATCH_FP8] = (double)(r.rows * DEMO_ROW_FP8) / rate;
    /* A copy of n bytes reads n and writes n; combine reads rows and writes tokens. */
    r.limit_us[DEMO_COMBINE] = (double)((r.rows + r.tokens) * DEMO_ROW_BF16 / 2) / rate;
    r.ok[DEMO_WIRE_BF16] = check->difference[DEMO_WIRE_BF16] < DEMO_TOLERANCE_BF16;
    r.ok[DEMO_WIRE_FP8] = check->difference[DEMO_WIRE_FP8] < DEMO_TOLERANCE_FP8;
    return r;
}

static bool all_ok(const report *r)
{
    return r->ok[DEMO_WIRE_BF16] && r->ok[DEMO_WIRE_FP8] && r->old_agrees;
}

/* -------------------------------------------------------------------- JSON */

static void json_times(json *j, const report *r)
{
    json_real(j, "router_us", r->us[DEMO_ROUTER]);
    json_real(j, "dispatch_us", r->us[DEMO_DISPATCH]);
    json_real(j, "dispatch_fp8_us", r->us[DEMO_DISPATCH_FP8]);
    json_real(j, "expert_us", r->us[DEMO_EXPERTS]);
    json_real(j, "combine_us", r->us[DEMO_COMBINE]);
    json_real(j, "traditional_dispatch_us", r->us[DEMO_OLD_DISPATCH]);
    json_real(j, "traditional_combine_us", r->us[DEMO_OLD_COMBINE]);
    json_open_object(j, "copy_limit_us");
    json_real(j, "dispatch", r->limit_us[DEMO_DISPATCH]);
    json_real(j, "dispatch_fp8", r->limit_us[DEMO_DISPATCH_FP8]);
    json_real(j, "combine", r->limit_us[DEMO_COMBINE]);
    json_close_object(j);
    json_real(j, "reference_us", r->check->reference_us);
}

static void json_counts(json *j, const report *r)
{
    json_integer(j, "pairs", r->pairs);
    json_integer(j, "rows", r->rows);
    json_integer(j, "rows_kept_local", r->own_rows);
    json_integer(j, "rows_not_sent_twice", r->pairs - r->rows);
    json_integer(j, "bytes_bf16", r->rows * DEMO_ROW_BF16);
    json_integer(j, "bytes_fp8", r->rows * DEMO_ROW_FP8);
    json_open_array(j, "rows_per_rank");
    for (int i = 0; i < r->c->options->ranks; i++)
        json_integer(j, NULL, r->c->results[i].rows);
    json_close_array(j);
}

static int print_json(const report *r)
{
    const demo_options *o = r->c->options;
    json j;
    json_start(&j, stdout);
    json_open_object(&j, NULL);
    json_text(&j, "backend", demo_backends[o->backend]);
    json_integer(&j, "gpus", r->gpus);
    json_integer(&j, "ranks", o->ranks);
    json_integer(&j, "tokens", o->tokens);
    json_integer(&j, "hidden", DEMO_HIDDEN);
    json_integer(&j, "topk", DEMO_TOPK);
    json_integer(&j, "experts", r->c->load.num_experts);
    json_integer(&j, "seed", o->seed);
    json_times(&j, r);
    json_counts(&j, r);
    json_real(&j, "difference_bf16", r->check->difference[DEMO_WIRE_BF16]);
    json_real(&j, "difference_fp8", r->check->difference[DEMO_WIRE_FP8]);
    json_text(&j, "check", all_ok(r) ? "ok" : "failed");
    json_close_object(&j);
    return json_finish(&j) ? EXIT_OK : EXIT_RUNTIME;
}

/* ------------------------------------------------------------------ tables */

static void print_phase(const report *r, const char *name, demo_phase phase, int old)
{
    printf("  %-28s %8.*f ms", name, r->gpus ? 3 : 2, r->us[phase] / 1e3);
    if (r->limit_us[phase] > 0)
        printf("  %6.0f %%", 100 * r->limit_us[phase] / r->us[phase]);
    else if (old >= 0)
        printf("  %8s", "");
    if (old >= 0)
        printf("  %9.2f ms  %5.1fx", r->us[old] / 1e3, r->us[old] / r->us[phase]);
    putchar('\n');
}

static void print_phases(const report *r)
{
    printf("Phase                             time    of copy   traditional  times\n"
           "                            (slowest rank)  limit      path     as fast\n");
    print_phase(r, r->gpus ? "T2 dispatch: router, on host" : "T2 dispatch: router", DEMO_ROUTER,
                -1);
    print_phase(r, "T2 dispatch: BF16 rows", DEMO_DISPATCH, DEMO_OLD_DISPATCH);
    print_phase(r, "T2 dispatch: FP8 rows", DEMO_DISPATCH_FP8, DEMO_OLD_DISPATCH);
    print_phase(r, r->gpus ? "T3 expert: MLPs, on the host" : "T3 expert: SwiGLU MLPs",
                DEMO_EXPERTS, -1);
    print_phase(r, "T4 combine", DEMO_COMBINE, DEMO_OLD_COMBINE);
    if (r->gpus)
        printf(
            "  Dispatch and combine: from a barrier until the rank's stream is done. Experts: "
            "with\n"
            "  copying rows to the host and outputs back. Copy limit: of device memory.\n"
            "  Traditional path: rows to the host, then as without GPUs (pack, copy into shared\n"
            "  memory, barrier, copy out, barrier), and back; a program whose ranks can't write\n"
            "  to each other's GPU. Ordinary host memory, no other cost of a message layer.\n\n");
    else
        printf("  Traditional path: pack, copy into shared memory, barrier, copy out, barrier;\n"
               "  emulated on the same ranks without any other cost of a message layer.\n\n");
}

static double percent(int64_t part, int64_t whole)
{
    return whole > 0 ? 100 * (double)part / (double)whole : 0;
}

static void print_ideas(const report *r)
{
    double bf16 = (double)(r->rows * DEMO_ROW_BF16) / 1e6;
    double fp8 = (double)(r->rows * DEMO_ROW_FP8) / 1e6;
    printf("What each idea bought\n");
    printf("  a token goes to a rank once  %8lld rows instead of %lld (token, expert) pairs: "
           "%.0f %% not sent twice\n",
           (long long)r->rows, (long long)r->pairs, percent(r->pairs - r->rows, r->pairs));
    printf("  local rows stay local        %8lld rows, %.0f %%, never leave their rank\n",
           (long long)r->own_rows, percent(r->own_rows, r->rows));
    printf("  a narrow wire (FP8)          %8.1f MB instead of %.1f MB: %.0f %% saved\n", fp8, bf16,
           100 * (1 - fp8 / bf16));
    printf(
        "  one pass to the final place  %8.2f ms for dispatch and combine instead of %.2f ms\n\n",
        (r->us[DEMO_DISPATCH] + r->us[DEMO_COMBINE]) / 1e3,
        (r->us[DEMO_OLD_DISPATCH] + r->us[DEMO_OLD_COMBINE]) / 1e3);
}

static void print_load(const report *r)
{
    int ranks = (int)r->c->options->ranks;
    double mean = (double)r->rows / ranks;
    printf("Load: rows received per rank; the fullest has %.2f times the mean\n",
           mean > 0 ? (double)r->most_rows / mean : 0);
    for (int i = 0; i < ranks; i++) {
        int64_t rows = r->c->results[i].rows;
        int filled = r->most_rows ? (int)(rows * BAR_WIDTH / r->most_rows) : 0;
        printf("  rank %3d  ", i);
        for (int k = 0; k < BAR_WIDTH; k++)
            putchar(k < filled ? '#' : '.');
        printf(" %lld\n", (long long)rows);
    }
    putchar('\n');
}

static void print_check(const report *r)
{
    printf("Check against the layer in one process (%.1f s there)\n", r->check->reference_us / 1e6);
    printf("  BF16 wire  relative squared difference %.1e, at most %.0e: %s\n",
           r->check->difference[DEMO_WIRE_BF16], DEMO_TOLERANCE_BF16,
           r->ok[DEMO_WIRE_BF16] ? "ok" : "FAILED");
    printf("  FP8 wire   relative squared difference %.1e, at most %.0e: %s\n",
           r->check->difference[DEMO_WIRE_FP8], DEMO_TOLERANCE_FP8,
           r->ok[DEMO_WIRE_FP8] ? "ok" : "FAILED");
    printf("  traditional path: %s\n",
           r->old_agrees ? "same rows and outputs, bit for bit" : "DIFFERENT rows or outputs");
}

static int print_tables(const report *r)
{
    const demo_options *o = r->c->options;
    printf("One mixture-of-experts layer over %lld ranks (processes), %lld tokens each: hidden %d, "
           "top-%d of\n%lld SwiGLU experts of width %d, sigmoid router, random weights\n\n",
           (long long)o->ranks, (long long)o->tokens, DEMO_HIDDEN, DEMO_TOPK,
           (long long)r->c->load.num_experts, DEMO_WIDTH);
    if (r->gpus)
        printf("Rows on %d GPU%s: %s\n\n", r->gpus, r->gpus > 1 ? "s" : "",
               r->c->results[0].gpu_name);
    print_phases(r);
    print_ideas(r);
    print_load(r);
    print_check(r);
    return fflush(stdout) == 0 ? EXIT_OK : EXIT_RUNTIME;
}

int demo_report(const demo_context *c, const demo_check *check)
{
    report r = collect(c, check);
    int code = c->options->json ? print_json(&r) : print_tables(&r);
    if (!all_ok(&r)) {
        fprintf(stderr, "entrepot demo: check failed\n");
        return EXIT_CHECK_FAILED;
    }
    return code;
}
