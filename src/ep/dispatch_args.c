/* SPDX-License-Identifier: MIT */
/* Dispatch and the backward of combine: what may be passed. */
#include "base/error.h"
#include "ep/args.h"
#include "ep/dispatch.h"

static epi_tensor_rule rule(const ep_buffer *buffer, const char *call, const char *argument,
                            int64_t rows, int64_t columns, unsigned dtypes, const char *names)
{
    return (epi_tensor_rule){.call = call,
                             .argument = argument,
                             .ndim = 2,
                             .rows = rows,
                             .columns = columns,
                             .dtypes = dtypes,
                             .dtype_names = names,
                             .device = buffer->config.device,
                             .device_index = buffer->config.device_index};
}

static ep_status check_x(const ep_buffer *buffer, const char *call, const ep_tensor *x,
                         unsigned dtypes, const char *names)
{
    epi_tensor_rule want = rule(buffer, call, "x", -1, -1, dtypes, names);
    EPI_TRY(epi_tensor_check(x, &want));
    if (x->shape[1] < 8 || x->shape[1] % 8)
        return epi_bad(call, "x.shape[1] (hidden)", x->shape[1], "a positive multiple of 8");
    return EP_OK;
}

static ep_status check_scales(const ep_buffer *buffer, const char *call,
                              const ep_dispatch_args *args)
{
    if (args->x.dtype != EP_E4M3) {
        if (epi_tensor_given(&args->scales))
            return epi_fail(EP_ERR_ARGUMENT, "%s: scales are given; x.dtype is %s, which has none",
                            call, ep_dtype_string(args->x.dtype));
        return EP_OK;
    }
    epi_tensor_rule want = rule(buffer, call, "scales", args->x.shape[0], -1,
                                1u << EP_F32 | 1u << EP_UE8M0X4, "F32 or UE8M0X4");
    int64_t per = args->scales.dtype == EP_UE8M0X4 ? 512 : 128;
    want.columns = (args->x.shape[1] + per - 1) / per;
    want.free_strides = true;
    return epi_tensor_check(&args->scales, &want);
}

static ep_status check_wire(const char *call, const ep_dispatch_args *args)
{
    if (args->wire != EP_WIRE_INPUT && args->wire != EP_WIRE_FP8)
        return epi_bad(call, "wire", args->wire, "0 or 1 (ep_wire)");
    if (args->wire == EP_WIRE_FP8 && args->x.dtype == EP_E4M3)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: wire is EP_WIRE_FP8; x is E4M3 already, use EP_WIRE_INPUT", call);
    if (args->scale < EP_SCALE_F32 || args->scale > EP_SCALE_UE8M0)
        return epi_bad(call, "scale", args->scale, "0..2 (ep_scale)");
    return EP_OK;
}

static ep_status check_routing(const char *call, const ep_buffer *buffer,
                               const ep_dispatch_args *args)
{
    int64_t tokens = args->x.shape[0];
    epi_tensor_rule idx =
        rule(buffer, call, "topk_idx", tokens, -1, EPI_INDEX_DTYPES, "I32 or I64");
    EPI_TRY(epi_tensor_check(&args->topk_idx, &idx));
    int64_t topk = args->topk_idx.shape[1];
    if (args->num_experts < 1 || args->num_experts > buffer->config.max_experts)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: num_experts is %lld; it must be 1..%d (max_experts of the buffer)",
                        call, (long long)args->num_experts, (int)buffer->config.max_experts);
    if (topk < 1 || topk > args->num_experts)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: topk_idx.shape[1] (top-k) is %lld; it must be 1..%lld (num_experts)",
                        call, (long long)topk, (long long)args->num_experts);
    if (tokens * topk > INT32_MAX)
        return epi_bad(call, "topk_idx (elements)", tokens * topk, "at most 2147483647");
    if (epi_tensor_given(&args->topk_weights)) {
        epi_tensor_rule weights =
            rule(buffer, call, "topk_weights", tokens, topk, 1u << EP_F32, "F32");
        EPI_TRY(epi_tensor_check(&args->topk_weights, &weights));
    }
    if (args->layout != EP_ROWS_BY_TOKEN && args->layout != EP_ROWS_BY_EXPERT)
        return epi_bad(call, "layout", args->layout, "0 or 1 (ep_row_layout)");
    if (args->expert_alignment < 1 || args->expert_alignment > 65536)
        return epi_bad(call, "expert_alignment", args->expert_alignment, "1..65536");
    if (args->num_worst_tokens < 0 || args->num_worst_tokens > INT32_MAX)
        return epi_bad(call, "num_worst_tokens", args->num_worst_tokens, "0..2147483647");
    return EP_OK;
}

static ep_status check_cached(const char *call, const ep_buffer *buffer,
                              const ep_dispatch_args *args)
{
    const ep_handle *handle = args->handle;
    EPI_TRY(epi_handle_check(call, buffer, handle, true));
    if (args->x.shape[0] != handle->num_tokens)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: x.shape[0] is %lld; it must be %lld, the tokens of handle", call,
                        (long long)args->x.shape[0], (long long)handle->num_tokens);
    const char *extra = epi_tensor_given(&args->topk_idx)       ? "topk_idx"
                        : epi_tensor_given(&args->topk_weights) ? "topk_weights"
                        : args->num_experts                     ? "num_experts"
                        : args->expert_rank                     ? "expert_rank"
                        : args->layout != EP_ROWS_BY_TOKEN      ? "layout"
                        : args->expert_alignment != 1           ? "expert_alignment"
                        : args->num_worst_tokens                ? "num_worst_tokens"
                                                                : NULL;
    if (extra)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is given with handle; it comes from the handle",
                        call, extra);
    return EP_OK;
}

ep_status epi_dispatch_check(const char *call, const ep_buffer *buffer,
                             const ep_dispatch_args *args, const ep_recv *recv)
{
    if (!recv)
        return epi_fail(EP_ERR_ARGUMENT, "%s: recv is NULL", call);
    if (recv->size < sizeof recv->size || recv->size > 65536)
        return epi_bad(call, "recv->size", (int64_t)recv->size,
                       "sizeof(ep_recv): start from EP_RECV_INIT");
    EPI_TRY(check_x(buffer, call, &args->x, EPI_FLOAT_DTYPES | 1u << EP_E4M3,
                    "BF16, F16, F32 or E4M3"));
    EPI_TRY(check_scales(buffer, call, args));
    EPI_TRY(check_wire(call, args));
    if (args->allocator && (!args->allocator->alloc || !args->allocator->free))
        return epi_fail(EP_ERR_ARGUMENT, "%s: allocator->%s is NULL", call,
                        args->allocator->alloc ? "free" : "alloc");
    return args->handle ? check_cached(call, buffer, args) : check_routing(call, buffer, args);
}

ep_status epi_combine_backward_check(const char *call, const ep_buffer *buffer,
                                     const ep_combine_backward_args *args)
{
    const ep_handle *handle = args->handle;
    EPI_TRY(epi_handle_check(call, buffer, handle, true));
    bool by_expert = handle->layout == EP_ROWS_BY_EXPERT;
    bool wants_gradient = epi_tensor_given(&args->grad_topk_weights);
    epi_tensor_rule grad = rule(buffer, call, "grad_out", handle->num_tokens, -1, EPI_FLOAT_DTYPES,
                                "BF16, F16 or F32");
    EPI_TRY(epi_tensor_check(&args->grad_out, &grad));
    if (args->grad_out.shape[1] < 8 || args->grad_out.shape[1] % 8)
        return epi_bad(call, "grad_out.shape[1] (hidden)", args->grad_out.shape[1],
                       "a positive multiple of 8");
    const char *extra = by_expert                               ? NULL
                        : wants_gradient                        ? "grad_topk_weights"
                        : epi_tensor_given(&args->topk_weights) ? "topk_weights"
                                                                : NULL;
    if (extra)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: %s is given; it applies to handles of EP_ROWS_BY_EXPERT only", call,
                        extra);
    if (epi_tensor_given(&args->topk_weights)) {
        epi_tensor_rule want = rule(buffer, call, "topk_weights", handle->num_tokens, handle->topk,
                                    1u << EP_F32, "F32");
        EPI_TRY(epi_tensor_check(&args->topk_weights, &want));
    }
    if (wants_gradient != epi_tensor_given(&args->y))
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is not given; y and grad_topk_weights go together",
                        call, wants_gradient ? "y" : "grad_topk_weights");
    if (wants_gradient) {
        epi_tensor_rule out = rule(buffer, call, "grad_topk_weights", handle->num_tokens,
                                   handle->topk, 1u << EP_F32, "F32");
        epi_tensor_rule y = rule(buffer, call, "y", handle->rows, args->grad_out.shape[1],
                                 1u << args->grad_out.dtype, "grad_out's");
        EPI_TRY(epi_tensor_check(&args->grad_topk_weights, &out));
        EPI_TRY(epi_tensor_check(&args->y, &y));
    }
    if (args->allocator && (!args->allocator->alloc || !args->allocator->free))
        return epi_fail(EP_ERR_ARGUMENT, "%s: allocator->%s is NULL", call,
                        args->allocator->alloc ? "free" : "alloc");
    return EP_OK;
}
