/* SPDX-License-Identifier: MIT */
/* Combine: summing rows that lie in peers' memory. */
#include "ep/combine.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Rows fetched at a time: enough to pay for the system call, few enough to stay in the cache. */
#define FETCH_BYTES ((size_t)512 << 10)

/* What one part of the team works with. */
typedef struct epi_reduce_part {
    int chunk;              /* tokens at a time */
    uint8_t *scratch;       /* [chunk * K] fetched rows; allocated when first needed */
    uint8_t **local;        /* [chunk * K] where fetched rows go */
    int32_t *rows;          /* [chunk * K] rows to fetch of one source */
    epi_remote_read *reads; /* [chunk * K] */
    const void **pointers;  /* [chunk * K] address of each link's row */
    const void **terms;     /* [K] */
    float *weights;         /* [K] */
    uint8_t *check;         /* [row] verify mode */
    ep_status status;
    char message[EPI_ERROR_MAX];
} epi_reduce_part;

static size_t row_bytes(const epi_combine *c)
{
    return (size_t)c->y.shape[1] * ep_dtype_size(c->y.dtype);
}

void epi_combine_free_parts(epi_combine *c)
{
    int parts = epi_team_parts(c->op.buffer->team);
    for (int i = 0; c->parts && i < parts; i++) {
        epi_reduce_part *part = &c->parts[i];
        free(part->scratch);
        free(part->local);
        free(part->rows);
        free(part->reads);
        free(part->pointers);
        free(part->terms);
        free(part->weights);
        free(part->check);
    }
    free(c->parts);
    c->parts = NULL;
}

ep_status epi_combine_new_parts(epi_combine *c)
{
    int parts = epi_team_parts(c->op.buffer->team);
    size_t topk = (size_t)c->handle->topk, chunk = FETCH_BYTES / (topk * row_bytes(c));
    chunk = chunk < 1 ? 1 : chunk > 64 ? 64 : chunk;
    size_t links = chunk * topk;
    bool failed = !(c->parts = calloc((size_t)parts, sizeof *c->parts));
    for (int i = 0; !failed && i < parts; i++) {
        epi_reduce_part *part = &c->parts[i];
        part->chunk = (int)chunk;
        failed |= !(part->local = malloc(links * sizeof *part->local));
        failed |= !(part->rows = malloc(links * sizeof *part->rows));
        failed |= !(part->reads = malloc(links * sizeof *part->reads));
        failed |= !(part->pointers = malloc(links * sizeof *part->pointers));
        failed |= !(part->terms = malloc(topk * sizeof *part->terms));
        failed |= !(part->weights = malloc(topk * sizeof *part->weights));
        if (c->op.buffer->config.verify)
            failed |= !(part->check = malloc(row_bytes(c)));
    }
    return failed ? epi_fail(EP_ERR_MEMORY, "%s: out of memory", c->op.name) : EP_OK;
}

/* ------------------------------------------------------------- finding rows */

static ep_status fetch_from(const epi_combine *c, epi_reduce_part *part, int source, int64_t first,
                            int64_t links)
{
    const ep_handle *handle = c->handle;
    size_t bytes = row_bytes(c);
    int count = 0;
    for (int64_t i = 0; i < links; i++) {
        if (handle->send_rank[first + i] != source)
            continue;
        part->rows[count] = handle->send_row[first + i];
        part->local[count] = part->scratch + (size_t)i * bytes;
        part->pointers[i] = part->local[count++];
    }
    return count ? epi_reader_fetch(&c->op, source, part->rows, count, part->local, bytes,
                                    part->reads)
                 : EP_OK;
}

/* Points at the rows of a chunk's links, having fetched those that cannot be addressed. */
static ep_status find_rows(const epi_combine *c, epi_reduce_part *part, int64_t first,
                           int64_t links)
{
    const ep_handle *handle = c->handle;
    for (int source = 0; source < handle->num_ranks; source++) {
        if (c->op.buffer->group->masked[source])
            continue;
        if (epi_reader_must_fetch(&c->op, source)) {
            if (!part->scratch)
                part->scratch = malloc((size_t)part->chunk * (size_t)handle->topk * row_bytes(c));
            if (!part->scratch)
                return epi_fail(EP_ERR_MEMORY, "%s: out of memory", c->op.name);
            EPI_TRY(fetch_from(c, part, source, first, links));
            continue;
        }
        for (int64_t i = 0; i < links; i++)
            if (handle->send_rank[first + i] == source)
                part->pointers[i] =
                    epi_reader_row(&c->op, &c->exposed, source, handle->send_row[first + i]);
    }
    return EP_OK;
}

/* ------------------------------------------------------------- verify */

static ep_status verify_row(const epi_combine *c, int64_t link, const void *row)
{
    int source = c->handle->send_rank[link];
    int32_t at = c->handle->send_row[link];
    const epi_rows_place *place = &epi_call_mail(&c->op, source)->mail.rows;
    const uint64_t *sums = (const uint64_t *)(c->op.buffer->window->peer[source] + place->sums);
    if (epi_checksum(row, row_bytes(c)) == sums[at])
        return EP_OK;
    return epi_fail(EP_ERR_CORRUPT,
                    "%s (call %llu): row %d of rank %d, for token %lld, does not match its "
                    "checksum",
                    c->op.name, (unsigned long long)c->op.epoch, (int)at, source,
                    (long long)(link / c->handle->topk));
}

/* Sums a token again by the scalar reference. */
static ep_status verify_sum(const epi_combine *c, epi_reduce_part *part, int64_t token, size_t n,
                            const float *weights, const void *const *bias, const void *out)
{
    const struct epi_codec *scalar = epi_codec_of(EPI_ISA_SCALAR);
    scalar->reduce(c->y.dtype, part->terms, weights, n, bias[0], bias[1], (size_t)c->y.shape[1],
                   part->check);
    if (memcmp(part->check, out, row_bytes(c)) == 0)
        return EP_OK;
    return epi_fail(EP_ERR_CORRUPT,
                    "%s (call %llu): the sum of token %lld differs from the reference", c->op.name,
                    (unsigned long long)c->op.epoch, (long long)token);
}

/* ------------------------------------------------------------- summing */

static uint8_t *row_of(const ep_tensor *tensor, int64_t row)
{
    return (uint8_t *)tensor->data +
           (size_t)(row * tensor->stride[0]) * ep_dtype_size(tensor->dtype);
}

static float weight_of(const epi_combine *c, int64_t token, int k)
{
    if (c->topk_weights.data)
        return ((const float *)row_of(&c->topk_weights, token))[k];
    return c->handle->weights ? c->handle->weights[token * c->handle->topk + k] : 1;
}

/* Whether a link has no row: its token went nowhere, or to a rank that is left out by now. */
static bool has_no_row(const epi_combine *c, int64_t link)
{
    int32_t rank = c->handle->send_rank[link];
    return rank < 0 || c->op.buffer->group->masked[rank];
}

static ep_status sum_token(const epi_combine *c, epi_reduce_part *part, int64_t token,
                           const void *const *rows)
{
    int topk = c->handle->topk;
    bool verify = c->op.buffer->config.verify;
    size_t n = 0;
    for (int k = 0; k < topk; k++) {
        if (has_no_row(c, token * topk + k))
            continue;
        if (verify)
            EPI_TRY(verify_row(c, token * topk + k, rows[k]));
        if (c->weighted)
            part->weights[n] = weight_of(c, token, k);
        part->terms[n++] = rows[k];
    }
    const float *weights = c->weighted ? part->weights : NULL;
    const void *bias[2];
    for (int i = 0; i < 2; i++)
        bias[i] = epi_tensor_given(&c->bias[i]) ? row_of(&c->bias[i], token) : NULL;
    uint8_t *out = row_of(&c->out, token);
    epi_codec()->reduce(c->y.dtype, part->terms, weights, n, bias[0], bias[1],
                        (size_t)c->y.shape[1], out);
    return verify ? verify_sum(c, part, token, n, weights, bias, out) : EP_OK;
}

/* Weights brought along: by token summed over ranks, by expert each from its own row. */
static void bring_weights(const epi_combine *c, int64_t token)
{
    const ep_handle *handle = c->handle;
    int topk = handle->topk;
    bool by_expert = handle->layout == EP_ROWS_BY_EXPERT;
    float *out = (float *)row_of(&c->out_weights, token);
    for (int k = 0; k < topk; k++)
        out[k] = 0;
    for (int i = 0; i < topk; i++) {
        int64_t link = token * topk + i;
        int source = handle->send_rank[link];
        if (has_no_row(c, link))
            continue;
        const epi_rows_place *place = &epi_call_mail(&c->op, source)->mail.rows;
        const float *from = (const float *)(c->op.buffer->window->peer[source] + place->weights);
        if (by_expert) {
            out[i] = from[handle->send_row[link]];
            continue;
        }
        from += (int64_t)handle->send_row[link] * topk;
        for (int k = 0; k < topk; k++)
            out[k] += from[k];
    }
}

static ep_status reduce_tokens(const epi_combine *c, epi_reduce_part *part, int64_t begin,
                               int64_t end)
{
    int topk = c->handle->topk;
    for (int64_t t = begin; t < end; t += part->chunk) {
        int64_t count = end - t < part->chunk ? end - t : part->chunk;
        EPI_TRY(find_rows(c, part, t * topk, count * topk));
        for (int64_t i = 0; i < count; i++) {
            EPI_TRY(sum_token(c, part, t + i, part->pointers + i * topk));
            if (epi_tensor_given(&c->out_weights))
                bring_weights(c, t + i);
        }
    }
    return EP_OK;
}

static void reduce_part(void *context, int index, int parts)
{
    epi_combine *c = context;
    epi_reduce_part *part = &c->parts[index];
    int64_t begin, end;
    epi_team_share(c->handle->num_tokens, index, parts, &begin, &end);
    part->status = reduce_tokens(c, part, begin, end);
    /* The message belongs to this thread; the call reports from its own. */
    if (part->status != EP_OK)
        snprintf(part->message, sizeof part->message, "%s", ep_last_error());
}

ep_status epi_combine_reduce(epi_combine *c)
{
    int parts = epi_team_parts(c->op.buffer->team);
    epi_team_run(c->op.buffer->team, reduce_part, c);
    for (int i = 0; i < parts; i++)
        if (c->parts[i].status != EP_OK)
            return epi_fail(c->parts[i].status, "%s", c->parts[i].message);
    return EP_OK;
}
