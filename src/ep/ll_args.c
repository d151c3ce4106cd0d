/* SPDX-License-Identifier: MIT */
/* Low latency: checks of what callers pass. */
#include "ep/ll.h"

#include "base/error.h"
#include "ep/args.h"

static ep_status check_tensor(const ep_buffer *buffer, const char *call, const char *argument,
                              const ep_tensor *tensor, int ndim, int64_t rows, int64_t columns,
                              unsigned dtypes, const char *names)
{
    const epi_tensor_rule rule = {.call = call,
                                  .argument = argument,
                                  .ndim = ndim,
                                  .rows = rows,
                                  .columns = columns,
                                  .dtypes = dtypes,
                                  .dtype_names = names,
                                  .device = buffer->config.device,
                                  .device_index = buffer->config.device_index};
    return epi_tensor_check(tensor, &rule);
}

static ep_status check_cost(const char *call, const ep_buffer *buffer, const ep_tensor *cost)
{
    return epi_tensor_given(cost) ? check_tensor(buffer, call, "wait_cost", cost, 1,
                                                 buffer->num_ranks, -1, 1u << EP_I64, "I64")
                                  : EP_OK;
}

static ep_status check_completion(const char *call, ep_completion completion)
{
    if (completion != EP_COMPLETE_IN_BACKGROUND && completion != EP_COMPLETE_BY_HOOK)
        return epi_bad(call, "completion", completion, "0 or 1 (ep_completion)");
    return EP_OK;
}

/* ------------------------------------------------------------- dispatch */

static const char *const dispatch = "ep_ll_dispatch";

static ep_status check_rows(const ep_buffer *buffer, const ep_ll_dispatch_args *args)
{
    int64_t most = EPI_LL_MAX_ROWS / buffer->num_ranks;
    if (most > EPI_LL_MAX_TOKENS)
        most = EPI_LL_MAX_TOKENS;
    EPI_TRY(check_tensor(buffer, dispatch, "x", &args->x, 2, -1, -1, 1u << EP_BF16, "BF16"));
    if (args->x.shape[1] < 8 || args->x.shape[1] % 8)
        return epi_bad(dispatch, "x.shape[1] (hidden)", args->x.shape[1],
                       "a positive multiple of 8");
    if (args->max_tokens < 1 || args->max_tokens > most)
        return epi_fail(EP_ERR_ARGUMENT, "%s: max_tokens is %lld; it must be 1..%lld", dispatch,
                        (long long)args->max_tokens, (long long)most);
    if (args->x.shape[0] > args->max_tokens)
        return epi_fail(EP_ERR_ARGUMENT, "%s: x.shape[0] is %lld; it must be 0..%lld (max_tokens)",
                        dispatch, (long long)args->x.shape[0], (long long)args->max_tokens);
    return EP_OK;
}

static ep_status check_experts(const ep_buffer *buffer, const ep_ll_dispatch_args *args)
{
    EPI_TRY(check_tensor(buffer, dispatch, "topk_idx", &args->topk_idx, 2, args->x.shape[0], -1,
                         EPI_INDEX_DTYPES, "I32 or I64"));
    int64_t topk = args->topk_idx.shape[1];
    if (args->num_experts < 1 || args->num_experts > buffer->config.max_experts)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: num_experts is %lld; it must be 1..%d (max_experts of the buffer)",
                        dispatch, (long long)args->num_experts, (int)buffer->config.max_experts);
    if (topk < 1 || topk > args->num_experts)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: topk_idx.shape[1] (top-k) is %lld; it must be 1..%lld (num_experts)",
                        dispatch, (long long)topk, (long long)args->num_experts);
    return EP_OK;
}

static ep_status check_choices(const ep_buffer *buffer, const ep_ll_dispatch_args *args)
{
    int64_t most = args->max_tokens * buffer->num_ranks;
    if (args->max_expert_rows < 0 || args->max_expert_rows > most)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: max_expert_rows is %lld; it must be 0..%lld (ranks * max_tokens)",
                        dispatch, (long long)args->max_expert_rows, (long long)most);
    if (args->overflow != EP_OVERFLOW_ERROR && args->overflow != EP_OVERFLOW_DROP)
        return epi_bad(dispatch, "overflow", args->overflow, "0 or 1 (ep_overflow)");
    if (args->wire != EP_BF16 && args->wire != EP_E4M3)
        return epi_fail(EP_ERR_ARGUMENT, "%s: wire is %s (%d); it must be BF16 or E4M3", dispatch,
                        ep_dtype_string(args->wire), (int)args->wire);
    if (args->scale < EP_SCALE_F32 || args->scale > EP_SCALE_UE8M0)
        return epi_bad(dispatch, "scale", args->scale, "0..2 (ep_scale)");
    if (args->scales_by_column != 0 && args->scales_by_column != 1)
        return epi_bad(dispatch, "scales_by_column", args->scales_by_column, "0 or 1");
    return check_completion(dispatch, args->completion);
}

ep_status epi_ll_check_dispatch(const ep_buffer *buffer, const ep_ll_dispatch_args *args,
                                const ep_ll_recv *recv, int64_t *table_sum)
{
    if (!recv)
        return epi_fail(EP_ERR_ARGUMENT, "%s: recv is NULL", dispatch);
    if (recv->size < sizeof recv->size || recv->size > 65536)
        return epi_bad(dispatch, "recv->size", (int64_t)recv->size,
                       "sizeof(ep_ll_recv): start from EP_LL_RECV_INIT");
    EPI_TRY(check_rows(buffer, args));
    EPI_TRY(check_experts(buffer, args));
    EPI_TRY(check_choices(buffer, args));
    int num_local;
    EPI_TRY(epi_experts_check(dispatch, args->num_experts, args->expert_rank, buffer->num_ranks,
                              buffer->rank, &num_local, table_sum));
    if (epi_tensor_given(&args->expert_tokens))
        EPI_TRY(check_tensor(buffer, dispatch, "expert_tokens", &args->expert_tokens, 1, num_local,
                             -1, 1u << EP_I32, "I32"));
    return check_cost(dispatch, buffer, &args->wait_cost);
}

/* ------------------------------------------------------------- combine */

ep_status epi_ll_check_handle(const char *call, const ep_buffer *buffer, const ep_handle *handle)
{
    if (!handle)
        return epi_fail(EP_ERR_ARGUMENT, "%s: handle is NULL", call);
    if (handle->buffer != buffer)
        return epi_fail(EP_ERR_ARGUMENT, "%s: handle was made by another buffer", call);
    if (!handle->ll)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: handle is of ep_dispatch; it must be of ep_ll_dispatch", call);
    if (handle->ll->retired)
        return epi_fail(EP_ERR_STATE, "%s: the result of call %llu was retired, or its call failed",
                        call, (unsigned long long)handle->ll->epoch);
    return epi_buffer_check_handle(call, buffer, handle->id);
}

static ep_status check_y(const char *call, const ep_tensor *y, const ep_handle *handle)
{
    int64_t room = handle->ll->ll->shape.expert_rows;
    EPI_TRY(check_tensor(handle->buffer, call, "y", y, 3, handle->num_local, room, 1u << EP_BF16,
                         "BF16"));
    if (y->shape[2] != handle->hidden)
        return epi_fail(EP_ERR_ARGUMENT, "%s: y.shape[2] is %lld; it must be %lld", call,
                        (long long)y->shape[2], (long long)handle->hidden);
    const int64_t least[2] = {room * handle->hidden, handle->hidden};
    for (int i = 0; i < 2; i++)
        if (y->shape[i] > 1 && y->stride[i] < least[i])
            return epi_fail(EP_ERR_ARGUMENT, "%s: y.stride[%d] is %lld; it must be at least %lld",
                            call, i, (long long)y->stride[i], (long long)least[i]);
    return EP_OK;
}

ep_status epi_ll_check_combine(const ep_buffer *buffer, const ep_ll_combine_args *args)
{
    const char *call = "ep_ll_combine";
    EPI_TRY(epi_ll_check_handle(call, buffer, args->handle));
    int64_t tokens = args->handle->ll->num_tokens, topk = args->handle->ll->topk;
    EPI_TRY(check_y(call, &args->y, args->handle));
    EPI_TRY(check_tensor(buffer, call, "topk_idx", &args->topk_idx, 2, tokens, topk,
                         EPI_INDEX_DTYPES, "I32 or I64"));
    EPI_TRY(check_tensor(buffer, call, "topk_weights", &args->topk_weights, 2, tokens, topk,
                         1u << EP_F32, "F32"));
    EPI_TRY(check_tensor(buffer, call, "out", &args->out, 2, tokens, args->handle->hidden,
                         1u << EP_BF16, "BF16"));
    if (args->wire != EP_COMBINE_BF16 && args->wire != EP_COMBINE_LOGFMT10)
        return epi_bad(call, "wire", args->wire, "0 or 1 (ep_combine_wire)");
    EPI_TRY(check_completion(call, args->completion));
    return check_cost(call, buffer, &args->wait_cost);
}
