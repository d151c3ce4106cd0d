/* SPDX-License-Identifier: MIT */
#include "check_scratch.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

bool check_fail(char *message, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message, CHECK_MESSAGE_MAX, format, args);
    va_end(args);
    return false;
}

void check_scratch_free(check_scratch *s)
{
    free(s->ids);
    free(s->weights);
    free(s->row);
    free(s->codes);
    free(s->scales);
    free(s->value);
    free(s->sum);
    free(s->exact);
}

bool check_scratch_alloc(const workload *w, check_scratch *s, char *message)
{
    size_t entries = (size_t)(w->num_tokens * w->topk) + 1, hidden = (size_t)w->hidden;
    s->ids = malloc(entries * sizeof *s->ids);
    s->weights = malloc(entries * sizeof *s->weights);
    s->row = malloc(hidden * sizeof *s->row);
    s->codes = malloc(hidden);
    s->scales = malloc((hidden + 127) / 128 * sizeof *s->scales);
    s->value = malloc(hidden * sizeof *s->value);
    s->sum = malloc(hidden * sizeof *s->sum);
    s->exact = malloc(hidden * sizeof *s->exact);
    if (s->ids && s->weights && s->row && s->codes && s->scales && s->value && s->sum && s->exact)
        return true;
    return check_fail(message, "no memory for the reference");
}

void check_expert_input(const workload *w, int rank, int64_t token, bool fp8, check_scratch *s)
{
    workload_row(w, rank, token, s->row);
    if (fp8)
        check_quantise(s->row, w->hidden, s->codes, s->scales);
    for (int64_t h = 0; h < w->hidden; h++)
        s->value[h] = fp8 ? (float)check_e4m3_value(s->codes[h]) * s->scales[h / 128]
                          : float_from_bf16(s->row[h]);
}

bool check_output(const workload *w, int64_t token, const uint16_t *out, const check_scratch *s,
                  check_difference *d, char *message)
{
    for (int64_t h = 0; h < w->hidden; h++) {
        uint16_t expected = bf16_from_float(s->sum[h]);
        double value = float_from_bf16(out[h]);
        if (out[h] != expected)
            return check_fail(message,
                              "combine: token %" PRId64 ", channel %" PRId64 ": %g instead of %g",
                              token, h, value, (double)float_from_bf16(expected));
        d->product += value * s->exact[h];
        d->squares += value * value + s->exact[h] * s->exact[h];
    }
    return true;
}

bool check_difference_below(const check_difference *d, double bound, char *message)
{
    double difference = d->squares > 0 ? 1 - 2 * d->product / d->squares : 0;
    return difference < bound ||
           check_fail(message, "combine: relative squared difference %g, at most %g", difference,
                      bound);
}
