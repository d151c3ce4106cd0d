/* SPDX-License-Identifier: MIT */
/* Low-latency dispatch: stages. The method is in docs/protocol.md. */
#include "ep/ll_dispatch.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"
#include "ep/backend.h"
#include "ep/event.h"

#include <stdlib.h>
#include <string.h>

static epi_ll_dispatch *of(epi_op *op)
{
    return (epi_ll_dispatch *)op;
}

/* ------------------------------------------------------------- memory of the shape */

static void set_agreed(epi_ll_dispatch *d)
{
    const epi_ll_shape *shape = &d->shape;
    const int64_t agreed[EPI_NUM_AGREED] = {
        [EPI_AGREED_CALL] = EPI_CALL_LL_SETUP,
        [EPI_AGREED_HIDDEN] = shape->hidden,
        [EPI_AGREED_DTYPE] = shape->wire,
        [EPI_AGREED_TOPK] = shape->topk,
        [EPI_AGREED_EXPERTS] = shape->num_experts,
        [EPI_AGREED_TABLE] = shape->table_sum,
        [EPI_AGREED_SCALE] = shape->scale,
        [EPI_AGREED_MASK] = shape->mask_sum,
        [EPI_AGREED_MAX_TOKENS] = shape->max_tokens,
        [EPI_AGREED_EXPERT_ROWS] = shape->expert_rows,
        [EPI_AGREED_OVERFLOW] = shape->overflow,
    };
    memcpy(d->agreed, agreed, sizeof agreed);
    d->op.agreed = d->agreed;
}

/* A result in the way of this one. */
static ep_status check_live(const epi_ll_dispatch *d)
{
    ep_buffer *buffer = d->op.buffer;
    uint64_t live[2] = {atomic_load(&buffer->ll_live[0]), atomic_load(&buffer->ll_live[1])};
    if (live[0] && live[1])
        return epi_fail(EP_ERR_STATE,
                        "%s: two results are alive (of calls %llu and %llu); release one with "
                        "ep_ll_recv_release first",
                        d->op.name, (unsigned long long)(live[0] < live[1] ? live[0] : live[1]),
                        (unsigned long long)(live[0] < live[1] ? live[1] : live[0]));
    if (d->setup)
        return EP_OK;
    const epi_ll_slot *next = &d->ll->slot[epi_ll_next_slot(d->ll)];
    if (atomic_load(&next->in_use))
        return epi_fail(EP_ERR_STATE,
                        "%s: the result of call %llu is alive, whose memory this call needs; "
                        "release it with ep_ll_recv_release first",
                        d->op.name, (unsigned long long)next->epoch);
    return EP_OK;
}

/* Decides whether the memory there is will do. Ranks come to the same answer: all see the same
   change of shape, and after a call that failed late all have dropped their memory. */
static ep_status compare(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    ep_buffer *buffer = op->buffer;
    d->shape.mask_sum = epi_call_mask_sum(buffer);
    set_agreed(d);
    d->ll = epi_ll_current(buffer);
    d->setup = !d->ll || memcmp(&d->ll->shape, &d->shape, sizeof d->shape) != 0;
    op->no_mail = !d->setup;
    EPI_TRY(check_live(d));
    if (!d->setup)
        return EP_OK;
    uint64_t last = epi_ll_last_old(buffer);
    if (d->ll && d->ll->last_epoch > last)
        last = d->ll->last_epoch;
    return epi_op_await_done(op, last);
}

/* Replaces the memory. */
static ep_status prepare(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    ep_buffer *buffer = op->buffer;
    if (d->setup) {
        epi_ll_drop(buffer);
        epi_ll_release(d->ll);
        d->ll = NULL;
        epi_ll_reclaim(buffer);
        EPI_TRY(epi_ll_new(buffer, op->name, &d->shape, d->expert_rank, &d->ll));
        epi_ll_hold(d->ll);
        epi_ll_replace(buffer, d->ll);
        epi_op_await_entered(op, op->epoch - 1);
    }
    d->turn = epi_ll_take_turn(d->ll);
    d->slot = (int)((d->turn - 1) & 1);
    return EP_OK;
}

static ep_status enter(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    if (!d->setup)
        return EP_OK;
    epi_mail mail = {.base = d->ll->slot[0].area, .capacity = d->ll->slot[1].area};
    memcpy(mail.agreed, d->agreed, sizeof mail.agreed);
    epi_call_enter(op, &mail, NULL, 0);
    return EP_OK;
}

static ep_status agree(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    epi_ll_slot *slot = &d->ll->slot[d->slot];
    if (d->setup) {
        epi_call_settle(op);
        EPI_TRY(epi_call_agree(op));
        for (int r = 0; r < op->buffer->num_ranks; r++) {
            if (op->buffer->group->masked[r])
                continue;
            d->ll->slot[0].peer_area[r] = epi_call_mail(op, r)->mail.base;
            d->ll->slot[1].peer_area[r] = epi_call_mail(op, r)->mail.capacity;
        }
    }
    return epi_op_await_done(op, slot->epoch > slot->y_epoch ? slot->epoch : slot->y_epoch);
}

/* ------------------------------------------------------------- sending */

static void put_part(void *context, int part, int parts)
{
    epi_ll_dispatch *d = context;
    const epi_ll *ll = d->ll;
    const struct epi_codec *codec = epi_codec();
    epi_ll_layout layout = epi_ll_layout_at(ll, d->op.buffer->rank);
    uint8_t *area = epi_ll_area(ll, d->slot, d->op.buffer->rank);
    int64_t begin, end;
    epi_team_share(d->x.shape[0], part, parts, &begin, &end);
    for (int64_t t = begin; t < end; t++) {
        const uint16_t *from = (const uint16_t *)d->x.data + t * d->x.stride[0];
        uint8_t *row = area + layout.rows + (size_t)t * ll->row_bytes;
        uint8_t *scales = area + layout.scales + (size_t)t * ll->scale_bytes;
        if (ll->shape.wire == EP_E4M3)
            codec->quantise(from, EP_BF16, (size_t)ll->shape.hidden, (ep_scale)ll->shape.scale, row,
                            scales, false);
        else
            codec->copy(row, from, ll->row_bytes, false);
        if (d->op.buffer->config.verify)
            ((uint64_t *)(area + layout.sums))[t] =
                epi_row_sum(row, ll->row_bytes, scales, ll->scale_bytes, (int32_t)t);
    }
}

/* The result to be, which has the slot from now on. */
static ep_status new_result(epi_ll_dispatch *d)
{
    ep_buffer *buffer = d->op.buffer;
    ep_handle *handle = d->handle = epi_handle_new_bare(buffer);
    if (!handle)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", d->op.name);
    EPI_TRY(epi_ll_result_new(d->ll, d->slot, d->op.epoch, d->x.shape[0], &handle->ll));
    handle->ll->scales_by_column = d->scales_by_column;
    handle->id = d->op.epoch;
    handle->topk = d->shape.topk;
    handle->num_tokens = d->x.shape[0];
    handle->hidden = d->shape.hidden;
    handle->num_experts = d->shape.num_experts;
    handle->num_local = d->ll->experts.num_local;
    atomic_store(&buffer->ll_live[atomic_load(&buffer->ll_live[0]) != 0], d->op.epoch);
    atomic_store(&d->ll->slot[d->slot].in_use, true);
    return EP_OK;
}

static ep_status send_tokens(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    epi_ll *ll = d->ll;
    uint8_t *area = epi_ll_area(ll, d->slot, op->buffer->rank);
    epi_ll_layout layout = epi_ll_layout_at(ll, op->buffer->rank);
    size_t ids = (size_t)(d->x.shape[0] * ll->shape.topk) * sizeof(int32_t);
    EPI_TRY(new_result(d));
    EPI_TRY(epi_ll_read_ids(ll, op->name, &d->topk_idx, epi_ll_result_of(d)->ids));
    if (ids)
        memcpy(area + layout.ids, epi_ll_result_of(d)->ids, ids);
    epi_team_run(op->buffer->team, put_part, d);
    epi_ll_head *head = (epi_ll_head *)area;
    head->epoch = op->epoch;
    head->num_tokens = d->x.shape[0];
    ll->slot[d->slot].epoch = ll->last_epoch = op->epoch;
    op->sent = true;
    if (op->eager) /* the caller looks at the result's places before the hook */
        epi_ll_describe(d);
    epi_call_notify_all(op, EPI_SLOT_LL_SENT);
    epi_op_await(op, EPI_SLOT_LL_SENT, op->epoch, NULL);
    op->wait.cost = epi_tensor_given(&d->wait_cost) ? d->wait_cost.data : NULL;
    return EP_OK;
}

static ep_status receive(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    EPI_TRY(epi_ll_receive(d));
    if (!op->eager)
        epi_ll_describe(d);
    return EP_OK;
}

/* ------------------------------------------------------------- end */

/* After a failure: memory of which ranks may disagree on whose turn it is, or that not all have set
   up, is dropped, on every rank alike. */
static void settle_memory(epi_ll_dispatch *d)
{
    bool nobody_completed = d->op.failed_early && !d->setup;
    epi_ll_end_turn(d->ll, d->turn, nobody_completed);
}

static void finish(epi_op *op, ep_status status)
{
    epi_ll_dispatch *d = of(op);
    if (status != EP_OK && d->handle && d->handle->ll)
        epi_ll_retire(d->handle->ll);
    if (status != EP_OK && d->turn)
        settle_memory(d);
    ep_handle_release(d->handle);
    epi_ll_release(d->ll);
}

static const epi_stage stages[] = {
    {compare, "compare"},  {prepare, "prepare"}, {enter, "enter"}, {agree, "agree"},
    {send_tokens, "send"}, {receive, "receive"}, {NULL, NULL},
};
#define EAGER_STAGES 5

ep_status ep_ll_dispatch(ep_buffer *buffer, const ep_ll_dispatch_args *given, ep_ll_recv *recv,
                         ep_event **event)
{
    const char *call = "ep_ll_dispatch";
    if (event)
        *event = NULL;
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: buffer is NULL", call);
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    int64_t table_sum = 0;
    ep_status status = epi_args_copy(call, "args", &args, sizeof args, given);
    if (status == EP_OK)
        status = epi_ll_check_dispatch(buffer, &args, recv, &table_sum);
    if (status == EP_OK && buffer->backend)
        return buffer->backend->ll_dispatch(buffer, &args, recv, event);
    if (status == EP_OK)
        status = epi_check_no_stream(call, args.stream);
    epi_ll_dispatch *d = status == EP_OK ? calloc(1, sizeof *d) : NULL;
    if (status == EP_OK && !d)
        status = epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    if (status != EP_OK)
        return epi_reject(buffer, call, status);
    int64_t most = args.max_tokens * buffer->num_ranks;
    d->op = (epi_op){.buffer = buffer, .name = call, .stages = stages, .finish = finish};
    d->op.announces = true;
    d->op.eager = event && args.completion == EP_COMPLETE_BY_HOOK ? EAGER_STAGES : 0;
    d->op.previous = epi_event_hold(args.previous);
    d->recv = recv;
    d->x = args.x;
    d->topk_idx = args.topk_idx;
    d->expert_rank = args.expert_rank;
    d->expert_tokens = args.expert_tokens;
    d->wait_cost = args.wait_cost;
    d->scales_by_column = args.scales_by_column;
    d->shape = (epi_ll_shape){
        .max_tokens = args.max_tokens,
        .hidden = args.x.shape[1],
        .num_experts = args.num_experts,
        .expert_rows = args.max_expert_rows ? args.max_expert_rows : most,
        .table_sum = table_sum,
        .topk = (int32_t)args.topk_idx.shape[1],
        .wire = args.wire,
        .scale = args.wire == EP_E4M3 ? (int32_t)args.scale : 0,
        .overflow = args.overflow,
    };
    return epi_op_submit(&d->op, event);
}
