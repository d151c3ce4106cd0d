/* SPDX-License-Identifier: MIT */
/* The rows that came to a rank, through its experts. */
#include "demo_state.h"

#include <stdlib.h>
#include <string.h>

ep_status demo_no_memory(demo_state *d)
{
    return rank_fail(d->self, EP_ERR_MEMORY, "out of memory");
}

/* The tensors of a result that the host looks at. */
enum { NUM_VIEWED = 6 };

static void viewed(ep_recv *recv, ep_tensor *tensors[NUM_VIEWED])
{
    ep_tensor *all[NUM_VIEWED] = {&recv->x,
                                  &recv->scales,
                                  &recv->topk_idx,
                                  &recv->topk_weights,
                                  &recv->tokens_per_expert,
                                  &recv->source_offset};
    memcpy(tensors, all, sizeof all);
}

ep_status demo_recv_view(demo_state *d)
{
    ep_tensor *tensors[NUM_VIEWED];
    bool good = true;
    d->view = d->recv;
    viewed(&d->view, tensors);
    for (int i = 0; i < NUM_VIEWED; i++)
        good = demo_view(&d->memory, tensors[i]) && good;
    return good ? EP_OK : demo_no_memory(d);
}

void demo_recv_view_end(demo_state *d)
{
    ep_tensor *tensors[NUM_VIEWED];
    viewed(&d->view, tensors);
    for (int i = 0; i < NUM_VIEWED; i++)
        demo_view_end(&d->memory, tensors[i]);
}

/* ----------------------------------------------------------------- experts */

/* Rows of one expert, gathered, and its outputs. */
typedef struct batch {
    demo_expert expert;
    int64_t n;
    int64_t *row; /* [num_rows] where each came from, and with which weight */
    float *weight;
    float *x, *y, *scratch;
    float *sum; /* [num_rows, DEMO_HIDDEN] of all experts of this rank */
} batch;

static void batch_free(batch *b)
{
    demo_expert_free(&b->expert);
    free(b->row);
    free(b->weight);
    free(b->x);
    free(b->y);
    free(b->scratch);
    free(b->sum);
}

static bool batch_alloc(batch *b, int64_t num_rows, int64_t largest)
{
    size_t rows = (size_t)num_rows + 1, most = (size_t)largest + 1;
    memset(b, 0, sizeof *b);
    b->row = malloc(most * sizeof *b->row);
    b->weight = malloc(most * sizeof *b->weight);
    b->x = malloc(most * DEMO_HIDDEN * sizeof *b->x);
    b->y = malloc(most * DEMO_HIDDEN * sizeof *b->y);
    b->scratch = malloc(most * 2 * DEMO_WIDTH * sizeof *b->scratch);
    b->sum = calloc(rows * DEMO_HIDDEN, sizeof *b->sum);
    return demo_expert_alloc(&b->expert) && b->row && b->weight && b->x && b->y && b->scratch &&
           b->sum;
}

/* One received row as float32. */
static void read_row(const demo_state *d, int64_t row, float *x)
{
    if (d->view.x.dtype == EP_BF16) {
        const uint16_t *from = (const uint16_t *)d->view.x.data + row * d->view.x.stride[0];
        for (int h = 0; h < DEMO_HIDDEN; h++)
            x[h] = float_from_bf16(from[h]);
        return;
    }
    const uint8_t *from = (const uint8_t *)d->view.x.data + row * d->view.x.stride[0];
    const float *scales = (const float *)d->view.scales.data + row * d->view.scales.stride[0];
    for (int h = 0; h < DEMO_HIDDEN; h++)
        x[h] = d->e4m3[from[h]] * scales[h / 128 * d->view.scales.stride[1]];
}

static void gather(const demo_state *d, int32_t expert, batch *b)
{
    const int32_t *ids = d->view.topk_idx.data;
    const float *weights = d->view.topk_weights.data;
    b->n = 0;
    for (int64_t i = 0; i < d->num_rows * DEMO_TOPK; i++) {
        if (ids[i] != expert)
            continue;
        b->row[b->n] = i / DEMO_TOPK;
        b->weight[b->n] = weights[i];
        read_row(d, b->row[b->n], b->x + b->n * DEMO_HIDDEN);
        b->n++;
    }
}

static void scatter(batch *b)
{
    for (int64_t i = 0; i < b->n; i++) {
        const float *y = b->y + i * DEMO_HIDDEN;
        float *sum = b->sum + b->row[i] * DEMO_HIDDEN;
        for (int h = 0; h < DEMO_HIDDEN; h++)
            sum[h] += b->weight[i] * y[h];
    }
}

ep_status demo_run_experts(demo_state *d, int wire)
{
    int64_t begin = clock_ns();
    DEMO_TRY(demo_recv_view(d));
    int64_t spent = clock_ns() - begin;
    const int32_t *counts = d->view.tokens_per_expert.data;
    int64_t local = d->c->load.num_experts / d->self->num_ranks, largest = 0;
    demo_rank_result *result = &d->c->results[d->self->rank];
    batch b;
    for (int64_t e = 0; e < local; e++)
        largest = counts[e] > largest ? counts[e] : largest;
    if (!batch_alloc(&b, d->num_rows, largest)) {
        batch_free(&b);
        return demo_no_memory(d);
    }
    result->pairs = 0;
    for (int32_t e = 0; e < local; e++) {
        demo_expert_fill(&d->c->load, d->self->rank * local + e, &b.expert);
        int64_t start = clock_ns();
        gather(d, e, &b);
        demo_expert_apply(&b.expert, b.x, b.n, b.scratch, b.y);
        scatter(&b);
        spent += clock_ns() - start;
        result->pairs += b.n;
        atomic_fetch_add_explicit(d->self->done, 1, memory_order_relaxed);
    }
    int64_t start = clock_ns();
    for (int64_t i = 0; i < d->num_rows * DEMO_HIDDEN; i++)
        d->y_host[i] = bf16_from_float(b.sum[i]);
    ep_status status =
        demo_mirror_put(&d->memory, d->y, d->y_host, (size_t)d->num_rows * DEMO_ROW_BF16);
    spent += clock_ns() - start;
    *demo_span_at(d->c, DEMO_EXPERTS, wire, d->self->rank) = (span){0, spent};
    batch_free(&b);
    return status;
}
