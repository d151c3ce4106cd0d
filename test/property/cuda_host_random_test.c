/* SPDX-License-Identifier: MIT */
/*
 * Random sequences of calls on CUDA buffers over the fake GPU (support/fake_gpu.h):
 * whatever is called, fails or is released in whatever order, memory that is in use
 * is nobody else's, errors are those that were scripted, and nothing is left behind.
 * EP_TEST_SEED and EP_SEEDED_WORLDS vary and lengthen the run.
 */
#include "support/cuda_world.h"
#include "support/sanitize.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

#define STEPS 60
#define LONGEST_MS 40000

/* ---------------------------------------------------------------- calls */

static struct result *pick_result(struct world *w)
{
    uint64_t first = rng_below(&w->common, WORLD_RESULTS);
    for (uint64_t i = 0; i < WORLD_RESULTS; i++) {
        struct result *result = &w->results[(first + i) % WORLD_RESULTS];
        if (result->stage == GOOD)
            return result;
    }
    return NULL;
}

static int step_dispatch(struct world *w)
{
    struct result *result = &w->results[rng_below(&w->common, WORLD_RESULTS)];
    int64_t most = (int64_t)WORLD_TOKENS * w->c.num_ranks;
    struct call call = {.kind = EP_CALL_DISPATCH};
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_event *event = NULL;
    if (result->taken && events_end(w, true))
        return 1;
    result_drop(w, result);
    call.known = rng_below(&w->common, 3) == 0;
    call.counts = !call.known;
    call.event = rng_below(&w->common, 2);
    if (call_plan(w, &call))
        return 1;
    args.x = x_of(w, &call);
    args.topk_idx = w->c.ids;
    if (rng_below(&w->common, 2))
        args.topk_weights = w->weights;
    args.num_experts = w->c.num_ranks * (int64_t)rng_range(&w->common, 1, 2);
    args.layout = (ep_row_layout)rng_below(&w->common, 2);
    args.num_worst_tokens = call.known ? most : 0;
    args.stream = test_device.stream;
    args.num_sms = sms_of(w, &call);
    bool many = rng_below(&w->own, 10) == 0 && !w->verify;
    w->rows = rng_range(&w->own, 0, many ? 20000 : most);
    result->taken = true;
    result->by_expert = args.layout == EP_ROWS_BY_EXPERT;
    result->recv = (ep_recv)EP_RECV_INIT;
    call.recv = &result->recv;
    result->stage = DOOMED;
    if (is_victim(w, &call, REFUSED))
        return refuse(w, &call);
    call_script(w, &call);
    ep_status got = ep_dispatch(w->c.buffer, &args, &result->recv, call.event ? &event : NULL);
    if (got == EP_OK)
        result->stage = GOOD;
    return call_check(w, &call, got, event, &result->stage, NULL);
}

static ep_recv *new_extra(struct world *w)
{
    ep_recv *recv = &w->extras[rng_below(&w->own, WORLD_EXTRAS)];
    ep_recv_release(recv);
    *recv = (ep_recv)EP_RECV_INIT;
    return recv;
}

static ep_status cached_dispatch(struct world *w, struct call *call, struct result *result,
                                 ep_event **event)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    args.x = x_of(w, call);
    args.handle = result->handle;
    args.stream = test_device.stream;
    args.num_sms = sms_of(w, call);
    return ep_dispatch(w->c.buffer, &args, new_extra(w), event);
}

static ep_status combine(struct world *w, struct call *call, struct result *result,
                         ep_event **event)
{
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = result->recv.x;
    args.handle = result->handle;
    args.out = x_of(w, call);
    args.stream = test_device.stream;
    args.num_sms = sms_of(w, call);
    return ep_combine(w->c.buffer, &args, event);
}

static ep_status dispatch_backward(struct world *w, struct call *call, struct result *result,
                                   ep_event **event)
{
    ep_dispatch_backward_args args = EP_DISPATCH_BACKWARD_ARGS_INIT;
    args.grad_recv_x = result->recv.x;
    args.handle = result->handle;
    args.grad_x = x_of(w, call);
    args.stream = test_device.stream;
    args.num_sms = sms_of(w, call);
    return ep_dispatch_backward(w->c.buffer, &args, event);
}

static ep_status combine_backward(struct world *w, struct call *call, struct result *result,
                                  ep_event **event)
{
    ep_combine_backward_args args = EP_COMBINE_BACKWARD_ARGS_INIT;
    args.grad_out = x_of(w, call);
    args.handle = result->handle;
    if (call->halves) {
        args.y = result->recv.x;
        args.grad_topk_weights = w->weights;
    }
    args.stream = test_device.stream;
    args.num_sms = sms_of(w, call);
    return ep_combine_backward(w->c.buffer, &args, new_extra(w), event);
}

/* The handle that the last kernel was told of. */
static void note_handle(struct world *w, const struct call *call)
{
    const struct fake_launch *dispatch = fake_gpu_launch(FAKE_DISPATCH, 0),
                             *combine = fake_gpu_launch(FAKE_COMBINE, 0);
    if (call->mine == EP_OK && call->known)
        w->handle = dispatch->dispatch.field[EPC_F_HANDLE];
    else if (call->mine == EP_OK)
        w->handle = combine->combine.field[EPC_F_HANDLE];
}

/* Ranks come in step: what low-latency calls had is gone, with what hooks were to do. */
static int step_recover(struct world *w)
{
    TEST_OK(ep_group_recover(w->c.group));
    w->pending = EP_OK;
    w->num_held = 0;
    for (int i = 0; i < WORLD_LL; i++) {
        w->ll[i].stage = DOOMED;
        w->ll[i].slot = -1;
    }
    for (int i = 0; i < WORLD_EVENTS; i++) {
        struct event *e = &w->events[i];
        e->end = e->hooked ? EP_ERR_ABORTED : e->end;
        e->hooked = false;
        e->stage = e->ll ? NULL : e->stage;
    }
    shape_forget(w);
    return 0;
}

/* Late peers may have most of some rank's window, so that a combine may have no room there. */
static int make_room(struct world *w)
{
    uint8_t own = w->num_held > 0, all[64];
    TEST_OK(ep_group_allgather(w->c.group, &own, all, 1));
    for (int r = 0; r < w->c.num_ranks; r++)
        if (all[r])
            return step_recover(w);
    return 0;
}

/* A call that goes by the handle of a result. */
static int step_by_handle(struct world *w)
{
    static ep_status (*const calls[])(struct world *, struct call *, struct result *,
                                      ep_event **) = {
        [EP_CALL_DISPATCH] = cached_dispatch,
        [EP_CALL_COMBINE] = combine,
        [EP_CALL_DISPATCH_BACKWARD] = dispatch_backward,
        [EP_CALL_COMBINE_BACKWARD] = combine_backward,
    };
    struct call call = {.kind = (ep_call)rng_below(&w->common, 4)};
    struct result *result = pick_result(w);
    ep_event *event = NULL;
    if (!result)
        return 0;
    if (w->verify && make_room(w))
        return 1;
    call.known = call.kind == EP_CALL_DISPATCH || call.kind == EP_CALL_COMBINE_BACKWARD;
    call.halves =
        call.kind == EP_CALL_COMBINE_BACKWARD && result->by_expert && rng_below(&w->common, 2);
    call.event = rng_below(&w->common, 2);
    if (call_plan(w, &call))
        return 1;
    if (is_victim(w, &call, REFUSED))
        return refuse(w, &call);
    call_script(w, &call);
    ep_status got = calls[call.kind](w, &call, result, call.event ? &event : NULL);
    note_handle(w, &call);
    return call_check(w, &call, got, event, NULL, NULL);
}

/* ---------------------------------------------------------------- other steps */

/* This rank's own memory. */
static int step_alloc(struct world *w)
{
    struct piece *piece = &w->allocs[rng_below(&w->own, WORLD_ALLOCS)];
    void *memory;
    TEST_OK(ep_buffer_free(w->c.buffer, (void *)piece->at));
    *piece = (struct piece){NULL, 0};
    if (rng_below(&w->own, 3) == 0)
        return 0;
    bool large = rng_below(&w->own, 5) == 0 && !w->verify;
    size_t bytes = rng_below(&w->own, large ? 8000000 : 300000);
    ep_status status = ep_buffer_alloc(w->c.buffer, bytes, &memory);
    TEST_CHECK(status == EP_OK || status == EP_ERR_MEMORY);
    *piece = (struct piece){memory, memory ? bytes : 0};
    TEST_CHECK(!world_held(w, *piece));
    return 0;
}

static int step_query(struct world *w)
{
    const struct result *result = &w->results[rng_below(&w->own, WORLD_RESULTS)];
    ep_handle_info info = {.size = sizeof info};
    if (!result->handle) { /* other memory, which peers are to map anew */
        tensor_free(&w->outside);
        w->outside =
            tensor_new(EP_BF16, (int64_t)WORLD_TOKENS * w->c.num_ranks, WORLD_HIDDEN, 0, NULL);
        return 0;
    }
    TEST_OK(ep_handle_query(result->handle, &info));
    TEST_CHECK(info.num_ranks == w->c.num_ranks && info.num_tokens == WORLD_TOKENS);
    return 0;
}

static int step_release(struct world *w)
{
    struct result *result = &w->results[rng_below(&w->common, WORLD_RESULTS)];
    if (result->taken && events_end(w, true))
        return 1;
    result_drop(w, result);
    if (rng_below(&w->own, 2))
        new_extra(w);
    return 0;
}

static int step_events(struct world *w)
{
    bool common = rng_below(&w->common, 2);
    if (common)
        return events_end(w, true);
    return rng_below(&w->own, 2) ? events_end(w, false) : 0;
}

/* ---------------------------------------------------------------- sequences */

static int one_step(struct world *w)
{
    static int (*const steps[])(struct world *) = {
        step_dispatch,   step_dispatch,   step_dispatch,    step_by_handle,   step_by_handle,
        step_by_handle,  step_by_handle,  step_ll_dispatch, step_ll_dispatch, step_ll_dispatch,
        step_ll_combine, step_ll_combine, step_ll_release,  step_release,     step_events,
        step_events,     step_query,      step_alloc,       step_alloc,       step_capture,
        step_recover};
    uint64_t which = rng_below(&w->common, sizeof steps / sizeof *steps);
    w->handle = 0;
    if (steps[which](w))
        return 1;
    results_note(w);
    return world_check(w);
}

/* Room for the events of one more call, common ones and this rank's own. */
static int keep_few_events(struct world *w, int step)
{
    int own = 0;
    for (int i = 0; i < WORLD_EVENTS; i++)
        own += w->events[i].event && !w->events[i].common;
    if (own >= WORLD_EVENTS / 2 && events_end(w, false))
        return 1;
    if (step % 4 == 0 && events_end(w, true))
        return 1;
    results_note(w);
    return 0;
}

static int release_all(struct world *w)
{
    if (events_end(w, true) || events_end(w, false))
        return 1;
    for (int i = 0; i < WORLD_RESULTS; i++)
        result_drop(w, &w->results[i]);
    for (int i = 0; i < WORLD_EXTRAS; i++)
        ep_recv_release(&w->extras[i]);
    for (int i = 0; i < WORLD_LL; i++)
        ll_drop(w, &w->ll[i]);
    for (int i = 0; i < WORLD_ALLOCS; i++)
        TEST_OK(ep_buffer_free(w->c.buffer, (void *)w->allocs[i].at));
    return step_recover(w);
}

/* Once what needs most: what the buffer keeps, tables and scratch, is there then. */
static int warm_up(struct world *w)
{
    for (int i = 0; i < 4; i++) {
        ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
        ep_combine_backward_args back = EP_COMBINE_BACKWARD_ARGS_INIT;
        ep_recv recv = EP_RECV_INIT, grad = EP_RECV_INIT;
        args.x = back.grad_out = w->c.x;
        args.topk_idx = w->c.ids;
        args.num_experts = w->c.num_ranks * (1 + i % 2);
        args.layout = (ep_row_layout)(i / 2);
        args.stream = back.stream = test_device.stream;
        w->rows = 0;
        TEST_OK(ep_dispatch(w->c.buffer, &args, &recv, NULL));
        back.handle = recv.handle;
        TEST_OK(ep_combine_backward(w->c.buffer, &back, &grad, NULL));
        ep_recv_release(&grad);
        cuda_drop(&recv);
    }
    TEST_OK(ep_group_recover(w->c.group)); /* what calls held is back */
    return 0;
}

static int sequence_body(ep_group *group, void *arg)
{
    static struct world w;
    int64_t start = test_now_ms();
    TEST_OK(ep_group_set_timeout_ms(group, 10000));
    if (world_open(group, *(uint64_t *)arg, &w) || warm_up(&w))
        return 1;
    size_t before = world_used(&w);
    w.captures = rng_below(&w.common, 4) == 0;
    for (int step = 0; step < STEPS; step++) {
        if (keep_few_events(&w, step) || one_step(&w)) {
            fprintf(stderr, "rank %d: step %d\n", w.c.rank, step);
            return 1;
        }
        TEST_CHECK(test_now_ms() - start < LONGEST_MS);
    }
    if (release_all(&w))
        return 1;
    TEST_CHECK(w.stays || world_used(&w) == before);
    return world_close(&w);
}

static void random_sequences(void **state)
{
    (void)state;
    uint64_t first = rng_env_seed(1);
    int64_t count = rng_env_number("EP_SEEDED_WORLDS", TEST_SANITIZED ? 20 : 60);
    for (uint64_t seed = first; seed < first + (uint64_t)count; seed++) {
        if (test_run_groups("shm", 1 + (int)(seed % 3), sequence_body, &seed) == 0)
            continue;
        fail_msg("seed %llu failed; again: EP_TEST_SEED=%llu EP_SEEDED_WORLDS=1",
                 (unsigned long long)seed, (unsigned long long)seed);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(random_sequences)};
    fake_gpu_use();
    return cmocka_run_group_tests(tests, NULL, NULL);
}
