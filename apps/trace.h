/* SPDX-License-Identifier: MIT */
/*
 * Routing traces: which experts a model's router chose. A text file, one line
 * per sequence: K expert ids per token, all tokens of the line one after the
 * other, tab-separated; an empty column; as many gate weights. -1 means no
 * expert.
 */
#ifndef APPS_TRACE_H
#define APPS_TRACE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define TRACE_MESSAGE_MAX 256

typedef struct trace {
    int topk; /* K */
    int64_t num_tokens;
    int32_t *ids;   /* [num_tokens, K], -1..num_experts-1 */
    float *weights; /* [num_tokens, K] */
} trace;

/*
 * Parses the text of a trace. On failure returns false, leaves `t` empty and
 * says in `message` what was found at which line and column (counted from 1,
 * columns are tab-separated) and what was expected.
 */
bool trace_parse(const char *text, size_t size, int topk, int64_t num_experts, trace *t,
                 char message[TRACE_MESSAGE_MAX]);

/* The same for a file. */
bool trace_load(const char *path, int topk, int64_t num_experts, trace *t,
                char message[TRACE_MESSAGE_MAX]);

void trace_free(trace *t);

#endif
