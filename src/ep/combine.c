/* SPDX-License-Identifier: MIT */
/* Combine: argument checks and stages. The method is in docs/protocol.md. */
#include "ep/combine.h"

#include "base/error.h"
#include "ep/args.h"
#include "ep/backend.h"
#include "ep/event.h"

#include <stdlib.h>

static epi_combine *of(epi_op *op)
{
    return (epi_combine *)op;
}

/* ------------------------------------------------------------- stages */

static ep_status prepare(epi_op *op)
{
    epi_combine *c = of(op);
    const ep_handle *handle = c->handle;
    bool by_token = handle->layout == EP_ROWS_BY_TOKEN;
    EPI_TRY(epi_combine_new_parts(c));
    EPI_TRY(epi_expose(op->buffer, &c->y,
                       epi_tensor_given(&c->row_weights) ? &c->row_weights : NULL,
                       by_token ? handle->source_offset[op->buffer->rank] : 0,
                       by_token ? handle->source_offset[op->buffer->rank + 1] : 0, &c->exposed));
    epi_op_await_entered(op, op->epoch - 1);
    return EP_OK;
}

static ep_status enter(epi_op *op)
{
    epi_combine *c = of(op);
    const ep_handle *handle = c->handle;
    epi_mail mail = {
        .agreed = {[EPI_AGREED_CALL] = EPI_CALL_COMBINE,
                   [EPI_AGREED_HIDDEN] = c->y.shape[1],
                   [EPI_AGREED_DTYPE] = c->y.dtype,
                   [EPI_AGREED_TOPK] = handle->topk,
                   [EPI_AGREED_EXPERTS] = handle->num_experts,
                   [EPI_AGREED_WEIGHTS] = epi_tensor_given(&c->row_weights),
                   [EPI_AGREED_LAYOUT] = handle->layout,
                   [EPI_AGREED_ALIGNMENT] = handle->alignment,
                   [EPI_AGREED_HANDLE] = (int64_t)handle->id,
                   [EPI_AGREED_MASK] = epi_call_mask_sum(op->buffer)},
        .num_tokens = handle->num_tokens,
        .rows = c->exposed.place,
    };
    epi_call_enter(op, &mail, NULL, 0);
    return EP_OK;
}

static ep_status reduce(epi_op *op)
{
    epi_call_settle(op);
    EPI_TRY(epi_call_agree(op));
    EPI_TRY(epi_combine_reduce(of(op)));
    /* A rank that gave up meanwhile may have reused the memory just read. */
    EPI_TRY(epi_op_check_given_up(op));
    epi_call_notify_all(op, EPI_SLOT_LEAVE);
    epi_op_await(op, EPI_SLOT_LEAVE, op->epoch, NULL);
    return EP_OK;
}

static void finish(epi_op *op, ep_status status)
{
    (void)status;
    epi_combine *c = of(op);
    epi_unexpose(op->buffer, &c->exposed);
    epi_combine_free_parts(c);
    ep_handle_release(c->handle);
}

static const epi_stage stages[] = {
    {prepare, "prepare"}, {enter, "enter"}, {reduce, "reduce"}, {NULL, NULL}};

/* ------------------------------------------------------------- checks */

static ep_status check_2d(const epi_combine *c, const char *call, const char *argument,
                          const ep_tensor *tensor, int64_t rows, int64_t columns, unsigned dtypes,
                          const char *names)
{
    const epi_tensor_rule rule = {.call = call,
                                  .argument = argument,
                                  .ndim = 2,
                                  .rows = rows,
                                  .columns = columns,
                                  .dtypes = dtypes,
                                  .dtype_names = names,
                                  .device = c->op.buffer->config.device,
                                  .device_index = c->op.buffer->config.device_index};
    return epi_tensor_check(tensor, &rule);
}

/* What combine and the backward of dispatch name differently. */
typedef struct names {
    const char *call, *y, *ys, *out, *row_weights, *out_weights;
} names;

static ep_status check_rows(const epi_combine *c, const names *name)
{
    const ep_handle *handle = c->handle;
    EPI_TRY(check_2d(c, name->call, name->y, &c->y, handle->rows, -1, EPI_FLOAT_DTYPES,
                     "BF16, F16 or F32"));
    if (c->y.shape[1] < 8 || c->y.shape[1] % 8)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: %s.shape[1] (hidden) is %lld; it must be a positive multiple of 8",
                        name->call, name->y, (long long)c->y.shape[1]);
    return check_2d(c, name->call, name->out, &c->out, handle->num_tokens, c->y.shape[1],
                    1u << c->y.dtype, name->ys);
}

static ep_status check_row_weights(const epi_combine *c, const names *name)
{
    bool in = epi_tensor_given(&c->row_weights), out = epi_tensor_given(&c->out_weights);
    if (in != out)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is not given; %s and %s go together", name->call,
                        in ? name->out_weights : name->row_weights, name->row_weights,
                        name->out_weights);
    if (!in)
        return EP_OK;
    const ep_handle *handle = c->handle;
    int64_t columns = handle->layout == EP_ROWS_BY_EXPERT ? 1 : handle->topk;
    EPI_TRY(check_2d(c, name->call, name->row_weights, &c->row_weights, handle->rows, columns,
                     1u << EP_F32, "F32"));
    return check_2d(c, name->call, name->out_weights, &c->out_weights, handle->num_tokens,
                    handle->topk, 1u << EP_F32, "F32");
}

static ep_status check_combine(const epi_combine *c, const ep_combine_args *args)
{
    static const names name = {"ep_combine", "y", "y's", "out", "topk_weights", "out_weights"};
    EPI_TRY(check_rows(c, &name));
    static const char *const biases[] = {"bias[0]", "bias[1]"};
    for (int i = 0; i < 2; i++)
        if (epi_tensor_given(&c->bias[i]))
            EPI_TRY(check_2d(c, name.call, biases[i], &c->bias[i], c->handle->num_tokens,
                             c->y.shape[1], 1u << c->y.dtype, "y's"));
    if (!c->weighted)
        return check_row_weights(c, &name);
    if (epi_tensor_given(&args->out_weights))
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: out_weights is given; it applies to handles of EP_ROWS_BY_TOKEN only",
                        name.call);
    if (epi_tensor_given(&c->topk_weights))
        return check_2d(c, name.call, "topk_weights", &c->topk_weights, c->handle->num_tokens,
                        c->handle->topk, 1u << EP_F32, "F32");
    return EP_OK;
}

static ep_status check_backward(const epi_combine *c)
{
    static const names name = {"ep_dispatch_backward", "grad_recv_x",
                               "grad_recv_x's",        "grad_x",
                               "grad_recv_weights",    "grad_topk_weights"};
    EPI_TRY(check_rows(c, &name));
    return check_row_weights(c, &name);
}

/* ------------------------------------------------------------- calls */

/* Starts the call's object, without the handle that checks may still refuse. */
static epi_combine *new_combine(ep_buffer *buffer, const char *call)
{
    epi_combine *c = calloc(1, sizeof *c);
    if (!c) {
        epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
        return NULL;
    }
    c->op = (epi_op){.buffer = buffer, .name = call, .stages = stages, .finish = finish};
    return c;
}

static ep_status submit(epi_combine *c, ep_event *previous, ep_event **event)
{
    epi_handle_hold(c->handle);
    c->op.previous = epi_event_hold(previous);
    return epi_op_submit(&c->op, event);
}

ep_status ep_combine(ep_buffer *buffer, const ep_combine_args *given, ep_event **event)
{
    const char *call = "ep_combine";
    if (event)
        *event = NULL;
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: buffer is NULL", call);
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    ep_status status = epi_args_copy(call, "args", &args, sizeof args, given);
    if (status == EP_OK)
        status = epi_handle_check(call, buffer, args.handle, false);
    epi_combine *c = status == EP_OK ? new_combine(buffer, call) : NULL;
    if (!c)
        return epi_reject(buffer, call, status == EP_OK ? EP_ERR_MEMORY : status);
    c->handle = args.handle;
    c->weighted = args.handle->layout == EP_ROWS_BY_EXPERT;
    c->y = args.y;
    c->bias[0] = args.bias[0];
    c->bias[1] = args.bias[1];
    c->out = args.out;
    c->out_weights = args.out_weights;
    if (c->weighted)
        c->topk_weights = args.topk_weights;
    else
        c->row_weights = args.topk_weights;
    status = check_combine(c, &args);
    if (status == EP_OK && !buffer->backend)
        status = epi_check_no_stream(call, args.stream);
    if (status == EP_OK && !buffer->backend)
        return submit(c, args.previous, event);
    free(c);
    if (status == EP_OK)
        return buffer->backend->combine(buffer, &args, event);
    return epi_reject(buffer, call, status);
}

ep_status ep_dispatch_backward(ep_buffer *buffer, const ep_dispatch_backward_args *given,
                               ep_event **event)
{
    const char *call = "ep_dispatch_backward";
    if (event)
        *event = NULL;
    if (!buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: buffer is NULL", call);
    ep_dispatch_backward_args args = EP_DISPATCH_BACKWARD_ARGS_INIT;
    ep_status status = epi_args_copy(call, "args", &args, sizeof args, given);
    if (status == EP_OK)
        status = epi_handle_check(call, buffer, args.handle, false);
    epi_combine *c = status == EP_OK ? new_combine(buffer, call) : NULL;
    if (!c)
        return epi_reject(buffer, call, status == EP_OK ? EP_ERR_MEMORY : status);
    c->handle = args.handle;
    c->y = args.grad_recv_x;
    c->out = args.grad_x;
    c->row_weights = args.grad_recv_weights;
    c->out_weights = args.grad_topk_weights;
    status = check_backward(c);
    if (status == EP_OK && !buffer->backend)
        status = epi_check_no_stream(call, args.stream);
    if (status == EP_OK && !buffer->backend)
        return submit(c, args.previous, event);
    free(c);
    if (status == EP_OK)
        return buffer->backend->dispatch_backward(buffer, &args, event);
    return epi_reject(buffer, call, status);
}
