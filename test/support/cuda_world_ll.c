/* SPDX-License-Identifier: MIT */
/* Random sequences over the fake GPU: steps of low latency. */
#include "support/cuda_world.h"

static bool occupied(const struct world *w, int slot)
{
    for (int i = 0; i < WORLD_LL; i++)
        if (w->ll[i].slot == slot)
            return true;
    return false;
}

static void look_at_shape(const struct world *w, struct call *call, int kind)
{
    call->changes = w->shape.kind >= 0 && w->shape.kind != kind;
    call->sets_up = w->shape.kind != kind;
    if (call->changes)
        call->state = occupied(w, 0) || occupied(w, 1) || hooks_wait(w);
    else
        call->state = !call->sets_up && occupied(w, (int)(w->shape.calls & 1));
}

static ep_status ll_dispatch(struct world *w, struct call *call, int kind, struct ll_result *ll,
                             ep_event **event)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    args.x = x_of(w, call);
    args.topk_idx = w->c.ids;
    args.max_tokens = WORLD_TOKENS;
    args.num_experts = w->c.num_ranks;
    args.wire = kind == 1 ? EP_E4M3 : EP_BF16;
    args.max_expert_rows = kind == 2 ? 16 : 0;
    args.overflow = kind == 2 ? EP_OVERFLOW_DROP : EP_OVERFLOW_ERROR;
    args.completion = call->hook ? EP_COMPLETE_BY_HOOK : EP_COMPLETE_IN_BACKGROUND;
    args.stream = test_device.stream;
    args.num_sms = sms_of(w, call);
    ll->recv = (ep_ll_recv)EP_LL_RECV_INIT;
    return ep_ll_dispatch(w->c.buffer, &args, &ll->recv, event);
}

/* What came of the shape: every call on memory that there is counts, made or refused. */
static void follow_shape(struct world *w, const struct call *call, int kind, ep_status got,
                         struct ll_result *ll)
{
    if (call->state || (call->early && !call->sets_up)) {
        w->shape.calls++;
        return;
    }
    if (call->early)
        return;
    if (call->sets_up) /* all have come to it */
        w->num_held = 0;
    if (call->sets_up && got == EP_ERR_CAPACITY) {
        shape_forget(w);
        return;
    }
    shape_note(w, kind);
    int slot = (int)(w->shape.calls++ & 1);
    if (got != EP_OK)
        return;
    ll->slot = slot;
    const ep_tensor *tensors[] = {
        &ll->recv.x,       &ll->recv.scales,       &ll->recv.count,
        &ll->recv.dropped, &ll->recv.source_token, &ll->recv.source_range};
    for (int i = 0; i < 6; i++)
        w->shape.slot[slot][i] = piece_of(tensors[i]);
}

static int take_ll(struct world *w, struct ll_result **ll)
{
    *ll = &w->ll[rng_below(&w->common, WORLD_LL)];
    if ((*ll)->taken && events_end(w, true))
        return 1;
    ll_drop(w, *ll);
    (*ll)->taken = true;
    (*ll)->stage = DOOMED;
    return 0;
}

int step_ll_dispatch(struct world *w)
{
    struct call call = {.kind = EP_CALL_LL_DISPATCH};
    struct ll_result *ll;
    ep_event *event = NULL;
    int kind = (int)rng_below(&w->common, 3);
    if (rng_below(&w->common, 2) && w->shape.kind >= 0)
        kind = w->shape.kind;
    if (take_ll(w, &ll))
        return 1;
    call.event = rng_below(&w->common, 2);
    call.hook = call.event && rng_below(&w->common, 2);
    look_at_shape(w, &call, kind);
    if (call_plan(w, &call))
        return 1;
    if (call.changes && !call.state && call.early) { /* the others would wait for who refuses */
        kind = w->shape.kind;
        look_at_shape(w, &call, kind);
        call.mine = call.mine == EP_OK && call.state ? EP_ERR_STATE : call.mine;
    }
    bool refuses = is_victim(w, &call, REFUSED);
    call_script(w, &call);
    ep_status got =
        refuses ? EP_ERR_ARGUMENT : ll_dispatch(w, &call, kind, ll, call.event ? &event : NULL);
    if (refuses && refuse(w, &call))
        return 1;
    follow_shape(w, &call, kind, got, ll);
    return call_check(w, &call, got, event, &ll->stage, ll);
}

static ep_status ll_combine(struct world *w, struct call *call, struct ll_result *ll,
                            ep_event **event)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    args.topk_idx = w->c.ids;
    args.topk_weights = w->weights;
    args.handle = ll->recv.handle;
    args.wire = call->wire;
    args.out = x_of(w, call);
    args.completion = call->hook ? EP_COMPLETE_BY_HOOK : EP_COMPLETE_IN_BACKGROUND;
    args.stream = test_device.stream;
    args.num_sms = sms_of(w, call);
    ep_status status = ep_ll_combine_buffer(w->c.buffer, ll->recv.handle, &args.y);
    if (rng_below(&w->own, 2)) /* of the same shape, one expert a rank */
        args.y.data = w->outside.data;
    return status == EP_OK ? ep_ll_combine(w->c.buffer, &args, event) : status;
}

static struct ll_result *pick_ll(struct world *w)
{
    uint64_t first = rng_below(&w->common, WORLD_LL);
    for (uint64_t i = 0; i < WORLD_LL; i++)
        if (w->ll[(first + i) % WORLD_LL].stage == GOOD)
            return &w->ll[(first + i) % WORLD_LL];
    return NULL;
}

int step_ll_combine(struct world *w)
{
    struct call call = {.kind = EP_CALL_LL_COMBINE};
    struct ll_result *ll = pick_ll(w);
    ep_event *event = NULL;
    if (!ll)
        return 0;
    call.wire = (ep_combine_wire)rng_below(&w->common, 2);
    call.event = rng_below(&w->common, 2);
    call.hook = call.event && rng_below(&w->common, 2);
    if (call_plan(w, &call))
        return 1;
    if (is_victim(w, &call, REFUSED))
        return refuse(w, &call);
    call_script(w, &call);
    ep_status got = ll_combine(w, &call, ll, call.event ? &event : NULL);
    return call_check(w, &call, got, event, NULL, NULL);
}

/* A result is released, or retired to be released later. */
int step_ll_release(struct world *w)
{
    struct ll_result *ll = &w->ll[rng_below(&w->common, WORLD_LL)];
    if (rng_below(&w->common, 2)) {
        if (ll->taken && events_end(w, true))
            return 1;
        ll_drop(w, ll);
    } else if (ll->stage == GOOD) {
        ep_ll_recv_retire(&ll->recv);
        ll->slot = -1;
        ll->stage = DOOMED;
    }
    return 0;
}

/* A dispatch of the shape in use and its combine, in a graph. */
int step_capture(struct world *w)
{
    struct call call = {.kind = EP_CALL_LL_DISPATCH, .victim = -1};
    struct ll_result *ll;
    uint8_t own, all[64];
    void *graph;
    if (!w->captures || w->shape.kind < 0)
        return 0;
    if (take_ll(w, &ll))
        return 1;
    own = w->pending != EP_OK;
    TEST_OK(ep_group_allgather(w->c.group, &own, all, 1));
    for (int r = 0; r < w->c.num_ranks; r++)
        if (all[r])
            return 0;
    look_at_shape(w, &call, w->shape.kind);
    if (call.state)
        return 0;
    fake_gpu_script_done();
    TEST_OK(ep_graph_begin(EP_DEVICE_CUDA, test_device.index, test_device.stream));
    TEST_OK(ll_dispatch(w, &call, w->shape.kind, ll, NULL));
    follow_shape(w, &call, w->shape.kind, EP_OK, ll);
    w->shape.captured = w->stays = true;
    TEST_OK(ll_combine(w, &call, ll, NULL));
    TEST_OK(ep_graph_end(EP_DEVICE_CUDA, test_device.index, test_device.stream, &graph));
    TEST_OK(ep_graph_destroy(EP_DEVICE_CUDA, test_device.index, graph));
    ll->stage = GOOD;
    return 0;
}
