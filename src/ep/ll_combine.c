/* SPDX-License-Identifier: MIT */
/* Low-latency combine: expert outputs stay where they are, the token's owner reads and sums them.
 */
#include "ep/ll.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"
#include "ep/backend.h"
#include "ep/event.h"

#include <stdlib.h>
#include <string.h>

typedef struct ll_combine {
    epi_op op;
    ep_handle *handle; /* held */
    ep_tensor y, topk_idx, topk_weights, out, wait_cost;
    ep_combine_wire wire;
    const uint8_t **rows; /* [T, K] row of each (token, place); NULL none */
    const void **terms;   /* [parts, K] */
    float *weights;       /* [parts, K] */
    uint8_t *scratch;     /* [parts, K] decoded rows */
} ll_combine;

static ll_combine *of(epi_op *op)
{
    return (ll_combine *)op;
}

static epi_ll_slot *slot_of(const ll_combine *c)
{
    return &c->handle->ll->ll->slot[c->handle->ll->slot];
}

static epi_ll_head *head_of(const ll_combine *c, int rank)
{
    return (epi_ll_head *)epi_ll_area(c->handle->ll->ll, c->handle->ll->slot, rank);
}

/* ------------------------------------------------------------- sending */

static ep_status prepare(epi_op *op)
{
    ll_combine *c = of(op);
    const epi_ll_result *result = c->handle->ll;
    size_t parts = (size_t)epi_team_parts(op->buffer->team), topk = (size_t)result->topk;
    bool encoded = c->wire == EP_COMBINE_LOGFMT10;
    c->rows = malloc(((size_t)result->num_tokens * topk + 1) * sizeof *c->rows);
    c->terms = malloc(parts * topk * sizeof *c->terms);
    c->weights = malloc(parts * topk * sizeof *c->weights);
    if (encoded)
        c->scratch = malloc(parts * topk * 2 * (size_t)c->handle->hidden);
    if (!c->rows || !c->terms || !c->weights || (encoded && !c->scratch))
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", op->name);
    if (op->buffer->config.verify)
        EPI_TRY(epi_ll_check_ids(result, op->name, &c->topk_idx));
    /* What an earlier combine of this result let peers read must have been read. */
    return epi_op_await_done(op, slot_of(c)->y_epoch);
}

static bool in_send_buffer(const ll_combine *c)
{
    const epi_ll_rows *rows = &slot_of(c)->y;
    int64_t hidden = c->handle->hidden, room = c->handle->ll->ll->shape.expert_rows;
    return c->y.data == c->op.buffer->window->base + rows->base && c->y.stride[1] == hidden &&
           (c->y.shape[0] < 2 || c->y.stride[0] == room * hidden);
}

typedef struct packer {
    const ll_combine *c;
    uint8_t *to;
    size_t stride;
    bool streaming;
} packer;

static void pack_part(void *context, int part, int parts)
{
    const packer *p = context;
    const ll_combine *c = p->c;
    const epi_ll_result *result = c->handle->ll;
    const struct epi_codec *codec = epi_codec();
    int num_local = c->handle->num_local;
    int64_t begin, end;
    epi_team_share(result->packed[num_local], part, parts, &begin, &end);
    for (int l = 0; l < num_local; l++)
        for (int32_t i = 0; i < result->count[l]; i++) {
            int64_t at = result->packed[l] + i;
            if (at < begin || at >= end)
                continue;
            const uint16_t *row =
                (const uint16_t *)c->y.data + l * c->y.stride[0] + i * c->y.stride[1];
            uint8_t *to = p->to + (size_t)at * p->stride;
            if (c->wire == EP_COMBINE_LOGFMT10)
                codec->logfmt_encode(row, (size_t)c->handle->hidden, to);
            else
                codec->copy(to, row, p->stride, p->streaming);
        }
    codec->fence();
}

/* Room for packed rows; kept from combine to combine while it suffices. */
static ep_status reserve(ep_buffer *buffer, epi_ll_slot *slot, size_t bytes)
{
    if (slot->has_y_block && bytes <= slot->y_block_bytes)
        return EP_OK;
    if (slot->has_y_block)
        epi_buffer_give(buffer, slot->y_block);
    slot->has_y_block = false;
    EPI_TRY(epi_buffer_take(buffer, bytes, &slot->y_block));
    slot->has_y_block = true;
    slot->y_block_bytes = bytes;
    return EP_OK;
}

static ep_status pack(ll_combine *c, size_t stride)
{
    ep_buffer *buffer = c->op.buffer;
    epi_ll_slot *slot = slot_of(c);
    size_t bytes = (size_t)c->handle->ll->packed[c->handle->num_local] * stride;
    EPI_TRY(reserve(buffer, slot, bytes));
    packer p = {.c = c,
                .to = buffer->window->base + slot->y_block,
                .stride = stride,
                .streaming = bytes > EPI_STREAM_BYTES};
    epi_team_run(buffer->team, pack_part, &p);
    return EP_OK;
}

static ep_status send_outputs(epi_op *op)
{
    ll_combine *c = of(op);
    epi_ll_slot *slot = slot_of(c);
    bool encoded = c->wire == EP_COMBINE_LOGFMT10, packed = encoded || !in_send_buffer(c);
    size_t hidden = (size_t)c->handle->hidden;
    size_t stride = encoded ? epi_logfmt_row_bytes(hidden) : 2 * hidden;
    if (packed)
        EPI_TRY(pack(c, stride));
    epi_ll_head *head = head_of(c, op->buffer->rank);
    head->y_epoch = op->epoch;
    head->y_base = packed ? slot->y_block : slot->y.base;
    head->y_stride = stride;
    head->y_packed = packed;
    head->y_encoded = encoded;
    slot->y_epoch = c->handle->ll->ll->last_epoch = op->epoch;
    op->sent = true;
    epi_call_notify_all(op, EPI_SLOT_LL_Y);
    epi_op_await(op, EPI_SLOT_LL_Y, op->epoch, NULL);
    op->wait.cost = epi_tensor_given(&c->wait_cost) ? c->wait_cost.data : NULL;
    return EP_OK;
}

/* ------------------------------------------------------------- summing */

static ep_status check_heads(ll_combine *c)
{
    const ep_buffer *buffer = c->op.buffer;
    int64_t encoded = c->wire == EP_COMBINE_LOGFMT10;
    for (int r = 0; r < buffer->num_ranks; r++) {
        if (buffer->group->masked[r])
            continue;
        const epi_ll_head *head = head_of(c, r);
        bool same = head->y_epoch == c->op.epoch && head->epoch == c->handle->ll->epoch;
        if (!same && epi_op_gave_up(buffer, r, c->op.epoch))
            return epi_op_aborted(&c->op, r);
        if (!same)
            return epi_fail(EP_ERR_MISMATCH,
                            "%s (call %llu): rank %d combines another result than that of call "
                            "%llu, or has left this rank out",
                            c->op.name, (unsigned long long)c->op.epoch, r,
                            (unsigned long long)c->handle->ll->epoch);
        if (head->y_encoded != encoded)
            return epi_disagree(c->op.name, "wire (ep_combine_wire)", buffer->rank, encoded, r,
                                head->y_encoded);
    }
    return EP_OK;
}

/* Where an expert keeps this rank's rows. */
typedef struct row_cursor {
    const uint8_t *next;
    size_t stride;
    int32_t left; /* rows that the expert has room for; those past it were dropped */
} row_cursor;

static row_cursor cursor_of(const ll_combine *c, int64_t expert)
{
    const epi_ll_result *result = c->handle->ll;
    const epi_ll *ll = result->ll;
    int rank = ll->experts.rank[expert], local = ll->experts.local[expert];
    if (c->op.buffer->group->masked[rank])
        return (row_cursor){0};
    const uint8_t *area = epi_ll_area(ll, result->slot, rank);
    const epi_ll_head *head = (const epi_ll_head *)area;
    epi_ll_layout layout = epi_ll_layout_at(ll, rank);
    int32_t begin =
        ((const int32_t *)(area +
                           layout.begin))[local * c->op.buffer->num_ranks + c->op.buffer->rank];
    int64_t first = head->y_packed ? ((const int32_t *)(area + layout.packed))[local]
                                   : local * ll->shape.expert_rows;
    return (row_cursor){.next = c->op.buffer->window->peer[rank] + head->y_base +
                                (size_t)(first + begin) * head->y_stride,
                        .stride = head->y_stride,
                        .left = (int32_t)ll->shape.expert_rows - begin};
}

/* Rows of a source follow each other in the order of its tokens. */
static ep_status find_rows(ll_combine *c)
{
    const epi_ll_result *result = c->handle->ll;
    int64_t experts = result->ll->shape.num_experts;
    int topk = result->topk;
    row_cursor *cursor = malloc((size_t)experts * sizeof *cursor);
    if (!cursor)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", c->op.name);
    for (int64_t e = 0; e < experts; e++)
        cursor[e] = cursor_of(c, e);
    for (int64_t t = 0; t < result->num_tokens; t++) {
        const int32_t *ids = result->ids + t * topk;
        const uint8_t **rows = c->rows + t * topk;
        for (int k = 0; k < topk; k++) {
            row_cursor *from = ids[k] < 0 ? NULL : &cursor[ids[k]];
            rows[k] = ids[k] < -1 ? rows[-2 - ids[k]] : NULL;
            if (!from || from->left <= 0)
                continue;
            rows[k] = from->next;
            from->next += from->stride;
            from->left--;
        }
    }
    free(cursor);
    return EP_OK;
}

static void sum_part(void *context, int part, int parts)
{
    const ll_combine *c = context;
    const epi_ll_result *result = c->handle->ll;
    const struct epi_codec *codec = epi_codec();
    size_t topk = (size_t)result->topk, hidden = (size_t)c->handle->hidden;
    const void **terms = c->terms + (size_t)part * topk;
    float *weights = c->weights + (size_t)part * topk;
    int64_t begin, end;
    epi_team_share(result->num_tokens, part, parts, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        const float *weight = (const float *)c->topk_weights.data + t * c->topk_weights.stride[0];
        size_t n = 0;
        for (size_t k = 0; k < topk; k++) {
            const uint8_t *row = c->rows[(size_t)t * topk + k];
            if (!row)
                continue;
            if (c->scratch) {
                uint8_t *decoded = c->scratch + ((size_t)part * topk + n) * 2 * hidden;
                codec->logfmt_decode(row, hidden, (uint16_t *)decoded);
                row = decoded;
            }
            weights[n] = weight[k];
            terms[n++] = row;
        }
        codec->reduce(EP_BF16, terms, weights, n, NULL, NULL, hidden,
                      (uint16_t *)c->out.data + t * c->out.stride[0]);
    }
}

static ep_status receive(epi_op *op)
{
    ll_combine *c = of(op);
    EPI_TRY(check_heads(c));
    EPI_TRY(find_rows(c));
    epi_team_run(op->buffer->team, sum_part, c);
    EPI_TRY(epi_op_check_given_up(op));
    return check_heads(c);
}

static void finish(epi_op *op, ep_status status)
{
    ll_combine *c = of(op);
    (void)status;
    ep_handle_release(c->handle);
    free(c->rows);
    free(c->scratch);
    free(c->terms);
    free(c->weights);
}

static const epi_stage stages[] = {
    {prepare, "prepare"}, {send_outputs, "send"}, {receive, "receive"}, {NULL, NULL}};
#define EAGER_STAGES 2

ep_status ep_ll_combine(ep_buffer *buffer, const ep_ll_combine_args *given, ep_event **event)
{
    const char *call = "ep_ll_combine";
    if (event)
        *event = NULL;
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: buffer is NULL", call);
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    ep_status status = epi_args_copy(call, "args", &args, sizeof args, given);
    if (status == EP_OK)
        status = epi_ll_check_combine(buffer, &args);
    if (status == EP_OK && !buffer->backend)
        status = epi_check_no_stream(call, args.stream);
    if (status == EP_OK && buffer->backend)
        return buffer->backend->ll_combine(buffer, &args, event);
    ll_combine *c = status == EP_OK ? calloc(1, sizeof *c) : NULL;
    if (status == EP_OK && !c)
        status = epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    if (status != EP_OK)
        return epi_reject(buffer, call, status);
    c->op = (epi_op){.buffer = buffer, .name = call, .stages = stages, .finish = finish};
    c->op.announces = c->op.no_mail = true;
    c->op.eager = event && args.completion == EP_COMPLETE_BY_HOOK ? EAGER_STAGES : 0;
    c->op.previous = epi_event_hold(args.previous);
    c->handle = epi_handle_hold(args.handle);
    c->y = args.y;
    c->topk_idx = args.topk_idx;
    c->topk_weights = args.topk_weights;
    c->out = args.out;
    c->wait_cost = args.wait_cost;
    c->wire = args.wire;
    return epi_op_submit(&c->op, event);
}

ep_status ep_ll_combine_buffer(ep_buffer *buffer, ep_handle *handle, ep_tensor *y)
{
    const char *call = "ep_ll_combine_buffer";
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: buffer is NULL", call);
    if (!y)
        return epi_fail(EP_ERR_ARGUMENT, "%s: y is NULL", call);
    EPI_TRY(epi_ll_check_handle(call, buffer, handle));
    if (buffer->backend)
        return buffer->backend->ll_combine_buffer(buffer, handle, y);
    epi_ll *ll = handle->ll->ll;
    epi_ll_rows *rows = &ll->slot[handle->ll->slot].y;
    EPI_TRY(epi_ll_back_rows(ll, rows, handle->ll->count));
    ep_tensor tensor = ep_tensor_2d(buffer->window->base + rows->base, EP_BF16, handle->num_local,
                                    ll->shape.expert_rows);
    tensor.ndim = 3;
    tensor.shape[2] = handle->hidden;
    tensor.stride[2] = 1;
    tensor.stride[1] = handle->hidden;
    tensor.stride[0] = ll->shape.expert_rows * handle->hidden;
    *y = tensor;
    return EP_OK;
}
