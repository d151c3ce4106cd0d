/* SPDX-License-Identifier: MIT */
/* Dispatch: its stages. The method is in docs/protocol.md. */
#include "ep/dispatch.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"
#include "ep/backend.h"
#include "ep/event.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static epi_dispatch *of(epi_op *op)
{
    return (epi_dispatch *)op;
}

/* ------------------------------------------------------------- stages */

static ep_status no_memory(const epi_op *op)
{
    return epi_fail(EP_ERR_MEMORY, "%s: out of memory", op->name);
}

/* Reads the ids and counts, all of it local. */
static ep_status route(epi_dispatch *d)
{
    ep_buffer *buffer = d->op.buffer;
    ep_handle *handle = d->handle;
    EPI_TRY(epi_experts_init(&d->experts, d->op.name, d->num_experts, d->expert_rank,
                             buffer->num_ranks, buffer->rank));
    handle->num_local = d->experts.num_local;
    d->counts = malloc((size_t)(buffer->num_ranks + d->num_experts) * sizeof(int32_t));
    if (!d->counts)
        return no_memory(&d->op);
    return epi_route(handle, d->op.name, &d->topk_idx, &d->experts, buffer->group->masked,
                     buffer->config.verify, d->counts);
}

/* Combine by expert applies the weights of dispatch unless it is given others. */
static ep_status keep_weights(epi_dispatch *d)
{
    ep_handle *handle = d->handle;
    size_t topk = (size_t)handle->topk;
    if (handle->layout != EP_ROWS_BY_EXPERT || !epi_tensor_given(&d->topk_weights))
        return EP_OK;
    handle->weights = malloc(((size_t)handle->num_tokens * topk + 1) * sizeof(float));
    if (!handle->weights)
        return no_memory(&d->op);
    const float *from = d->topk_weights.data;
    for (int64_t t = 0; t < handle->num_tokens; t++)
        memcpy(handle->weights + (size_t)t * topk, from + t * d->topk_weights.stride[0],
               topk * sizeof(float));
    return EP_OK;
}

static ep_status prepare(epi_op *op)
{
    epi_dispatch *d = of(op);
    size_t ranks = (size_t)op->buffer->num_ranks;
    if (!d->cached) {
        EPI_TRY(route(d));
        EPI_TRY(keep_weights(d));
    }
    d->regions = calloc(ranks, sizeof *d->regions);
    d->bases = calloc(ranks, sizeof *d->bases);
    d->needs_room = calloc(ranks, sizeof *d->needs_room);
    d->scratch_stride = (d->shape.row + d->shape.scales + 63) & ~(size_t)63;
    d->scratch = malloc(d->scratch_stride * (size_t)epi_team_parts(op->buffer->team));
    if (!d->regions || !d->bases || !d->needs_room || !d->scratch)
        return no_memory(op);
    if (epi_tensor_given(&d->y))
        EPI_TRY(epi_expose(op->buffer, &d->y, NULL, 0, 0, &d->exposed));
    /* Mail of the call before last must have been read before it is written over. */
    epi_op_await_entered(op, op->epoch - 1);
    return EP_OK;
}

/* Cached: exactly the rows known. Else the largest gap at hand, trimmed once the counts are in. */
static ep_status offer_region(epi_dispatch *d)
{
    ep_buffer *buffer = d->op.buffer;
    ep_status status;
    pthread_mutex_lock(&buffer->pool_lock);
    if (d->cached) {
        d->offered = epi_region_of(&d->shape, d->handle->rows).bytes;
        status = epi_pool_take(&buffer->pool, d->offered, &d->region);
        d->has_region = status == EP_OK;
    } else {
        status = epi_pool_take_largest(&buffer->pool, &d->region, &d->offered);
        d->has_region = status == EP_OK && d->offered > 0;
    }
    pthread_mutex_unlock(&buffer->pool_lock);
    return status;
}

static ep_status enter(epi_op *op)
{
    epi_dispatch *d = of(op);
    ep_handle *handle = d->handle;
    if (!d->cached) {
        handle->id = op->epoch;
        handle->mask_sum = epi_call_mask_sum(op->buffer);
    }
    EPI_TRY(offer_region(d));
    epi_mail mail = {
        .agreed = {[EPI_AGREED_CALL] = EPI_CALL_DISPATCH,
                   [EPI_AGREED_HIDDEN] = d->x.shape[1],
                   [EPI_AGREED_DTYPE] = d->wire_dtype,
                   [EPI_AGREED_TOPK] = handle->topk,
                   [EPI_AGREED_TOPK_DTYPE] = d->cached ? 0 : d->topk_idx.dtype,
                   [EPI_AGREED_EXPERTS] = handle->num_experts,
                   [EPI_AGREED_TABLE] = d->experts.table_sum,
                   [EPI_AGREED_WEIGHTS] = epi_tensor_given(&d->topk_weights),
                   [EPI_AGREED_SCALE] = d->wire_dtype == EP_E4M3 ? d->scale : 0,
                   [EPI_AGREED_LAYOUT] = handle->layout,
                   [EPI_AGREED_ALIGNMENT] = handle->alignment,
                   [EPI_AGREED_HANDLE] = (int64_t)handle->id,
                   [EPI_AGREED_MASK] = epi_call_mask_sum(op->buffer)},
        .num_tokens = handle->num_tokens,
        .worst = d->num_worst_tokens,
        .base = d->region,
        .capacity = d->offered,
        .rows = d->exposed.place,
    };
    d->entered = true;
    epi_call_enter(op, &mail, d->counts, d->cached ? 0 : op->buffer->num_ranks + d->num_experts);
    return EP_OK;
}

/* Places all rows from the counts that came with the mail. */
static ep_status place(epi_dispatch *d)
{
    int num_ranks = d->op.buffer->num_ranks;
    const int32_t **counts = calloc((size_t)num_ranks, sizeof *counts);
    int64_t *worst = calloc((size_t)num_ranks, sizeof *worst);
    ep_status status = counts && worst ? EP_OK : no_memory(&d->op);
    for (int s = 0; s < num_ranks && status == EP_OK; s++) {
        if (d->op.buffer->group->masked[s])
            continue;
        counts[s] = epi_call_mail(&d->op, s)->counts;
        worst[s] = epi_call_mail(&d->op, s)->mail.worst;
    }
    if (status == EP_OK)
        status = epi_place_rows(d->handle, d->op.name, &d->experts, counts, &d->topk_idx, worst);
    free(counts);
    free(worst);
    return status;
}

/* This rank's offer was too small: finds room, or says on all ranks that there is none. */
static void make_room(epi_dispatch *d, size_t bytes)
{
    ep_buffer *buffer = d->op.buffer;
    epi_room room = {.status = EP_OK};
    pthread_mutex_lock(&buffer->pool_lock);
    if (d->has_region)
        epi_pool_give(&buffer->pool, d->region);
    room.status = epi_pool_take(&buffer->pool, bytes, &d->region);
    pthread_mutex_unlock(&buffer->pool_lock);
    d->has_region = room.status == EP_OK;
    if (d->has_region)
        room.base = d->region;
    else
        snprintf(room.text, sizeof room.text, "%s", ep_last_error());
    for (int peer = 0; peer < buffer->num_ranks; peer++)
        if (!buffer->group->masked[peer])
            epi_buffer_mailbox(buffer, peer, buffer->rank, d->op.epoch)->room = room;
    epi_call_notify_all(&d->op, EPI_SLOT_ROOM);
}

static void keep_region(epi_dispatch *d, size_t bytes)
{
    ep_buffer *buffer = d->op.buffer;
    pthread_mutex_lock(&buffer->pool_lock);
    epi_pool_trim(&buffer->pool, d->region, bytes);
    pthread_mutex_unlock(&buffer->pool_lock);
}

static ep_status plan(epi_op *op)
{
    epi_dispatch *d = of(op);
    ep_buffer *buffer = op->buffer;
    epi_call_settle(op);
    EPI_TRY(epi_call_agree(op));
    if (!d->cached)
        EPI_TRY(place(d));
    for (int r = 0; r < buffer->num_ranks; r++) {
        d->regions[r] = epi_region_of(&d->shape, d->handle->rows_at[r]);
        if (buffer->group->masked[r])
            continue;
        const epi_mail *mail = &epi_call_mail(op, r)->mail;
        d->bases[r] = mail->base;
        d->needs_room[r] = d->regions[r].bytes > mail->capacity;
        d->any_room |= d->needs_room[r];
    }
    if (d->needs_room[buffer->rank])
        make_room(d, d->regions[buffer->rank].bytes);
    else if (d->has_region)
        keep_region(d, d->regions[buffer->rank].bytes);
    EPI_TRY(epi_dispatch_reserve(d));
    if (d->any_room)
        epi_op_await(op, EPI_SLOT_ROOM, op->epoch, d->needs_room);
    return EP_OK;
}

static ep_status send_rows(epi_op *op)
{
    epi_dispatch *d = of(op);
    for (int r = 0; r < op->buffer->num_ranks; r++) {
        if (!d->needs_room[r])
            continue;
        const epi_room *room = &epi_call_mail(op, r)->room;
        if (room->status != EP_OK)
            return epi_fail(EP_ERR_CAPACITY, "%s: rank %d has no room for its %lld rows: %s",
                            op->name, r, (long long)d->handle->rows_at[r], room->text);
        d->bases[r] = room->base;
    }
    epi_dispatch_settle(d);
    EPI_TRY(epi_dispatch_send(d));
    if (epi_tensor_given(&d->grad_topk_weights))
        EPI_TRY(epi_dispatch_weight_gradient(d));
    epi_codec()->fence();
    epi_call_notify_all(op, EPI_SLOT_LEAVE);
    epi_op_await(op, EPI_SLOT_LEAVE, op->epoch, NULL);
    return EP_OK;
}

static ep_status receive(epi_op *op)
{
    return epi_dispatch_receive(of(op));
}

static void finish(epi_op *op, ep_status status)
{
    epi_dispatch *d = of(op);
    ep_buffer *buffer = op->buffer;
    epi_dispatch_let_go(d, status);
    if (d->has_region) {
        pthread_mutex_lock(&buffer->pool_lock);
        if (d->entered && status != EP_OK)
            epi_pool_hold(&buffer->pool, d->region, op->epoch); /* late writers may know it */
        else
            epi_pool_give(&buffer->pool, d->region);
        pthread_mutex_unlock(&buffer->pool_lock);
    }
    epi_dispatch_unreserve(d);
    epi_unexpose(buffer, &d->exposed);
    epi_experts_free(&d->experts);
    ep_handle_release(d->handle);
    free(d->counts);
    free(d->regions);
    free(d->bases);
    free(d->needs_room);
    free(d->scratch);
}

static const epi_stage stages[] = {{prepare, "prepare"}, {enter, "enter"},     {plan, "plan"},
                                   {send_rows, "send"},  {receive, "receive"}, {NULL, NULL}};

/* ------------------------------------------------------------- calls */

static ep_status new_dispatch(ep_buffer *buffer, const char *name, const ep_dispatch_args *args,
                              ep_recv *recv, epi_dispatch **out)
{
    epi_dispatch *d = calloc(1, sizeof *d);
    if (!d)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", name);
    d->op = (epi_op){.buffer = buffer, .name = name, .stages = stages, .finish = finish};
    d->recv = recv;
    d->cached = args->handle != NULL;
    d->handle = d->cached ? epi_handle_hold(args->handle)
                          : epi_handle_new(buffer, args->x.shape[0], (int)args->topk_idx.shape[1]);
    if (!d->handle) {
        free(d);
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", name);
    }
    d->x = args->x;
    d->scales = args->scales;
    d->topk_idx = args->topk_idx;
    d->topk_weights = args->topk_weights;
    d->num_experts = args->num_experts;
    d->expert_rank = args->expert_rank;
    d->wire = args->wire;
    d->scale = args->x.dtype != EP_E4M3           ? args->scale
               : args->scales.dtype == EP_UE8M0X4 ? EP_SCALE_UE8M0
                                                  : EP_SCALE_F32;
    d->num_worst_tokens = args->num_worst_tokens;
    d->wire_dtype = args->wire == EP_WIRE_FP8 ? EP_E4M3 : args->x.dtype;
    if (args->allocator) {
        d->has_allocator = true;
        d->allocator = *args->allocator;
    }
    d->op.previous = epi_event_hold(args->previous);
    *out = d;
    return EP_OK;
}

static void shape_of(epi_dispatch *d, const ep_dispatch_args *args)
{
    ep_handle *handle = d->handle;
    bool by_expert = handle->layout == EP_ROWS_BY_EXPERT;
    d->shape =
        epi_row_shape_of(d->wire_dtype, args->x.shape[1], d->scale, by_expert ? 1 : handle->topk,
                         d->cached ? 0 : ep_dtype_size(args->topk_idx.dtype),
                         epi_tensor_given(&args->topk_weights), d->op.buffer->config.verify);
}

ep_status ep_dispatch(ep_buffer *buffer, const ep_dispatch_args *given, ep_recv *recv,
                      ep_event **event)
{
    const char *call = "ep_dispatch";
    if (event)
        *event = NULL;
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: buffer is NULL", call);
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    epi_dispatch *d;
    ep_status status = epi_args_copy(call, "args", &args, sizeof args, given);
    if (status == EP_OK)
        status = epi_dispatch_check(call, buffer, &args, recv);
    if (status == EP_OK && !buffer->backend)
        status = epi_check_no_stream(call, args.stream);
    if (status == EP_OK && buffer->backend)
        return buffer->backend->dispatch(buffer, &args, recv, event);
    if (status == EP_OK)
        status = new_dispatch(buffer, call, &args, recv, &d);
    if (status != EP_OK)
        return epi_reject(buffer, call, status);
    if (!d->cached) {
        d->handle->num_experts = args.num_experts;
        d->handle->hidden = args.x.shape[1];
        d->handle->layout = args.layout;
        d->handle->alignment = args.expert_alignment;
        d->handle->topk_dtype = args.topk_idx.dtype;
    }
    shape_of(d, &args);
    return epi_op_submit(&d->op, event);
}

ep_status ep_combine_backward(ep_buffer *buffer, const ep_combine_backward_args *given,
                              ep_recv *recv, ep_event **event)
{
    const char *call = "ep_combine_backward";
    if (event)
        *event = NULL;
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: buffer is NULL", call);
    ep_combine_backward_args args = EP_COMBINE_BACKWARD_ARGS_INIT;
    ep_status status = epi_args_copy(call, "args", &args, sizeof args, given);
    if (status == EP_OK && (!recv || recv->size < sizeof recv->size || recv->size > 65536))
        status = epi_fail(EP_ERR_ARGUMENT, "%s: recv is %s", call,
                          recv ? "not sized: start from EP_RECV_INIT" : "NULL");
    if (status == EP_OK)
        status = epi_combine_backward_check(call, buffer, &args);
    if (status == EP_OK && !buffer->backend)
        status = epi_check_no_stream(call, args.stream);
    if (status == EP_OK && buffer->backend)
        return buffer->backend->combine_backward(buffer, &args, recv, event);
    ep_dispatch_args forward = EP_DISPATCH_ARGS_INIT;
    forward.x = args.grad_out;
    forward.handle = args.handle;
    forward.allocator = args.allocator;
    forward.previous = args.previous;
    epi_dispatch *d;
    if (status == EP_OK)
        status = new_dispatch(buffer, call, &forward, recv, &d);
    if (status != EP_OK)
        return epi_reject(buffer, call, status);
    d->weighted = d->handle->layout == EP_ROWS_BY_EXPERT;
    d->topk_weights = args.topk_weights;
    d->y = args.y;
    d->grad_topk_weights = args.grad_topk_weights;
    shape_of(d, &forward);
    return epi_op_submit(&d->op, event);
}
