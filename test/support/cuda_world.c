/* SPDX-License-Identifier: MIT */
#include "support/cuda_world.h"

#include <stdlib.h>
#include <string.h>

#define TOO_MANY_SMS 999

static struct world *asked; /* whose dispatches the fake GPU asks about */

static bool meets(struct piece a, struct piece b)
{
    return a.bytes && b.bytes && a.at < b.at + b.bytes && b.at < a.at + a.bytes;
}

bool world_held(const struct world *w, struct piece piece)
{
    for (int i = 0; i < w->num_held; i++)
        if (meets(w->held[i], piece))
            return true;
    return false;
}

struct piece piece_of(const ep_tensor *tensor)
{
    int64_t count = tensor->data ? 1 : 0;
    for (int i = 0; i < tensor->ndim; i++)
        count *= tensor->shape[i];
    return (struct piece){tensor->data, (size_t)count * ep_dtype_size(tensor->dtype)};
}

/* As the kernels' verdict: every rank's rows fit. */
static bool room(const epc_dispatch_params *p, int64_t *rows)
{
    struct world *w = asked;
    bool known = p->worst || p->cached;
    uint8_t own, all[64];
    *rows = w->rows ? w->rows : -1;
    struct piece region = {p->region, (size_t)p->pieces[0]};
    own = known ? p->region != NULL
                : epc_has_room(p->pieces, epc_region_of(&p->shape, w->rows).end, w->rows, p->spare);
    w->met |= world_held(w, region);
    w->num_held = 0; /* all have come to this call */
    w->verdict = ep_group_allgather(w->c.group, &own, all, 1) == EP_OK;
    for (int r = 0; r < w->c.num_ranks; r++)
        w->verdict &= all[r] != 0;
    return w->verdict;
}

/* ---------------------------------------------------------------- ends */

size_t world_used(const struct world *w)
{
    ep_buffer_info info = {.size = sizeof info};
    return ep_buffer_query(w->c.buffer, &info) == EP_OK ? info.used_bytes : SIZE_MAX;
}

int world_open(ep_group *group, uint64_t seed, struct world *w)
{
    static const int window_mb[] = {1, 2, 4, 16, 64};
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    memset(w, 0, sizeof *w);
    rng_seed(&w->common, seed);
    rng_seed(&w->own, seed * 64 + (uint64_t)ep_group_rank(group) + 1);
    w->shape.kind = -1;
    for (int i = 0; i < WORLD_LL; i++)
        w->ll[i].slot = -1;
    asked = w;
    if (cuda_open(group, 0, 0, WORLD_TOKENS, WORLD_HIDDEN, &w->c))
        return 1;
    ep_buffer_destroy(w->c.buffer);
    int mb = window_mb[rng_below(&w->common, 5)];
    w->verify = mb == 64 && rng_below(&w->common, 2);
    config.verify = w->verify;
    config.window_bytes = (size_t)mb << 20;
    config.window_max_bytes = (size_t)(rng_below(&w->common, 2) ? 4096 : 80) << 20;
    config.device = EP_DEVICE_CUDA;
    config.device_index = test_device.index;
    TEST_OK(ep_buffer_create(group, &config, &w->c.buffer));
    w->weights = tensor_new(EP_F32, WORLD_TOKENS, w->c.num_ranks, 0, NULL);
    w->outside = tensor_new(EP_BF16, (int64_t)WORLD_TOKENS * w->c.num_ranks, WORLD_HIDDEN, 0, NULL);
    fake_gpu()->room = room;
    return 0;
}

int world_close(struct world *w)
{
    const struct fake_gpu *gpu = fake_gpu();
    ep_buffer_destroy(w->c.buffer);
    w->c.buffer = NULL;
    TEST_CHECK(gpu->num_allocations == 4); /* x, ids, weights, outside */
    TEST_CHECK(gpu->num_mappings == 0 && gpu->num_events == 0 && gpu->num_streams == 1);
    tensor_free(&w->weights);
    tensor_free(&w->outside);
    cuda_close(&w->c);
    return 0;
}

/* ---------------------------------------------------------------- plans */

static enum fate draw_fate(struct world *w, const struct call *call)
{
    enum fate fate = rng_below(&w->common, 3) ? WELL : (enum fate)rng_range(&w->common, 1, 7);
    bool alone = w->c.num_ranks == 1;
    if (fate == TIMES_OUT && alone)
        return WELL;
    /* The fake's kernel that checks rows does not know that the one before it died. */
    bool checked = w->verify && call->known;
    if (fate == DIES && (!call->event || call->counts || call->hook || call->halves || checked))
        return WELL;
    return fate == HOOK_NOT_LAUNCHED && !call->hook ? WELL : fate;
}

/* Why this rank makes no proper call, in the order in which the library looks. */
static ep_status own_refusal(const struct world *w, const struct call *call)
{
    bool victim = call->victim == w->c.rank;
    if (victim && (call->fate == BAD_ARGUMENT || call->fate == REFUSED))
        return EP_ERR_ARGUMENT;
    if (w->pending != EP_OK)
        return w->pending;
    if (victim && call->fate == BAD_SMS)
        return EP_ERR_ARGUMENT;
    return call->state ? EP_ERR_STATE : EP_OK;
}

/* Dispatches that wait for their counts may launch once more, which is not to meet what is scripted
   for the next call. */
static int counts_end(struct world *w)
{
    for (int i = 0; i < WORLD_EVENTS; i++)
        if (w->events[i].room && event_end(w, &w->events[i]))
            return 1;
    return 0;
}

int call_plan(struct world *w, struct call *call)
{
    int32_t own[2], all[64][2];
    call->fate = draw_fate(w, call);
    call->victim = (int)rng_below(&w->common, (uint64_t)w->c.num_ranks);
    call->mine = own_refusal(w, call);
    own[0] = (int32_t)call->mine;
    own[1] = call->mine == EP_OK && call->fate == NOT_LAUNCHED && call->victim == w->c.rank;
    TEST_OK(ep_group_allgather(w->c.group, own, all, sizeof own));
    call->refuser = -1;
    call->early = false;
    for (int r = w->c.num_ranks - 1; r >= 0; r--) {
        call->early |= all[r][0] != EP_OK;
        if (r == w->c.rank || (all[r][0] == EP_OK && !all[r][1]))
            continue;
        call->refuser = r;
        call->others = all[r][1] ? EP_ERR_DEVICE : (ep_status)all[r][0];
    }
    bool launches = !call->early || !call->sets_up || call->changes;
    return launches && (call->fate != WELL || call->early) ? counts_end(w) : 0;
}

/* How this rank's kernel ends where it runs. */
static struct fake_outcome outcome_of(const struct world *w, const struct call *call,
                                      ep_status *end)
{
    bool victim = call->victim == w->c.rank, times_out = call->fate == TIMES_OUT;
    uint64_t others = ((1ull << w->c.num_ranks) - 1) & ~(1ull << w->c.rank);
    *end = EP_ERR_ABORTED;
    if (call->refuser >= 0)
        return (struct fake_outcome){.fail = EPC_FAIL_ABORTED,
                                     .detail = {EPC_WHY(call->refuser, call->others, 0)}};
    if (call->fate == DIES && victim) {
        *end = EP_ERR_DEVICE;
        return (struct fake_outcome){.dies = true};
    }
    if (call->fate == HOOK_NOT_LAUNCHED && victim) {
        *end = EP_ERR_DEVICE;
        return (struct fake_outcome){.launch_fails = true};
    }
    if (times_out && victim) {
        *end = EP_ERR_TIMEOUT;
        return (struct fake_outcome){.fail = EPC_FAIL_TIMEOUT, .late = others};
    }
    if (times_out || call->fate == DIES || call->fate == HOOK_NOT_LAUNCHED)
        return (struct fake_outcome){.fail = EPC_FAIL_ABORTED,
                                     .detail = {EPC_WHY(call->victim, EP_ERR_TIMEOUT, 1)}};
    *end = EP_OK;
    return (struct fake_outcome){0};
}

void call_script(struct world *w, struct call *call)
{
    bool unlaunched =
        call->fate == NOT_LAUNCHED && call->victim == w->c.rank && !(call->sets_up && call->early);
    fake_gpu_script_done();
    w->verdict = true;
    call->outcome = outcome_of(w, call, &call->end);
    if (call->halves && call->end == EP_OK && call->mine == EP_OK)
        w->num_held = 0; /* all come to the first half */
    if (call->mine != EP_OK || (call->sets_up && call->early))
        return;
    if (unlaunched) {
        call->mine = EP_ERR_DEVICE;
        fake_gpu_script((struct fake_outcome){.launch_fails = true});
        return;
    }
    if (call->hook)
        fake_gpu_script((struct fake_outcome){0});
    else
        fake_gpu_script(call->outcome);
    if (call->halves)
        fake_gpu_script(call->outcome);
}

/* Peers of a dispatch that failed here may still write: until a later call has gone well. */
static void note_held(struct world *w, const struct call *call)
{
    const struct fake_launch *launch = fake_gpu_launch(FAKE_DISPATCH, 0);
    bool refused = call->refuser >= 0 && call->others != EP_ERR_DEVICE &&
                   call->others != EP_ERR_TIMEOUT && call->others != EP_ERR_ABORTED;
    if (call->end == EP_OK || refused || !launch || w->c.num_ranks == 1 || w->num_held == 32)
        return;
    const epc_dispatch_params *p = &launch->dispatch;
    struct piece region = {p->region, (size_t)p->pieces[0]};
    w->met |= world_held(w, region);
    if (call->known && p->worst) /* the rest was given back at once */
        region.bytes = region.at ? (size_t)epc_region_of(&p->shape, p->worst).end : 0;
    w->held[w->num_held++] = region;
}

/* What a call that ran its kernel returns; *deferred: what it comes to after that. */
static ep_status now(const struct world *w, const struct call *call, ep_status *deferred)
{
    const struct fake_launch *launch = fake_gpu_launch(FAKE_DISPATCH, 0);
    bool lacks = call->known && call->end == EP_OK && !w->verdict;
    ep_status end = lacks ? EP_ERR_CAPACITY : call->end;
    *deferred = EP_OK;
    if (call->sets_up && !call->changes && call->early)
        return EP_ERR_ABORTED;
    if (call->known && launch && !launch->dispatch.region)
        return EP_ERR_CAPACITY;
    if (call->counts && !call->event)
        return call->end;
    *deferred = end;
    return EP_OK;
}

static int keep_event(struct world *w, const struct call *call, const struct event *event)
{
    bool common = call->counts || call->hook || event->stage;
    bool soon = call->fate == DIES || (call->hook && call->refuser >= 0); /* not on all ranks */
    for (int i = 0; i < WORLD_EVENTS; i++)
        if (!w->events[i].event) {
            w->events[i] = *event;
            w->events[i].common = common;
            return soon ? event_end(w, &w->events[i]) : 0;
        }
    return 1;
}

int call_check(struct world *w, struct call *call, ep_status got, ep_event *event,
               enum stage *stage, struct ll_result *ll)
{
    bool dispatches = call->counts || call->known;
    if (call->mine != EP_OK) {
        if (call->mine == w->pending &&
            !(call->victim == w->c.rank && (call->fate == BAD_ARGUMENT || call->fate == REFUSED)))
            w->pending = EP_OK;
        TEST_CHECK(got == call->mine && !event);
        return 0;
    }
    ep_status deferred, expected = now(w, call, &deferred);
    bool may_lack = call->sets_up || (call->counts && call->end == EP_OK);
    TEST_CHECK(got == expected || (may_lack && expected == EP_OK && got == EP_ERR_CAPACITY));
    if (dispatches)
        note_held(w, call);
    else if (call->kind != EP_CALL_LL_DISPATCH && call->kind != EP_CALL_LL_COMBINE &&
             call->end == EP_OK)
        w->num_held = 0;
    w->stays |= got != EP_OK && call->fate == DIES; /* no event tells that it has died */
    if (got != EP_OK)
        return 0;
    if (!call->event) {
        w->pending = deferred;
        if (stage)
            *stage = deferred == EP_OK ? GOOD : DOOMED;
        if (ll && deferred != EP_OK)
            ll->slot = -1;
        return 0;
    }
    TEST_CHECK(event);
    if (stage)
        *stage = WAITING;
    if (ll && deferred != EP_OK && !call->hook && call->fate != DIES)
        ll->slot = -1; /* found out by the next call */
    const struct event kept = {.event = event,
                               .end = deferred,
                               .room = call->counts && deferred == EP_OK,
                               .hooked = call->hook,
                               .hook = call->outcome,
                               .stage = stage,
                               .dispatches = dispatches,
                               .result = call->recv,
                               .ll = ll};
    return keep_event(w, call, &kept);
}

/* ---------------------------------------------------------------- arguments */

bool is_victim(const struct world *w, const struct call *call, enum fate fate)
{
    return call->fate == fate && call->victim == w->c.rank;
}

int32_t sms_of(const struct world *w, const struct call *call)
{
    return is_victim(w, call, BAD_SMS) ? TOO_MANY_SMS : 0;
}

ep_tensor x_of(const struct world *w, const struct call *call)
{
    ep_tensor x = w->c.x;
    if (is_victim(w, call, BAD_ARGUMENT))
        x.shape[1] = 12;
    return x;
}

int refuse(struct world *w, struct call *call)
{
    TEST_OK(ep_buffer_refuse(w->c.buffer, call->kind, "a test"));
    return 0;
}

/* ---------------------------------------------------------------- events */

/* Until it is known what comes; of other calls than dispatches it is ep_event_wait. */
static int event_wait_counts(struct event *e, ep_status *seen)
{
    *seen = ep_event_wait_counts(e->event);
    TEST_CHECK(*seen == e->end || (e->dispatches && *seen == EP_OK) || e->room);
    TEST_CHECK(*seen != EP_OK || !e->result || e->result->owner);
    if (*seen == EP_OK)
        *seen = ep_event_wait(e->event);
    TEST_CHECK(*seen == e->end || (e->room && *seen == EP_ERR_CAPACITY));
    return 0;
}

static int event_look(struct world *w, struct event *e, ep_status *seen)
{
    bool unlaunched = e->hooked && e->hook.launch_fails, known = e->hooked || e->end == EP_OK;
    uint64_t way = rng_below(&w->own, 5);
    if (way == 0 && !unlaunched && known && !e->room && w->pending == EP_OK) {
        *seen = e->end;
        w->pending = e->end; /* nobody asks any more */
        return ep_event_stream_wait(e->event, NULL) != EP_OK;
    }
    if (way == 1)
        return event_wait_counts(e, seen);
    *seen = way == 2 ? ep_event_query(e->event) : ep_event_wait(e->event);
    TEST_CHECK(*seen == e->end || (e->room && *seen == EP_ERR_CAPACITY));
    return 0;
}

int event_end(struct world *w, struct event *e)
{
    ep_status seen;
    if (!e->event)
        return 0;
    fake_gpu_script_done();
    if (e->hooked)
        for (int i = 0; i < (e->hook.launch_fails ? 3 : 1); i++)
            fake_gpu_script(e->hook);
    if (event_look(w, e, &seen))
        return 1;
    e->hooked = false;
    ep_event_release(e->event);
    e->event = NULL;
    if (e->stage && *e->stage == WAITING)
        *e->stage = seen == EP_OK ? GOOD : DOOMED;
    if (e->ll && seen != EP_OK)
        e->ll->slot = -1;
    e->room = false;
    fake_gpu_script_done();
    return 0;
}

int events_end(struct world *w, bool common)
{
    for (int i = 0; i < WORLD_EVENTS; i++)
        if (w->events[i].common == common && event_end(w, &w->events[i]))
            return 1;
    return 0;
}

bool hooks_wait(const struct world *w)
{
    for (int i = 0; i < WORLD_EVENTS; i++)
        if (w->events[i].event && w->events[i].hooked)
            return true;
    return false;
}

/* ---------------------------------------------------------------- results */

void result_drop(struct world *w, struct result *result)
{
    ep_handle *handle = result->handle ? result->handle : result->recv.handle;
    bool handle_first = rng_below(&w->own, 2);
    if (handle_first)
        ep_handle_release(handle);
    ep_recv_release(&result->recv);
    if (!handle_first)
        ep_handle_release(handle);
    *result = (struct result){.stage = FREE};
}

static void note_result(struct result *result)
{
    const ep_recv *recv = &result->recv;
    if (result->handle || !recv->owner)
        return;
    result->handle = recv->handle;
    result->tables[0] = piece_of(&recv->source_token);
    result->tables[1] = piece_of(&recv->source_offset);
    result->tables[2] = piece_of(&recv->expert_offset);
    result->tables[3] = piece_of(&recv->tokens_per_expert);
}

void results_note(struct world *w)
{
    for (int i = 0; i < WORLD_RESULTS; i++)
        note_result(&w->results[i]);
}

void ll_drop(struct world *w, struct ll_result *ll)
{
    (void)w;
    ep_ll_recv_release(&ll->recv);
    *ll = (struct ll_result){.stage = FREE, .slot = -1};
}

void shape_forget(struct world *w)
{
    if (w->shape.kind >= 0 && w->shape.captured && w->num_kept < WORLD_SHAPES)
        w->kept[w->num_kept++] = w->shape;
    w->shape = (struct shape){.kind = -1};
}

void shape_note(struct world *w, int kind)
{
    const epc_ll_params *p = &fake_gpu_launch(FAKE_LL, 0)->ll;
    if (w->shape.kind != kind)
        shape_forget(w);
    w->shape.kind = kind;
    w->shape.areas =
        (struct piece){p->area_of[w->c.rank] - p->slot * p->area.bytes, (size_t)p->area.bytes * 2};
}

/* ---------------------------------------------------------------- what must hold */

struct pieces {
    struct piece list[WORLD_PIECES];
    int count;
};

static void add(struct pieces *all, struct piece piece)
{
    if (piece.bytes)
        all->list[all->count++] = piece;
}

static void add_rows(struct pieces *all, const ep_recv *recv, bool sources)
{
    if (!recv->owner)
        return;
    add(all, piece_of(&recv->x));
    add(all, piece_of(&recv->scales));
    add(all, piece_of(&recv->topk_idx));
    add(all, piece_of(&recv->topk_weights));
    if (sources)
        add(all, piece_of(&recv->source_token));
}

static void add_shape(struct pieces *all, const struct shape *shape)
{
    if (shape->kind < 0)
        return;
    add(all, shape->areas);
    for (int i = 0; i < 12; i++)
        add(all, shape->slot[i / 6][i % 6]);
}

static void collect(const struct world *w, struct pieces *all)
{
    all->count = 0;
    for (int i = 0; i < WORLD_RESULTS; i++) {
        add_rows(all, &w->results[i].recv, false);
        for (int k = 0; k < 4 && w->results[i].handle; k++)
            add(all, w->results[i].tables[k]);
    }
    for (int i = 0; i < WORLD_EXTRAS; i++)
        add_rows(all, &w->extras[i], true);
    for (int i = 0; i < WORLD_ALLOCS; i++)
        add(all, w->allocs[i]);
    add_shape(all, &w->shape);
    for (int i = 0; i < w->num_kept; i++)
        add_shape(all, &w->kept[i]);
}

static int by_address(const void *a, const void *b)
{
    const struct piece *x = a, *y = b;
    return (x->at > y->at) - (x->at < y->at);
}

int world_check(struct world *w)
{
    static struct pieces all;
    uint64_t told[64][2];
    ep_buffer_info info = {.size = sizeof info};
    collect(w, &all);
    qsort(all.list, (size_t)all.count, sizeof *all.list, by_address);
    for (int i = 1; i < all.count; i++)
        TEST_CHECK(all.list[i - 1].at + all.list[i - 1].bytes <= all.list[i].at);
    TEST_CHECK(!w->met); /* nobody got what late peers may write */
    TEST_OK(ep_buffer_query(w->c.buffer, &info));
    const uint64_t own[2] = {info.num_calls, w->handle};
    TEST_OK(ep_group_allgather(w->c.group, own, told, sizeof own));
    for (int r = 0; r < w->c.num_ranks; r++)
        TEST_CHECK(told[r][0] == own[0] && (!told[r][1] || !own[1] || told[r][1] == own[1]));
    return 0;
}
