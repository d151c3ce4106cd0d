/* SPDX-License-Identifier: MIT */
#include "support/small_calls.h"

#include "support/on_device.h"
#include "support/ranks.h"
#include "support/test.h"

#include <string.h>

int small_calls_open(ep_group *group, const ep_buffer_config *config, struct small_calls *b)
{
    memset(b, 0, sizeof *b);
    b->rank = ep_group_rank(group);
    b->num_ranks = ep_group_num_ranks(group);
    for (int t = 0; t < SMALL_TOKENS; t++)
        b->ids[t] = 3 * t;
    b->max_tokens = SMALL_TOKENS;
    b->recv = (ep_recv)EP_RECV_INIT;
    b->ll_recv = (ep_ll_recv)EP_LL_RECV_INIT;
    TEST_OK(ep_group_set_timeout_ms(group, 30000));
    TEST_OK(ep_buffer_create(group, config, &b->buffer));
    return 0;
}

void small_calls_drop(struct small_calls *b)
{
    ep_ll_recv_release(&b->ll_recv);
    ep_recv_release(&b->recv);
    ep_handle_release(b->recv.handle);
    b->recv = (ep_recv)EP_RECV_INIT;
    b->ll_recv = (ep_ll_recv)EP_LL_RECV_INIT;
}

static ep_tensor rows_of(uint16_t *rows)
{
    return ep_tensor_2d(rows, EP_BF16, SMALL_TOKENS, SMALL_HIDDEN);
}

ep_status small_dispatch(struct small_calls *b, ep_recv *recv)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = rows_of(b->x);
    args.topk_idx = ep_tensor_2d(b->ids, EP_I64, SMALL_TOKENS, 1);
    args.num_experts = SMALL_EXPERTS;
    return ep_dispatch(b->buffer, &args, recv, NULL);
}

ep_status small_combine(struct small_calls *b)
{
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = b->recv.x;
    args.handle = b->recv.handle;
    args.out = rows_of(b->out);
    return ep_combine(b->buffer, &args, NULL);
}

ep_status small_dispatch_backward(struct small_calls *b)
{
    ep_dispatch_backward_args args = EP_DISPATCH_BACKWARD_ARGS_INIT;
    args.grad_recv_x = b->recv.x;
    args.handle = b->recv.handle;
    args.grad_x = rows_of(b->out);
    return ep_dispatch_backward(b->buffer, &args, NULL);
}

ep_status small_combine_backward(struct small_calls *b, ep_recv *recv)
{
    ep_combine_backward_args args = EP_COMBINE_BACKWARD_ARGS_INIT;
    args.grad_out = rows_of(b->x);
    args.handle = b->recv.handle;
    return ep_combine_backward(b->buffer, &args, recv, NULL);
}

static ep_status finish(ep_status status, ep_event *event)
{
    if (status == EP_OK && event)
        status = ep_event_wait(event);
    ep_event_release(event);
    return status;
}

ep_status small_ll_dispatch(struct small_calls *b, ep_ll_recv *recv)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    ep_event *event = NULL;
    args.x = rows_of(b->x);
    args.topk_idx = ep_tensor_2d(b->ids, EP_I64, SMALL_TOKENS, 1);
    args.max_tokens = b->max_tokens;
    args.max_expert_rows = b->num_ranks * SMALL_TOKENS;
    args.num_experts = SMALL_EXPERTS;
    args.completion = EP_COMPLETE_BY_HOOK;
    ep_status status = ep_ll_dispatch(b->buffer, &args, recv, b->hooks ? &event : NULL);
    return finish(status, event);
}

ep_status small_ll_combine(struct small_calls *b)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    ep_event *event = NULL;
    args.y = b->ll_recv.x;
    args.y.data = b->y;
    args.topk_idx = ep_tensor_2d(b->ids, EP_I64, SMALL_TOKENS, 1);
    args.topk_weights = ep_tensor_2d(b->weights, EP_F32, SMALL_TOKENS, 1);
    args.handle = b->ll_recv.handle;
    args.out = rows_of(b->out);
    args.completion = EP_COMPLETE_BY_HOOK;
    ep_status status = ep_ll_combine(b->buffer, &args, b->hooks ? &event : NULL);
    return finish(status, event);
}
