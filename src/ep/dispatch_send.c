/* SPDX-License-Identifier: MIT */
/* Dispatch: moving rows, each written once to where it stays. */
#include "ep/dispatch.h"

#include "base/error.h"
#include "codec/checksum.h"
#include "codec/rows.h"

#include <string.h>

typedef struct sender {
    epi_dispatch *d;
    const struct epi_codec *codec;
    bool streaming;
} sender;

uint64_t epi_row_sum(const void *row, size_t row_bytes, const void *scales, size_t scale_bytes,
                     int32_t token)
{
    uint64_t of_scales = scale_bytes ? epi_checksum(scales, scale_bytes) : 0;
    return epi_checksum_of_row(epi_checksum(row, row_bytes), of_scales, token);
}

/* Scales of a given FP8 row, gathered from whatever strides they have. */
static void gather_scales(const epi_dispatch *d, int64_t token, uint8_t *out)
{
    const ep_tensor *scales = &d->scales;
    const uint8_t *from = scales->data;
    int64_t at = token * scales->stride[0];
    for (int64_t i = 0; i < scales->shape[1]; i++, at += scales->stride[1])
        memcpy(out + i * 4, from + at * 4, 4);
}

/* What travels beside a row: its local expert ids, weights and token. */
static void write_ids(const epi_dispatch *d, int64_t token, int place, int rank, uint8_t *ids,
                      float *weights)
{
    bool by_expert = d->handle->layout == EP_ROWS_BY_EXPERT, wide = d->topk_idx.dtype == EP_I64;
    int first = by_expert ? place : 0, count = by_expert ? 1 : d->handle->topk;
    const float *from = d->topk_weights.data;
    if (from)
        from += token * d->topk_weights.stride[0];
    for (int i = 0; i < count; i++) {
        int64_t id = epi_topk_at(&d->topk_idx, token, first + i);
        bool here = id >= 0 && d->experts.rank[id] == rank;
        int32_t local = here ? d->experts.local[id] : -1;
        if (wide)
            ((int64_t *)ids)[i] = local;
        else
            ((int32_t *)ids)[i] = local;
        if (d->shape.weights)
            weights[i] = here ? from[first + i] : 0;
    }
}

typedef struct row_source {
    const uint8_t *row, *scales;
    uint64_t sum;
} row_source;

/* The row as it goes on the wire; quantised to `scratch` once for all its receivers. */
static row_source wire_row(const sender *s, int64_t token, uint8_t *scratch)
{
    const epi_dispatch *d = s->d;
    const ep_tensor *x = &d->x;
    const uint8_t *row =
        (const uint8_t *)x->data + (size_t)(token * x->stride[0]) * ep_dtype_size(x->dtype);
    row_source out = {.row = row};
    if (d->shape.scales)
        out.scales = scratch + d->shape.row;
    if (d->wire == EP_WIRE_FP8) {
        s->codec->quantise(row, x->dtype, (size_t)x->shape[1], d->scale, scratch,
                           scratch + d->shape.row, false);
        out.row = scratch;
    } else if (d->shape.scales) {
        gather_scales(d, token, scratch + d->shape.row);
    }
    if (d->shape.sum)
        out.sum = epi_row_sum(out.row, d->shape.row, out.scales, d->shape.scales, (int32_t)token);
    return out;
}

static float weight_of(const epi_dispatch *d, int64_t token, int k)
{
    if (d->topk_weights.data)
        return ((const float *)d->topk_weights.data)[token * d->topk_weights.stride[0] + k];
    return d->handle->weights ? d->handle->weights[token * d->handle->topk + k] : 1;
}

/* Backward of combine by expert: the row is scaled straight into its place. */
static void put_scaled(const sender *s, int64_t token, int place, const uint8_t *row, uint8_t *to,
                       uint64_t *sum)
{
    const epi_dispatch *d = s->d;
    s->codec->scale(d->x.dtype, row, weight_of(d, token, place), (size_t)d->x.shape[1], to);
    if (d->shape.sum)
        *sum = epi_row_sum(to, d->shape.row, NULL, 0, (int32_t)token);
}

static void put_row(const sender *s, int64_t token, int place, row_source from)
{
    const epi_dispatch *d = s->d;
    int64_t link = token * d->handle->topk + place;
    int rank = d->handle->send_rank[link];
    size_t row = (size_t)d->handle->send_row[link];
    const epi_region *region = &d->regions[rank];
    uint8_t *base = d->op.buffer->window->peer[rank] + d->bases[rank];
    uint8_t *to = base + region->x + row * d->shape.row;
    if (d->weighted)
        put_scaled(s, token, place, from.row, to, &from.sum);
    else
        s->codec->copy(to, from.row, d->shape.row, s->streaming);
    if (d->shape.scales)
        memcpy(base + region->scales + row * d->shape.scales, from.scales, d->shape.scales);
    if (d->shape.ids)
        write_ids(d, token, place, rank, base + region->ids + row * d->shape.ids,
                  (float *)(base + region->weights + row * d->shape.weights));
    ((int32_t *)(base + region->source))[row] = (int32_t)token;
    if (d->shape.sum)
        ((uint64_t *)(base + region->sums))[row] = from.sum;
}

static void send_part(void *context, int part, int parts)
{
    const sender *s = context;
    epi_dispatch *d = s->d;
    int topk = d->handle->topk;
    bool by_token = d->handle->layout == EP_ROWS_BY_TOKEN;
    uint8_t *scratch = d->scratch + (size_t)part * d->scratch_stride;
    int64_t begin, end;
    epi_team_share(d->handle->num_tokens, part, parts, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        const int32_t *ranks = d->handle->send_rank + t * topk;
        row_source row;
        bool ready = false;
        for (int k = 0; k < topk; k++) {
            if (ranks[k] < 0) {
                if (by_token)
                    break;
                continue;
            }
            if (!ready)
                row = wire_row(s, t, scratch);
            ready = true;
            put_row(s, t, k, row);
        }
    }
    s->codec->fence(); /* streaming stores must be out before this rank's notification */
}

ep_status epi_dispatch_send(epi_dispatch *d)
{
    int64_t rows = 0;
    for (int r = 0; r < d->op.buffer->num_ranks; r++)
        rows += d->handle->rows_between[d->op.buffer->rank * d->op.buffer->num_ranks + r];
    sender s = {
        .d = d, .codec = epi_codec(), .streaming = (size_t)rows * d->shape.row > EPI_STREAM_BYTES};
    epi_team_run(d->op.buffer->team, send_part, &s);
    return EP_OK;
}
