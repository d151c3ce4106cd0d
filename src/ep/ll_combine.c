/* SPDX-License-Identifier: MIT */
/* Low-latency combine: expert outputs stay where they are, the token's owner reads and sums them.
 */
#include "ep/ll.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"
#include "ep/event.h"

#include <stdlib.h>
#include <string.h>

typedef struct ll_combine {
    epi_op op;
    ep_handle *handle; /* held */
    ep_tensor y, topk_idx, topk_weights, out, wait_cost;
    ep_combine_wire wire;
    int32_t *at;        /* [T, K] row of each (token, place) within its expert's; -1 none */
    uint8_t *scratch;   /* [parts, K] decoded rows */
    const void **terms; /* [parts, K] */
    float *weights;     /* [parts, K] */
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
    size_t row = 2 * (size_t)c->handle->hidden;
    c->at = malloc(((size_t)result->num_tokens * topk + 1) * sizeof *c->at);
    c->terms = malloc(parts * topk * sizeof *c->terms);
    c->weights = malloc(parts * topk * sizeof *c->weights);
    if (c->wire == EP_COMBINE_LOGFMT10)
        c->scratch = malloc(parts * topk * row);
    if (!c->at || !c->terms || !c->weights || (c->wire == EP_COMBINE_LOGFMT10 && !c->scratch))
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", op->name);
    if (op->buffer->config.verify)
        EPI_TRY(epi_ll_check_ids(result, op->name, &c->topk_idx));
    result->ll->last_epoch = op->epoch;
    /* What an earlier combine of this result let peers read must have been read. */
    epi_op_await_left(op, EPI_SLOT_LL_Y_READ, slot_of(c)->y_epoch);
    return EP_OK;
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

static ep_status pack(ll_combine *c, size_t stride)
{
    ep_buffer *buffer = c->op.buffer;
    epi_ll_slot *slot = slot_of(c);
    size_t bytes = (size_t)c->handle->ll->packed[c->handle->num_local] * stride;
    if (slot->has_y_block)
        epi_buffer_give(buffer, slot->y_block);
    slot->has_y_block = false;
    EPI_TRY(epi_buffer_take(buffer, bytes, &slot->y_block));
    slot->has_y_block = true;
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
    slot->y_epoch = op->buffer->ll_y = op->epoch;
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
        if (head->y_epoch != c->op.epoch)
            return epi_op_aborted(&c->op, r);
        if (head->y_encoded != encoded)
            return epi_disagree(c->op.name, "wire (ep_combine_wire)", buffer->rank, encoded, r,
                                head->y_encoded);
    }
    return EP_OK;
}

/* Where each of this rank's rows lies within its expert's: after those of lower ranks, in order. */
static ep_status find_rows(ll_combine *c)
{
    const epi_ll_result *result = c->handle->ll;
    const epi_ll *ll = result->ll;
    const bool *masked = c->op.buffer->group->masked;
    int num_ranks = c->op.buffer->num_ranks, me = c->op.buffer->rank;
    int32_t *next = malloc((size_t)ll->shape.num_experts * sizeof *next);
    if (!next)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", c->op.name);
    for (int64_t e = 0; e < ll->shape.num_experts; e++) {
        int rank = ll->experts.rank[e];
        if (masked[rank])
            continue;
        const uint8_t *area = epi_ll_area(ll, result->slot, rank);
        const int32_t *begin = (const int32_t *)(area + epi_ll_layout_at(ll, rank).begin);
        next[e] = begin[ll->experts.local[e] * num_ranks + me];
    }
    for (int64_t i = 0; i < result->num_tokens * result->topk; i++) {
        int32_t id = result->ids[i];
        c->at[i] = -1;
        if (id < 0 || masked[ll->experts.rank[id]])
            continue;
        if (next[id] < ll->shape.expert_rows)
            c->at[i] = next[id]++;
    }
    free(next);
    return EP_OK;
}

static const uint8_t *row_at(const ll_combine *c, int64_t link)
{
    const epi_ll_result *result = c->handle->ll;
    const epi_ll *ll = result->ll;
    int32_t id = result->ids[link];
    int rank = ll->experts.rank[id], local = ll->experts.local[id];
    const uint8_t *area = epi_ll_area(ll, result->slot, rank);
    const epi_ll_head *head = (const epi_ll_head *)area;
    size_t row = (size_t)local * (size_t)ll->shape.expert_rows;
    if (head->y_packed)
        row = (size_t)((const int32_t *)(area + epi_ll_layout_at(ll, rank).packed))[local];
    return c->op.buffer->window->peer[rank] + head->y_base +
           (row + (size_t)c->at[link]) * head->y_stride;
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
            int64_t link = t * (int64_t)topk + (int64_t)k;
            if (c->at[link] < 0)
                continue;
            const uint8_t *row = row_at(c, link);
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
    /* A rank that gave up meanwhile may have reused the memory just read. */
    for (int r = 0; r < op->buffer->num_ranks; r++)
        if (!op->buffer->group->masked[r] && epi_op_gave_up(op->buffer, r, op->epoch))
            return epi_op_aborted(op, r);
    epi_call_notify_all(op, EPI_SLOT_LL_Y_READ);
    return EP_OK;
}

static void finish(epi_op *op, ep_status status)
{
    ll_combine *c = of(op);
    if (status != EP_OK && op->buffer->ll == c->handle->ll->ll)
        epi_ll_drop(op->buffer); /* the next dispatch sets memory up anew, on every rank */
    ep_handle_release(c->handle);
    free(c->at);
    free(c->scratch);
    free(c->terms);
    free(c->weights);
}

static const epi_stage stages[] = {prepare, send_outputs, receive, NULL};
#define EAGER_STAGES 2

/* ------------------------------------------------------------- checks */

static ep_status check_handle(const char *call, const ep_buffer *buffer, const ep_handle *handle)
{
    if (!handle)
        return epi_fail(EP_ERR_ARGUMENT, "%s: handle is NULL", call);
    if (handle->buffer != buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: handle was made by another buffer", call);
    if (!handle->ll)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: handle is of ep_dispatch; it must be of "
                        "ep_ll_dispatch",
                        call);
    if (handle->ll->retired)
        return epi_fail(EP_ERR_STATE, "%s: the result of call %llu was retired, or its call failed",
                        call, (unsigned long long)handle->ll->epoch);
    return EP_OK;
}

static ep_status check_y(const char *call, const ep_tensor *y, const ep_handle *handle)
{
    epi_tensor_rule rule = {.call = call,
                            .argument = "y",
                            .ndim = 3,
                            .rows = handle->num_local,
                            .columns = handle->ll->ll->shape.expert_rows,
                            .dtypes = 1u << EP_BF16,
                            .dtype_names = "BF16"};
    EPI_TRY(epi_tensor_check(y, &rule));
    if (y->shape[2] != handle->hidden)
        return epi_fail(EP_ERR_ARGUMENT, "%s: y.shape[2] is %lld; it must be %lld", call,
                        (long long)y->shape[2], (long long)handle->hidden);
    return EP_OK;
}

static ep_status check_args(const char *call, const ep_buffer *buffer,
                            const ep_ll_combine_args *args)
{
    EPI_TRY(check_handle(call, buffer, args->handle));
    const epi_ll_result *result = args->handle->ll;
    EPI_TRY(check_y(call, &args->y, args->handle));
    epi_tensor_rule rule = {.call = call,
                            .argument = "topk_idx",
                            .ndim = 2,
                            .rows = result->num_tokens,
                            .columns = result->topk,
                            .dtypes = EPI_INDEX_DTYPES,
                            .dtype_names = "I32 or I64"};
    EPI_TRY(epi_tensor_check(&args->topk_idx, &rule));
    rule.argument = "topk_weights";
    rule.dtypes = 1u << EP_F32;
    rule.dtype_names = "F32";
    EPI_TRY(epi_tensor_check(&args->topk_weights, &rule));
    rule.argument = "out";
    rule.columns = args->handle->hidden;
    rule.dtypes = 1u << EP_BF16;
    rule.dtype_names = "BF16";
    EPI_TRY(epi_tensor_check(&args->out, &rule));
    if (args->wire != EP_COMBINE_BF16 && args->wire != EP_COMBINE_LOGFMT10)
        return epi_bad(call, "wire", args->wire, "0 or 1 (ep_combine_wire)");
    if (args->completion != EP_COMPLETE_IN_BACKGROUND && args->completion != EP_COMPLETE_BY_HOOK)
        return epi_bad(call, "completion", args->completion, "0 or 1 (ep_completion)");
    rule = (epi_tensor_rule){.call = call,
                             .argument = "wait_cost",
                             .ndim = 1,
                             .rows = buffer->num_ranks,
                             .columns = -1,
                             .dtypes = 1u << EP_I64,
                             .dtype_names = "I64"};
    return epi_tensor_given(&args->wait_cost) ? epi_tensor_check(&args->wait_cost, &rule) : EP_OK;
}

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
        status = check_args(call, buffer, &args);
    ll_combine *c = status == EP_OK ? calloc(1, sizeof *c) : NULL;
    if (!c) {
        if (status == EP_OK)
            status = epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
        return epi_op_reject(buffer, call, status);
    }
    c->op = (epi_op){.buffer = buffer, .name = call, .stages = stages, .finish = finish};
    c->op.eager = args.completion == EP_COMPLETE_BY_HOOK ? EAGER_STAGES : 0;
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
    EPI_TRY(check_handle(call, buffer, handle));
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
