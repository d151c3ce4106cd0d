/* SPDX-License-Identifier: MIT */
#include "check_ll.h"

#include "check_scratch.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>

#define TOLERANCE 1e-5 /* of the relative squared difference, for BF16 outputs */

/* Where the next row of each local expert is expected. */
typedef struct cursor {
    int64_t local; /* experts of this rank */
    int64_t *next; /* [local] */
} cursor;

static bool wrong(int64_t expert, int64_t row, const char *what, char *message)
{
    return check_fail(message, "dispatch: expert %" PRId64 ", row %" PRId64 ": %s differs", expert,
                      row, what);
}

static bool check_row(const workload *w, bool fp8, const check_scratch *s, const ep_ll_recv *recv,
                      int64_t expert, int64_t row, char *message)
{
    size_t hidden = (size_t)w->hidden;
    const char *got = (const char *)recv->x.data +
                      (size_t)(expert * recv->x.stride[0] + row * recv->x.stride[1]) *
                          ep_dtype_size(recv->x.dtype);
    if (!fp8)
        return memcmp(got, s->row, hidden * 2) == 0 || wrong(expert, row, "value", message);
    if (memcmp(got, s->codes, hidden) != 0)
        return wrong(expert, row, "E4M3 code", message);
    const float *scales = (const float *)recv->scales.data + expert * recv->scales.stride[0] +
                          row * recv->scales.stride[1];
    for (size_t block = 0; block < (hidden + 127) / 128; block++) {
        if (scales[block * (size_t)recv->scales.stride[2]] != s->scales[block])
            return wrong(expert, row, "scale", message);
    }
    return true;
}

/* All rows of one token that are for this rank's experts. */
static bool check_token(const workload *w, int rank, bool fp8, check_scratch *s,
                        const ep_ll_recv *recv, cursor *c, int64_t token, char *message)
{
    const int32_t *counts = recv->count.data, *tokens = recv->source_token.data;
    for (int k = 0; k < w->topk; k++) {
        int64_t expert = s->ids[token * w->topk + k] - rank * c->local;
        if (s->ids[token * w->topk + k] < 0 || expert < 0 || expert >= c->local)
            continue;
        int64_t row = c->next[expert]++;
        if (row >= counts[expert])
            return wrong(expert, row, "count", message);
        if (tokens[expert * recv->source_token.stride[0] + row] != token)
            return wrong(expert, row, "source token", message);
        if (!check_row(w, fp8, s, recv, expert, row, message))
            return false;
    }
    return true;
}

static bool check_ranges(const workload *w, const ep_ll_recv *recv, const cursor *c,
                         const int64_t *before, int source, char *message)
{
    const int64_t *ranges = recv->source_range.data;
    for (int64_t e = 0; e < c->local; e++) {
        int64_t rows = c->next[e] - before[e], range = ranges[e * w->num_ranks + source];
        if ((range & 0xffffffff) != rows || (rows > 0 && range >> 32 != before[e]))
            return wrong(e, before[e], "source range", message);
    }
    return true;
}

static bool check_all(const workload *w, int rank, bool fp8, const ep_ll_recv *recv,
                      check_scratch *s, cursor *c, int64_t *before, char *message)
{
    const int32_t *counts = recv->count.data;
    for (int source = 0; source < w->num_ranks; source++) {
        if (!workload_routing(w, source, s->ids, s->weights))
            return check_fail(message, "no memory for the reference");
        memcpy(before, c->next, (size_t)c->local * sizeof *before);
        for (int64_t t = 0; t < w->num_tokens; t++) {
            workload_row(w, source, t, s->row);
            if (fp8)
                check_quantise(s->row, w->hidden, s->codes, s->scales);
            if (!check_token(w, rank, fp8, s, recv, c, t, message))
                return false;
        }
        if (!check_ranges(w, recv, c, before, source, message))
            return false;
    }
    for (int64_t e = 0; e < c->local; e++) {
        if (c->next[e] != counts[e])
            return wrong(e, c->next[e], "count", message);
    }
    return true;
}

bool check_ll_dispatch(const workload *w, int rank, bool fp8, const ep_ll_recv *recv,
                       char message[CHECK_MESSAGE_MAX])
{
    check_scratch s = {0};
    cursor c = {.local = w->num_experts / w->num_ranks};
    c.next = calloc((size_t)c.local, sizeof *c.next);
    int64_t *before = calloc((size_t)c.local, sizeof *before);
    message[0] = 0;
    bool good = c.next && before ? check_scratch_alloc(w, &s, message)
                                 : check_fail(message, "no memory for the reference");
    good = good && check_all(w, rank, fp8, recv, &s, &c, before, message);
    check_scratch_free(&s);
    free(c.next);
    free(before);
    return good;
}

/* ---------------------------------------------------------------- combine */

static void sum_outputs(const workload *w, const int32_t *ids, const float *weights,
                        check_scratch *s)
{
    for (int64_t h = 0; h < w->hidden; h++)
        s->sum[h] = 0, s->exact[h] = 0;
    for (int k = 0; k < w->topk; k++) {
        if (ids[k] < 0)
            continue;
        float factor = check_ll_factor(ids[k]);
        for (int64_t h = 0; h < w->hidden; h++) {
            float y = float_from_bf16(bf16_from_float(factor * s->value[h]));
            s->sum[h] = fmaf(weights[k], y, s->sum[h]);
            s->exact[h] += (double)weights[k] * y;
        }
    }
}

bool check_ll_combine(const workload *w, int rank, bool fp8, const uint16_t *out,
                      char message[CHECK_MESSAGE_MAX])
{
    check_scratch s = {0};
    check_difference d = {0, 0};
    message[0] = 0;
    bool good = check_scratch_alloc(w, &s, message);
    if (good && !workload_routing(w, rank, s.ids, s.weights))
        good = check_fail(message, "no memory for the reference");
    for (int64_t t = 0; good && t < w->num_tokens; t++) {
        check_expert_input(w, rank, t, fp8, &s);
        sum_outputs(w, s.ids + t * w->topk, s.weights + t * w->topk, &s);
        good = check_output(w, t, out + t * w->hidden, &s, &d, message);
    }
    good = good && check_difference_below(&d, TOLERANCE, message);
    check_scratch_free(&s);
    return good;
}
