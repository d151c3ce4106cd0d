/* SPDX-License-Identifier: MIT */
/* Low-latency dispatch: stages. The method is in docs/protocol.md. */
#include "ep/ll_dispatch.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"
#include "ep/event.h"

#include <stdlib.h>
#include <string.h>

static epi_ll_dispatch *of(epi_op *op)
{
    return (epi_ll_dispatch *)op;
}

/* ------------------------------------------------------------- memory of the shape */

static bool same_shape(const epi_ll_shape *a, const epi_ll_shape *b)
{
    return memcmp(a, b, sizeof *a) == 0;
}

/* Memory of another shape is given up once peers have read the outputs in it. */
static ep_status compare(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    const epi_ll *ll = op->buffer->ll;
    d->shape.mask_sum = epi_call_mask_sum(op->buffer);
    d->setup = !ll || !same_shape(&ll->shape, &d->shape);
    if (d->setup && ll)
        epi_op_await_left(op, EPI_SLOT_LL_Y_READ, op->buffer->ll_y);
    return EP_OK;
}

/* Uses the memory there is, or makes some; then every rank does, as all see the same change. */
static ep_status prepare(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    ep_buffer *buffer = op->buffer;
    epi_ll *ll = buffer->ll;
    if (d->setup && ll && (ll->slot[0].in_use || ll->slot[1].in_use))
        return epi_fail(EP_ERR_STATE,
                        "%s: the shape (or the set of masked ranks) differs from that of a result "
                        "still alive; release it with ep_ll_recv_release first",
                        op->name);
    if (d->setup) {
        epi_ll_drop(buffer);
        EPI_TRY(epi_ll_new(buffer, op->name, &d->shape, d->expert_rank, &buffer->ll));
        ll = buffer->ll;
        epi_op_await_entered(op, op->epoch - 1);
    }
    d->slot = (int)(ll->calls & 1);
    if (ll->slot[d->slot].in_use)
        return epi_fail(EP_ERR_STATE,
                        "%s: two results are alive (of calls %llu and %llu); release the older "
                        "with ep_ll_recv_release first",
                        op->name, (unsigned long long)ll->slot[d->slot].epoch,
                        (unsigned long long)ll->slot[!d->slot].epoch);
    ll->calls++;
    ll->slot[d->slot].in_use = true;
    epi_ll_hold(ll);
    d->ll = ll;
    return EP_OK;
}

static ep_status setup_enter(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    d->ll->last_epoch = op->epoch;
    if (!d->setup)
        return EP_OK;
    const epi_ll_shape *shape = &d->shape;
    epi_mail mail = {
        .agreed = {[EPI_AGREED_CALL] = EPI_CALL_LL_SETUP,
                   [EPI_AGREED_HIDDEN] = shape->hidden,
                   [EPI_AGREED_DTYPE] = shape->wire,
                   [EPI_AGREED_TOPK] = shape->topk,
                   [EPI_AGREED_EXPERTS] = shape->num_experts,
                   [EPI_AGREED_TABLE] = shape->table_sum,
                   [EPI_AGREED_SCALE] = shape->wire == EP_E4M3 ? shape->scale : 0,
                   [EPI_AGREED_MASK] = shape->mask_sum,
                   [EPI_AGREED_MAX_TOKENS] = shape->max_tokens,
                   [EPI_AGREED_EXPERT_ROWS] = shape->expert_rows,
                   [EPI_AGREED_OVERFLOW] = shape->overflow},
        .base = d->ll->slot[0].area,
        .capacity = d->ll->slot[1].area,
    };
    epi_call_enter(op, &mail, NULL, 0);
    return EP_OK;
}

static ep_status setup_done(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
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
    /* The slot's tokens of the call before last must have been read before they are replaced. */
    epi_op_await_left(op, EPI_SLOT_LL_READ, d->ll->slot[d->slot].epoch);
    return EP_OK;
}

static ep_status reuse_outputs(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    epi_op_await_left(op, EPI_SLOT_LL_Y_READ, d->ll->slot[d->slot].y_epoch);
    return EP_OK;
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

static ep_status send_tokens(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    epi_ll *ll = d->ll;
    epi_ll_slot *slot = &ll->slot[d->slot];
    uint8_t *area = epi_ll_area(ll, d->slot, op->buffer->rank);
    epi_ll_layout layout = epi_ll_layout_at(ll, op->buffer->rank);
    size_t ids = (size_t)(d->x.shape[0] * ll->shape.topk) * sizeof(int32_t);
    EPI_TRY(epi_ll_result_new(ll, d->slot, op->epoch, d->x.shape[0], &d->result));
    EPI_TRY(epi_ll_read_ids(ll, op->name, &d->topk_idx, d->result->ids));
    if (ids)
        memcpy(area + layout.ids, d->result->ids, ids);
    epi_team_run(op->buffer->team, put_part, d);
    epi_ll_head *head = (epi_ll_head *)area;
    head->epoch = op->epoch;
    head->num_tokens = d->x.shape[0];
    slot->epoch = op->buffer->ll_sent = op->epoch;
    if (op->eager) /* the caller looks at the result's places before the hook */
        EPI_TRY(epi_ll_describe(d));
    epi_call_notify_all(op, EPI_SLOT_LL_SENT);
    epi_op_await(op, EPI_SLOT_LL_SENT, op->epoch, NULL);
    op->wait.cost = epi_tensor_given(&d->wait_cost) ? d->wait_cost.data : NULL;
    return EP_OK;
}

static ep_status receive(epi_op *op)
{
    epi_ll_dispatch *d = of(op);
    EPI_TRY(epi_ll_receive(d));
    epi_call_notify_all(op, EPI_SLOT_LL_READ);
    return EP_OK;
}

static void finish(epi_op *op, ep_status status)
{
    epi_ll_dispatch *d = of(op);
    if (status == EP_OK)
        return;
    if (d->ll && !(d->result && d->result->retired))
        d->ll->slot[d->slot].in_use = false;
    if (d->described)
        d->result->retired = true;
    else
        epi_ll_result_free(d->result);
    if (d->ll && op->buffer->ll == d->ll)
        epi_ll_drop(op->buffer); /* the next call sets memory up anew, on every rank */
    epi_ll_release(d->ll);
}

static const epi_stage stages[] = {compare,       prepare,     setup_enter, setup_done,
                                   reuse_outputs, send_tokens, receive,     NULL};
#define EAGER_STAGES 6

/* ------------------------------------------------------------- checks */

static ep_status check_tensors(const char *call, const ep_ll_dispatch_args *args)
{
    epi_tensor_rule x = {.call = call,
                         .argument = "x",
                         .ndim = 2,
                         .rows = -1,
                         .columns = -1,
                         .dtypes = 1u << EP_BF16,
                         .dtype_names = "BF16"};
    EPI_TRY(epi_tensor_check(&args->x, &x));
    if (args->x.shape[1] < 8 || args->x.shape[1] % 8)
        return epi_bad(call, "x.shape[1] (hidden)", args->x.shape[1], "a positive multiple of 8");
    if (args->max_tokens < 1 || args->max_tokens > 1 << 20)
        return epi_bad(call, "max_tokens", args->max_tokens, "1..1048576");
    if (args->x.shape[0] > args->max_tokens)
        return epi_fail(EP_ERR_ARGUMENT, "%s: x.shape[0] is %lld; it must be 0..%lld (max_tokens)",
                        call, (long long)args->x.shape[0], (long long)args->max_tokens);
    epi_tensor_rule idx = {.call = call,
                           .argument = "topk_idx",
                           .ndim = 2,
                           .rows = args->x.shape[0],
                           .columns = -1,
                           .dtypes = EPI_INDEX_DTYPES,
                           .dtype_names = "I32 or I64"};
    return epi_tensor_check(&args->topk_idx, &idx);
}

static ep_status check_stats(const char *call, const ep_buffer *buffer, int64_t num_local,
                             const ep_ll_dispatch_args *args)
{
    epi_tensor_rule rule = {.call = call,
                            .argument = "expert_tokens",
                            .ndim = 1,
                            .rows = num_local,
                            .columns = -1,
                            .dtypes = 1u << EP_I32,
                            .dtype_names = "I32"};
    if (epi_tensor_given(&args->expert_tokens))
        EPI_TRY(epi_tensor_check(&args->expert_tokens, &rule));
    rule = (epi_tensor_rule){.call = call,
                             .argument = "wait_cost",
                             .ndim = 1,
                             .rows = buffer->num_ranks,
                             .columns = -1,
                             .dtypes = 1u << EP_I64,
                             .dtype_names = "I64"};
    return epi_tensor_given(&args->wait_cost) ? epi_tensor_check(&args->wait_cost, &rule) : EP_OK;
}

static ep_status check_choices(const char *call, const ep_buffer *buffer,
                               const ep_ll_dispatch_args *args)
{
    int64_t most = args->max_tokens * buffer->num_ranks, topk = args->topk_idx.shape[1];
    if (args->num_experts < 1 || args->num_experts > buffer->config.max_experts)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: num_experts is %lld; it must be 1..%d (max_experts of the buffer)",
                        call, (long long)args->num_experts, (int)buffer->config.max_experts);
    if (topk < 1 || topk > args->num_experts)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: topk_idx.shape[1] (top-k) is %lld; it must be 1..%lld (num_experts)",
                        call, (long long)topk, (long long)args->num_experts);
    if (args->max_expert_rows < 0 || args->max_expert_rows > most)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: max_expert_rows is %lld; it must be 0..%lld (ranks * max_tokens)",
                        call, (long long)args->max_expert_rows, (long long)most);
    if (args->overflow != EP_OVERFLOW_ERROR && args->overflow != EP_OVERFLOW_DROP)
        return epi_bad(call, "overflow", args->overflow, "0 or 1 (ep_overflow)");
    if (args->wire != EP_BF16 && args->wire != EP_E4M3)
        return epi_fail(EP_ERR_ARGUMENT, "%s: wire is %s (%d); it must be BF16 or E4M3", call,
                        ep_dtype_string(args->wire), (int)args->wire);
    if (args->scale < EP_SCALE_F32 || args->scale > EP_SCALE_UE8M0)
        return epi_bad(call, "scale", args->scale, "0..2 (ep_scale)");
    if (args->scales_by_column != 0 && args->scales_by_column != 1)
        return epi_bad(call, "scales_by_column", args->scales_by_column, "0 or 1");
    if (args->completion != EP_COMPLETE_IN_BACKGROUND && args->completion != EP_COMPLETE_BY_HOOK)
        return epi_bad(call, "completion", args->completion, "0 or 1 (ep_completion)");
    return EP_OK;
}

static ep_status check_args(const char *call, const ep_buffer *buffer,
                            const ep_ll_dispatch_args *args, const ep_ll_recv *recv,
                            int64_t *table_sum)
{
    if (!recv)
        return epi_fail(EP_ERR_ARGUMENT, "%s: recv is NULL", call);
    if (recv->size < sizeof recv->size || recv->size > 65536)
        return epi_bad(call, "recv->size", (int64_t)recv->size,
                       "sizeof(ep_ll_recv): start from EP_LL_RECV_INIT");
    EPI_TRY(check_tensors(call, args));
    EPI_TRY(check_choices(call, buffer, args));
    epi_experts experts;
    EPI_TRY(epi_experts_init(&experts, call, args->num_experts, args->expert_rank,
                             buffer->num_ranks, buffer->rank));
    *table_sum = experts.table_sum;
    int num_local = experts.num_local;
    epi_experts_free(&experts);
    return check_stats(call, buffer, num_local, args);
}

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
        status = check_args(call, buffer, &args, recv, &table_sum);
    epi_ll_dispatch *d = status == EP_OK ? calloc(1, sizeof *d) : NULL;
    if (!d) {
        if (status == EP_OK)
            status = epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
        return epi_op_reject(buffer, call, status);
    }
    d->op = (epi_op){.buffer = buffer, .name = call, .stages = stages, .finish = finish};
    d->op.eager = args.completion == EP_COMPLETE_BY_HOOK ? EAGER_STAGES : 0;
    d->op.previous = epi_event_hold(args.previous);
    d->recv = recv;
    d->x = args.x;
    d->topk_idx = args.topk_idx;
    d->expert_rank = args.expert_rank;
    d->expert_tokens = args.expert_tokens;
    d->wait_cost = args.wait_cost;
    d->shape.max_tokens = args.max_tokens;
    d->shape.hidden = args.x.shape[1];
    d->shape.num_experts = args.num_experts;
    d->shape.expert_rows =
        args.max_expert_rows ? args.max_expert_rows : args.max_tokens * buffer->num_ranks;
    d->shape.table_sum = table_sum;
    d->shape.topk = (int32_t)args.topk_idx.shape[1];
    d->shape.wire = args.wire;
    d->shape.scale = args.scale;
    d->shape.scales_by_column = args.scales_by_column;
    d->shape.overflow = args.overflow;
    return epi_op_submit(&d->op, event);
}
