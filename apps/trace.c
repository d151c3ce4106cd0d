/* SPDX-License-Identifier: MIT */
#include "trace.h"

#include "options.h"
#include "text_file.h"

#include <errno.h>
#include <float.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FIELD_MAX 40 /* characters of the longest number that makes sense */

typedef struct reader {
    const char *next, *end;
    int64_t line, column;
    int64_t num_experts;
    trace *t;
    int64_t capacity; /* entries that ids and weights have room for */
    char *message;
} reader;

/* One column: its text, and whether it was the last of its line. */
typedef struct field {
    char text[FIELD_MAX + 1];
    bool too_long, last;
} field;

static bool fail(const reader *r, const char *format, ...) __attribute__((format(printf, 2, 3)));

static bool fail(const reader *r, const char *format, ...)
{
    int n = snprintf(r->message, TRACE_MESSAGE_MAX, "line %" PRId64 ", column %" PRId64 ": ",
                     r->line, r->column);
    va_list args;
    va_start(args, format);
    vsnprintf(r->message + n, TRACE_MESSAGE_MAX - (size_t)n, format, args);
    va_end(args);
    return false;
}

/* Steps over the next column of the line. */
static field next_field(reader *r)
{
    field f = {.last = true};
    const char *start = r->next;
    while (r->next < r->end && *r->next != '\t' && *r->next != '\n')
        r->next++;
    size_t length = (size_t)(r->next - start);
    f.too_long = length > FIELD_MAX;
    size_t kept = f.too_long ? FIELD_MAX : length;
    for (size_t i = 0; i < kept; i++)
        f.text[i] = start[i] ? start[i] : '?'; /* a zero byte would hide what follows it */
    if (r->next < r->end) {
        f.last = *r->next == '\n';
        r->next++;
    }
    r->column++;
    return f;
}

static bool reserve(reader *r, int64_t entries)
{
    if (entries <= r->capacity)
        return true;
    int64_t capacity = r->capacity < 1024 ? 1024 : r->capacity * 2;
    int32_t *ids = realloc(r->t->ids, (size_t)capacity * sizeof *ids);
    if (ids)
        r->t->ids = ids;
    float *weights = realloc(r->t->weights, (size_t)capacity * sizeof *weights);
    if (weights)
        r->t->weights = weights;
    if (!ids || !weights)
        return fail(r, "out of memory for %" PRId64 " entries", capacity);
    r->capacity = capacity;
    return true;
}

/* The ids of a line, up to the empty column; `first` is where the line's entries start. */
static bool read_ids(reader *r, int64_t first, int64_t *count)
{
    *count = 0;
    for (;;) {
        field f = next_field(r);
        int64_t id;
        if (!f.text[0] && *count > 0 && !f.last)
            break;
        if (f.too_long || !parse_integer(f.text, -1, r->num_experts - 1, &id))
            return fail(r, "'%s' is not an expert id in -1..%" PRId64, f.text, r->num_experts - 1);
        if (f.last)
            return fail(r, "the line ends after an expert id; an empty column and as many weights "
                           "must follow");
        if (!reserve(r, first + *count + 1))
            return false;
        r->t->ids[first + (*count)++] = (int32_t)id;
    }
    if (*count % r->t->topk)
        return fail(r, "%" PRId64 " expert ids before it are no multiple of top-k %d", *count,
                    r->t->topk);
    return true;
}

static bool read_weights(reader *r, int64_t first, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        field f = next_field(r);
        double weight;
        bool decimal = f.text[strspn(f.text, "0123456789+-.eE")] == 0;
        if (f.too_long || !decimal || !parse_real(f.text, -FLT_MAX, FLT_MAX, &weight))
            return fail(r, "'%s' is not a weight (a finite decimal number)", f.text);
        r->t->weights[first + i] = (float)weight;
        if (f.last != (i + 1 == count))
            return fail(r, "the line %s after %" PRId64 " weights; it has %" PRId64 " expert ids",
                        f.last ? "ends" : "goes on", i + 1, count);
    }
    return true;
}

bool trace_parse(const char *text, size_t size, int topk, int64_t num_experts, trace *t,
                 char message[TRACE_MESSAGE_MAX])
{
    reader r = {text, text + size, 0, 0, num_experts, t, 0, message};
    *t = (trace){topk, 0, NULL, NULL};
    message[0] = 0;
    bool good = true;
    while (good && r.next < r.end) {
        int64_t first = t->num_tokens * topk, count;
        r.line++;
        r.column = 0;
        good = read_ids(&r, first, &count) && read_weights(&r, first, count);
        if (good)
            t->num_tokens += count / topk;
    }
    if (good && t->num_tokens == 0) {
        r.line = r.column = 1;
        good = fail(&r, "the trace is empty; it needs at least one token");
    }
    if (!good)
        trace_free(t);
    return good;
}

bool trace_load(const char *path, int topk, int64_t num_experts, trace *t,
                char message[TRACE_MESSAGE_MAX])
{
    size_t size;
    *t = (trace){topk, 0, NULL, NULL};
    char *text = text_file_read(path, &size);
    if (!text) {
        snprintf(message, TRACE_MESSAGE_MAX, "%s", strerror(errno));
        return false;
    }
    bool good = trace_parse(text, size, topk, num_experts, t, message);
    free(text);
    return good;
}

void trace_free(trace *t)
{
    free(t->ids);
    free(t->weights);
    *t = (trace){t->topk, 0, NULL, NULL};
}
