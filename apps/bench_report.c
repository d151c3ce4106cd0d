/* SPDX-License-Identifier: MIT */
/* Prints what `bench ep` measured: one JSON object, or a table. */
#include "bench_stats.h"
#include "exit.h"
#include "json.h"

#include <stdio.h>

typedef struct report {
    const bench_context *c;
    const bench_baseline *baseline;
    const bench_unplanned *unplanned;
    bench_totals totals;
    double us[BENCH_NUM_PHASES];
    double limit_us[BENCH_NUM_PHASES]; /* of dispatch and combine; 0: nothing moves */
    const char *check;
    int wrong_rank; /* -1: none */
} report;

static report collect(const bench_context *c, const bench_baseline *baseline,
                      const bench_unplanned *unplanned)
{
    report r = {.c = c,
                .baseline = baseline,
                .unplanned = unplanned,
                .totals = bench_sum(c),
                .wrong_rank = -1};
    int ranks = (int)c->options->ranks;
    double rate = copy_limit_rate(c->copies, 2 * COPY_ROUNDS, ranks);
    for (int p = 0; p < BENCH_NUM_PHASES; p++)
        r.us[p] = span_median_us(bench_span_at(c, p, 0, 0), c->options->iters, ranks);
    if (rate > 0) {
        r.limit_us[BENCH_DISPATCH] = (double)r.totals.bytes_received / rate;
        r.limit_us[BENCH_DISPATCH_CACHED] = r.limit_us[BENCH_DISPATCH];
        r.limit_us[BENCH_DISPATCH_GIVEN] = r.limit_us[BENCH_DISPATCH];
        r.limit_us[BENCH_COMBINE] = (double)r.totals.combine_bytes / rate;
        r.limit_us[BENCH_COMBINE_ORDINARY] = r.limit_us[BENCH_COMBINE];
    }
    r.check = c->options->check ? "ok" : "skipped";
    for (int i = 0; i < c->options->ranks && r.wrong_rank < 0; i++) {
        if (c->results[i].wrong[0])
            r.wrong_rank = i;
    }
    if (r.wrong_rank >= 0)
        r.check = "failed";
    return r;
}

static void json_setting(json *j, const bench_options *o)
{
    json_text(j, "mode", bench_modes[o->mode]);
    json_text(j, "backend", bench_backends[o->backend]);
    json_integer(j, "ranks", o->ranks);
    json_integer(j, "tokens", o->tokens);
    json_integer(j, "hidden", o->hidden);
    json_integer(j, "topk", o->topk);
    json_integer(j, "experts", o->experts);
    json_text(j, "wire", bench_wires[o->wire]);
    json_integer(j, "iters", o->iters);
    json_integer(j, "warmup", o->warmup);
    json_integer(j, "seed", o->seed);
    json_text(j, "ranks_as", bench_ranks_as[o->ranks_as]);
    json_integer(j, "threads", o->threads);
    json_integer(j, "sms", o->sms);
    json_text(j, "trace", o->trace_path);
    json_text(j, "plan", o->plan_path);
}

static void json_baseline(json *j, const report *r)
{
    const bench_baseline *b = r->baseline;
    if (!b->present)
        return;
    json_real(j, "baseline_dispatch_us", b->dispatch_us);
    json_real(j, "baseline_combine_us", b->combine_us);
    json_text(j, "baseline_dispatch_exchange", b->dispatch_exchange);
    json_text(j, "baseline_combine_exchange", b->combine_exchange);
    json_text(j, "baseline_library", b->library);
    json_real(j, "speedup_dispatch", b->dispatch_us / r->us[BENCH_DISPATCH]);
    json_real(j, "speedup_combine", b->combine_us / r->us[BENCH_COMBINE]);
}

static void json_unplanned(json *j, const bench_unplanned *u)
{
    if (!u->present)
        return;
    json_open_object(j, "without_plan");
    json_integer(j, "recv_tokens", u->recv_tokens);
    json_integer(j, "most_recv_tokens", u->most_recv_tokens);
    json_integer(j, "most_pairs", u->most_pairs);
    json_real(j, "dispatch_us", u->dispatch_us);
    json_real(j, "combine_us", u->combine_us);
    json_close_object(j);
}

static void json_memory(json *j, const bench_totals *t)
{
    json_open_object(j, "memory");
    json_integer(j, "inputs_outputs_bytes", t->inputs_outputs);
    json_integer(j, "window_bytes", t->window_bytes);
    json_integer(j, "peak_bytes", t->resident_bytes);
    json_real(j, "peak_to_inputs_outputs",
              t->inputs_outputs ? (double)t->resident_bytes / (double)t->inputs_outputs : 0);
    json_close_object(j);
}

static int print_json(const report *r)
{
    static const char *const keys[BENCH_NUM_PHASES] = {
        "layout_us",     "dispatch_us",          "dispatch_cached_us",
        "combine_us",    "combine_ordinary_us",  "hook_send_us",
        "hook_recv_us",  "combine_hook_send_us", "combine_hook_recv_us",
        "round_trip_us", "dispatch_given_us",    "graph_round_us"};
    json j;
    json_start(&j, stdout);
    json_open_object(&j, NULL);
    json_setting(&j, r->c->options);
    json_integer(&j, "recv_tokens", r->totals.recv_tokens);
    json_integer(&j, "most_recv_tokens", r->totals.most_recv_tokens);
    json_integer(&j, "most_pairs", r->totals.most_pairs);
    json_integer(&j, "bytes_received", r->totals.bytes_received);
    for (int p = 0; p < BENCH_NUM_PHASES; p++) {
        if (bench_has_phase(r->c->options, p))
            json_real(&j, keys[p], r->us[p]);
    }
    json_open_object(&j, "copy_limit_us");
    json_real(&j, "dispatch", r->limit_us[BENCH_DISPATCH]);
    json_real(&j, "combine", r->limit_us[BENCH_COMBINE]);
    json_close_object(&j);
    json_memory(&j, &r->totals);
    json_baseline(&j, r);
    json_unplanned(&j, r->unplanned);
    json_text(&j, "check", r->check);
    json_close_object(&j);
    return json_finish(&j) ? EXIT_OK : EXIT_RUNTIME;
}

static void print_phase(const report *r, bench_phase p)
{
    const bench_baseline *b = r->baseline;
    double baseline_us = p == BENCH_DISPATCH  ? b->dispatch_us
                         : p == BENCH_COMBINE ? b->combine_us
                                              : 0;
    printf("  %-18s %10.1f us", bench_phase_names[p], r->us[p]);
    if (r->limit_us[p] > 0)
        printf("   %5.1f %% of the copy limit", 100 * r->limit_us[p] / r->us[p]);
    if (baseline_us > 0)
        printf("   %5.2fx as fast as MPI (%.1f us)", baseline_us / r->us[p], baseline_us);
    putchar('\n');
}

static void print_unplanned(const report *r)
{
    const bench_unplanned *u = r->unplanned;
    const bench_totals *t = &r->totals;
    if (!u->present)
        return;
    printf("\n  %-28s %12s %12s\n", "", "without plan", "with plan");
    printf("  %-28s %12lld %12lld\n", "most rows at a rank", (long long)u->most_recv_tokens,
           (long long)t->most_recv_tokens);
    printf("  %-28s %12lld %12lld\n", "most (token, expert) pairs", (long long)u->most_pairs,
           (long long)t->most_pairs);
    printf("  %-28s %9.1f us %9.1f us\n", "dispatch", u->dispatch_us, r->us[BENCH_DISPATCH]);
    printf("  %-28s %9.1f us %9.1f us\n", "combine", u->combine_us, r->us[BENCH_COMBINE]);
}

static int print_table(const report *r)
{
    const bench_options *o = r->c->options;
    const bench_totals *t = &r->totals;
    const bench_baseline *b = r->baseline;
    printf("%s mode on %s: %lld ranks as %s, %lld tokens each, hidden %lld, top-%lld of %lld "
           "experts, %s wire\n",
           bench_modes[o->mode], bench_backends[o->backend], (long long)o->ranks,
           bench_ranks_as[o->ranks_as], (long long)o->tokens, (long long)o->hidden,
           (long long)o->topk, (long long)o->experts, bench_wires[o->wire]);
    printf("%lld rows received, %.1f MB; median of %lld iterations, slowest rank\n\n",
           (long long)t->recv_tokens, (double)t->bytes_received / 1e6, (long long)o->iters);
    for (int p = 0; p < BENCH_NUM_PHASES; p++) {
        if (bench_has_phase(o, p))
            print_phase(r, (bench_phase)p);
    }
    print_unplanned(r);
    printf("\n  memory %.1f MB at its peak, %.2f of inputs and outputs; windows %.1f MB\n",
           (double)t->resident_bytes / 1e6,
           t->inputs_outputs ? (double)t->resident_bytes / (double)t->inputs_outputs : 0,
           (double)t->window_bytes / 1e6);
    if (b->present)
        printf("  baseline: %s, rows exchanged by %s and back by %s\n", b->library,
               b->dispatch_exchange, b->combine_exchange);
    printf("  check: %s\n", r->check);
    return fflush(stdout) == 0 ? EXIT_OK : EXIT_RUNTIME;
}

int bench_report(const bench_context *c, const bench_baseline *b, const bench_unplanned *u)
{
    report r = collect(c, b, u);
    int code = c->options->json ? print_json(&r) : print_table(&r);
    if (r.wrong_rank >= 0) {
        fprintf(stderr, "entrepot bench ep: check failed at rank %d: %s\n", r.wrong_rank,
                c->results[r.wrong_rank].wrong);
        return EXIT_CHECK_FAILED;
    }
    return code;
}
