/* SPDX-License-Identifier: MIT */
/* The timeline of `bench ep` as Chrome trace events: a process per rank, a track per phase. */
#include "bench.h"
#include "json.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

static void write_name(json *j, const char *kind, int rank, int track, const char *name)
{
    json_open_object(j, NULL);
    json_text(j, "ph", "M");
    json_text(j, "name", kind);
    json_integer(j, "pid", rank);
    json_integer(j, "tid", track);
    json_open_object(j, "args");
    json_text(j, "name", name);
    json_close_object(j);
    json_close_object(j);
}

static void write_rank_names(json *j, const bench_options *o, int rank)
{
    char name[32];
    snprintf(name, sizeof name, "rank %d", rank);
    write_name(j, "process_name", rank, 0, name);
    for (int p = 0; p < BENCH_NUM_PHASES; p++)
        if (bench_has_phase(o, p))
            write_name(j, "thread_name", rank, p, bench_phase_names[p]);
}

static void write_span(json *j, const span *s, int64_t origin, int rank, int phase,
                       int64_t iteration)
{
    json_open_object(j, NULL);
    json_text(j, "ph", "X");
    json_text(j, "name", bench_phase_names[phase]);
    json_integer(j, "pid", rank);
    json_integer(j, "tid", phase);
    json_real(j, "ts", (double)(s->start_ns - origin) / 1e3);
    json_real(j, "dur", (double)(s->end_ns - s->start_ns) / 1e3);
    json_open_object(j, "args");
    json_integer(j, "iteration", iteration);
    json_close_object(j);
    json_close_object(j);
}

static void write_events(json *j, const bench_context *c)
{
    const bench_options *o = c->options;
    int64_t origin = bench_span_at(c, BENCH_LAYOUT, 0, 0)->start_ns;
    json_open_object(j, NULL);
    json_open_array(j, "traceEvents");
    for (int r = 0; r < o->ranks; r++)
        write_rank_names(j, o, r);
    for (int p = 0; p < BENCH_NUM_PHASES; p++) {
        for (int64_t i = 0; bench_has_phase(o, p) && i < o->iters; i++) {
            for (int r = 0; r < o->ranks; r++)
                write_span(j, bench_span_at(c, p, i, r), origin, r, p, i);
        }
    }
    json_close_array(j);
    json_close_object(j);
}

static bool failed(const bench_context *c)
{
    fprintf(stderr, "entrepot bench ep: --trace-out %s: %s\n", c->options->trace_out_path,
            strerror(errno));
    return false;
}

bool bench_write_trace(const bench_context *c)
{
    json j;
    FILE *file = fopen(c->options->trace_out_path, "we");
    if (!file)
        return failed(c);
    json_start(&j, file);
    write_events(&j, c);
    bool written = json_finish(&j);
    return (fclose(file) == 0 && written) || failed(c);
}
