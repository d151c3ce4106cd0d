/* SPDX-License-Identifier: MIT */
/*
 * The traditional path, emulated on the same ranks: pack rows by destination,
 * exchange counts, exchange rows through a shared staging area, copy them to
 * their place; and back, with a sum at the end. It is a generous emulation: each
 * exchange costs one copy in and one copy out and two barriers, nothing else.
 */
#include "demo.h"

#include "vector.h"

#include <stdlib.h>
#include <string.h>

struct demo_traditional {
    rank_self *self;
    const demo_context *c;
    int32_t *slot;    /* [tokens, ranks] place among the rows for that rank; -1: not sent */
    int64_t *start;   /* [ranks] where the rows for each rank start in the packed buffer */
    int64_t *arrived; /* [ranks + 1] where each rank's rows start among those received */
    uint16_t *packed; /* rows to send, and outputs that came back */
    uint16_t *rows;   /* received */
};

demo_traditional *demo_traditional_create(rank_self *self, const int32_t *ids)
{
    const demo_context *c = self->context;
    size_t ranks = (size_t)self->num_ranks, tokens = (size_t)c->options->tokens;
    size_t bytes = (size_t)c->stage_rows * DEMO_ROW_BF16;
    int64_t local = c->load.num_experts / self->num_ranks;
    demo_traditional *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    *t = (demo_traditional){self,
                            c,
                            malloc(tokens * ranks * sizeof *t->slot),
                            malloc(ranks * sizeof *t->start),
                            malloc((ranks + 1) * sizeof(int64_t)),
                            malloc(bytes),
                            malloc(bytes)};
    if (!t->slot || !t->start || !t->arrived || !t->packed || !t->rows) {
        demo_traditional_free(t);
        return NULL;
    }
    int32_t *counts = c->stage_counts + self->rank * self->num_ranks;
    memset(counts, 0, ranks * sizeof *counts);
    memset(t->slot, 0xff, tokens * ranks * sizeof *t->slot);
    for (size_t i = 0; i < tokens * DEMO_TOPK; i++) {
        size_t to = (size_t)(ids[i] / local);
        int32_t *slot = &t->slot[i / DEMO_TOPK * ranks + to];
        if (*slot < 0)
            *slot = counts[to]++;
    }
    for (size_t r = 0, sum = 0; r < ranks; sum += (size_t)counts[r++])
        t->start[r] = (int64_t)sum;
    return t;
}

void demo_traditional_free(demo_traditional *t)
{
    if (!t)
        return;
    free(t->slot);
    free(t->start);
    free(t->arrived);
    free(t->packed);
    free(t->rows);
    free(t);
}

static uint16_t *stage_of(const demo_traditional *t, int rank)
{
    return t->c->stage + rank * t->c->stage_rows * DEMO_HIDDEN;
}

static int32_t count(const demo_traditional *t, int from, int to)
{
    return t->c->stage_counts[from * t->self->num_ranks + to];
}

static void copy_rows(uint16_t *to, const uint16_t *from, int64_t rows)
{
    memcpy(to, from, (size_t)rows * DEMO_ROW_BF16);
}

ep_status demo_traditional_dispatch(demo_traditional *t, const uint16_t *x, const uint16_t **rows,
                                    int64_t *num_rows)
{
    int me = t->self->rank, n = t->self->num_ranks;
    int64_t sent = t->start[n - 1] + count(t, me, n - 1);
    for (int64_t i = 0; i < t->c->options->tokens; i++) {
        for (int r = 0; r < n; r++) {
            int32_t slot = t->slot[i * n + r];
            if (slot >= 0)
                copy_rows(t->packed + (t->start[r] + slot) * DEMO_HIDDEN, x + i * DEMO_HIDDEN, 1);
        }
    }
    copy_rows(stage_of(t, me), t->packed, sent);
    ep_status status = ep_group_barrier(t->self->group);
    if (status != EP_OK)
        return status;
    t->arrived[0] = 0;
    for (int r = 0; r < n; r++) {
        int64_t start = 0;
        for (int before = 0; before < me; before++)
            start += count(t, r, before);
        copy_rows(t->rows + t->arrived[r] * DEMO_HIDDEN, stage_of(t, r) + start * DEMO_HIDDEN,
                  count(t, r, me));
        t->arrived[r + 1] = t->arrived[r] + count(t, r, me);
    }
    *rows = t->rows;
    *num_rows = t->arrived[n];
    return ep_group_barrier(t->self->group);
}

/* out = sum of the packed rows of a token in ascending rank order. */
WIDEST_VECTORS
static void sum_token(const uint16_t *packed, const int32_t *slot, const int64_t *start,
                      int num_ranks, uint16_t *out)
{
    float sum[DEMO_HIDDEN] = {0};
    for (int r = 0; r < num_ranks; r++) {
        if (slot[r] < 0)
            continue;
        const uint16_t *row = packed + (start[r] + slot[r]) * DEMO_HIDDEN;
        for (int h = 0; h < DEMO_HIDDEN; h++)
            sum[h] += float_from_bf16(row[h]);
    }
    for (int h = 0; h < DEMO_HIDDEN; h++)
        out[h] = bf16_from_float(sum[h]);
}

ep_status demo_traditional_combine(demo_traditional *t, const uint16_t *y, uint16_t *out)
{
    int me = t->self->rank, n = t->self->num_ranks;
    copy_rows(stage_of(t, me), y, t->arrived[n]);
    ep_status status = ep_group_barrier(t->self->group);
    if (status != EP_OK)
        return status;
    for (int r = 0; r < n; r++) {
        int64_t start = 0; /* of this rank's rows among those that rank r received */
        for (int before = 0; before < me; before++)
            start += count(t, before, r);
        copy_rows(t->packed + t->start[r] * DEMO_HIDDEN, stage_of(t, r) + start * DEMO_HIDDEN,
                  count(t, me, r));
    }
    for (int64_t i = 0; i < t->c->options->tokens; i++)
        sum_token(t->packed, t->slot + i * n, t->start, n, out + i * DEMO_HIDDEN);
    return ep_group_barrier(t->self->group);
}
