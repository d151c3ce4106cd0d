/* SPDX-License-Identifier: MIT */
/* Low latency on the device: memory of a shape of calls, set up by all ranks together. */
#include "ep/cuda/ll.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* The next `bytes` bytes, aligned. */
static int64_t place(int64_t *at, int64_t bytes)
{
    int64_t here = *at;
    *at += epc_ll_align(bytes);
    return here;
}

static void lay_out(const epc_buffer *b, epc_ll *ll)
{
    const epc_ll_shape *s = &ll->shape;
    epc_ll_area *area = &ll->area;
    int64_t per = s->scale == EP_SCALE_UE8M0 ? 512 : 128, at = 0, ranks = b->num_ranks;
    int64_t outputs = (int64_t)ll->max_local * s->expert_rows;
    bool verify = b->buffer->config.verify;
    ll->words = (int)((s->max_tokens + 31) / 32);
    ll->row_bytes = s->wire == EP_E4M3 ? s->hidden : 2 * s->hidden;
    ll->scale_count = s->wire == EP_E4M3 ? (int)((s->hidden + per - 1) / per) : 0;
    area->bits = place(&at, ranks * ll->max_local * ll->words * 8);
    area->begin = place(&at, s->num_experts * 8);
    area->fields = place(&at, ranks * EPC_Y_FIELDS * 8);
    area->counts = place(&at, epc_ll_overflow_fails(b, s) ? ranks * s->num_experts * 8 : 0);
    area->rows = place(&at, s->max_tokens * ll->row_bytes);
    area->scales = place(&at, s->max_tokens * ll->scale_count * 4);
    area->sums = place(&at, verify ? s->max_tokens * 8 : 0);
    area->y = place(&at, outputs * s->hidden * 2);
    area->heads = place(&at, outputs * epc_ll_head_bytes(s->hidden));
    area->y_sums = place(&at, verify ? outputs * 8 : 0);
    area->bytes = at;
}

static ep_status take_slot_memory(epc_buffer *b, epc_ll *ll, epc_ll_slot *slot)
{
    int64_t rows = ll->num_local * ll->shape.expert_rows;
    int64_t x = epc_ll_align(rows * ll->row_bytes),
            scales = epc_ll_align(rows * ll->scale_count * 4), tokens = epc_ll_align(rows * 4);
    int64_t small = epc_ll_align(ll->num_local * 4),
            range = epc_ll_align((int64_t)ll->num_local * b->num_ranks * 8);
    EPI_TRY(epc_take(b, (size_t)(x + scales + tokens + 2 * small + range), &slot->own));
    uint8_t *at = slot->own->memory;
    slot->x = at;
    slot->scales = (uint32_t *)(at + x);
    slot->source_token = (int32_t *)(at + x + scales);
    slot->count = (int32_t *)(at + x + scales + tokens);
    slot->dropped = (int32_t *)(at + x + scales + tokens + small);
    slot->range = (int64_t *)(at + x + scales + tokens + 2 * small);
    return EP_OK;
}

void epc_ll_retire(struct epc_ll_handle *own)
{
    if (own->ll && own->ll->slot[own->core->slot].result == own)
        own->ll->slot[own->core->slot].result = NULL;
    own->ll = NULL;
    own->core->retired = true;
}

static void retire_results(epc_ll *ll)
{
    for (int i = 0; i < 2; i++)
        if (ll->slot[i].result)
            epc_ll_retire(ll->slot[i].result);
}

static void free_ll(epc_buffer *b, epc_ll *ll)
{
    retire_results(ll);
    /* Words of ranks that are still about a call of before. */
    if (ll->areas)
        epc_hold(b, ll->areas->memory, ll->areas->bytes, b->serial, ll->writers);
    epc_give(b, ll->areas);
    for (int i = 0; i < 2; i++)
        epc_give(b, ll->slot[i].own);
    free(ll);
}

void epc_ll_drop(epc_buffer *b)
{
    epc_ll *ll = b->ll;
    b->ll = NULL;
    if (ll && ll->captured) { /* the graph's kernels know the addresses */
        retire_results(ll);
        ll->next = b->ll_kept;
        b->ll_kept = ll;
    } else if (ll)
        free_ll(b, ll);
}

void epc_ll_destroy(epc_buffer *b)
{
    epc_ll_drop(b);
    for (epc_ll *ll = b->ll_kept, *next; ll; ll = next) {
        next = ll->next;
        free_ll(b, ll);
    }
    b->ll_kept = NULL;
}

/* What ranks show each other while a shape is set up. */
typedef struct setup {
    int64_t status, lacks, offset;
    uint32_t place, unused;
    epc_ll_shape shape;
    char text[EPI_ERROR_MAX];
} setup;

/* In the order in which the CPU's setup compares them. */
static ep_status compare_shapes(int rank_a, const epc_ll_shape *a, int rank_b,
                                const epc_ll_shape *b)
{
    const struct {
        const char *name;
        int64_t a, b;
    } fields[] = {
        {"hidden", a->hidden, b->hidden},
        {"dtype (ep_dtype)", a->wire, b->wire},
        {"topk", a->topk, b->topk},
        {"num_experts", a->num_experts, b->num_experts},
        {"expert_rank (checksum)", a->table_sum, b->table_sum},
        {"scale (ep_scale)", a->scale, b->scale},
        {"masked ranks (checksum)", a->masked, b->masked},
        {"max_tokens", a->max_tokens, b->max_tokens},
        {"max_expert_rows", a->expert_rows, b->expert_rows},
        {"overflow (ep_overflow)", a->overflow, b->overflow},
    };
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        if (fields[i].a != fields[i].b)
            return epi_fail(
                EP_ERR_MISMATCH, "ep_ll_dispatch: %s differs: %lld on rank %d, %lld on rank %d",
                fields[i].name, (long long)fields[i].a, rank_a, (long long)fields[i].b, rank_b);
    return EP_OK;
}

static ep_status exchange(epc_buffer *b, setup *own, setup *all)
{
    if (own->status != EP_OK)
        strncpy(own->text, ep_last_error(), sizeof own->text - 1);
    EPI_TRY(epc_core.allgather(b->buffer->group, own, all, sizeof *own));
    if (own->status != EP_OK) /* a rank's own reason comes before the others' */
        return epi_fail((ep_status)own->status, "%s", own->text);
    int first = -1;
    for (int r = 0; r < b->num_ranks; r++) {
        if (b->buffer->group->masked[r])
            continue;
        first = first < 0 ? r : first;
        if (all[r].status != EP_OK)
            return epi_fail(EP_ERR_ABORTED, "ep_ll_dispatch: rank %d gave up: %s", r, all[r].text);
    }
    for (int r = first + 1; r < b->num_ranks; r++)
        if (!b->buffer->group->masked[r])
            EPI_TRY(compare_shapes(first, &all[first].shape, r, &all[r].shape));
    return EP_OK;
}

/* Collective: room for both areas in every rank's window, known to every rank. */
static ep_status share_areas(epc_buffer *b, epc_ll *ll, ep_status mine, setup *all)
{
    setup own;
    size_t bytes = 2 * (size_t)ll->area.bytes;
    memset(&own, 0, sizeof own);
    own.shape = ll->shape;
    own.status = mine;
    ll->areas = mine == EP_OK ? epc_take_shared(b, bytes) : NULL;
    own.lacks = ll->areas == NULL;
    EPI_TRY(exchange(b, &own, all));
    epc_settle(b, b->serial + 1, epc_other_ranks(b)); /* all have waited for their kernels */
    bool any = false;
    for (int r = 0; r < b->num_ranks; r++)
        any |= !b->buffer->group->masked[r] && all[r].lacks;
    if (any) {
        if (!ll->areas)
            ll->areas = epc_take_shared(b, bytes); /* where those of before were */
        EPI_TRY(epc_grow(b, "ep_ll_dispatch", ll->areas ? 0 : bytes));
        if (!ll->areas)
            ll->areas = epc_take_shared(b, bytes);
    }
    int place = 0;
    if (!ll->areas)
        own.status = epi_fail(EP_ERR_CAPACITY,
                              "ep_ll_dispatch: the window has no %zu bytes in one piece", bytes);
    else
        epc_locate(b, ll->areas->memory, bytes, &place, &own.offset);
    own.place = (uint32_t)place;
    /* Words of an earlier use must not pass for ones to come. */
    if (own.status == EP_OK)
        own.status = epi_gpu_zero(ll->areas->memory, bytes);
    ll->writers = own.status == EP_OK ? epc_other_ranks(b) : 0;
    EPI_TRY(exchange(b, &own, all));
    for (int r = 0; r < b->num_ranks; r++) {
        ll->place[r] = all[r].place;
        ll->offset[r] = all[r].offset;
    }
    return EP_OK;
}

static ep_status set_up(epc_buffer *b, const epc_ll_shape *shape, epc_table *table, bool *told)
{
    epc_ll *ll = calloc(1, sizeof *ll);
    setup *all = calloc((size_t)b->num_ranks, sizeof *all);
    if (!ll || !all) {
        free(ll);
        free(all);
        return epi_fail(EP_ERR_MEMORY, "ep_ll_dispatch: out of memory"); /* the others time out */
    }
    ll->shape = *shape;
    ll->table = table;
    ll->num_local = table->num_local;
    ll->max_local = table->max_local;
    lay_out(b, ll);
    ep_status status = EP_OK;
    for (int i = 0; i < 2 && status == EP_OK; i++)
        status = take_slot_memory(b, ll, &ll->slot[i]);
    status = share_areas(b, ll, status, all);
    free(all);
    if (status != EP_OK) {
        *told = true;
        free_ll(b, ll);
        return status;
    }
    b->ll = ll;
    return EP_OK;
}

/* Whether memory can make way for that of another shape. */
static ep_status check_unused(const epc_buffer *b)
{
    const epc_ll *ll = b->ll;
    if (!ll)
        return EP_OK;
    if (ll->slot[0].result || ll->slot[1].result)
        return epi_fail(EP_ERR_STATE, "ep_ll_dispatch: the shape (or the set of masked ranks) "
                                      "differs from that of a result still "
                                      "alive; release it with ep_ll_recv_release first");
    for (const epc_flight *flight = b->flights; flight; flight = flight->next)
        if (flight->second)
            return epi_fail(EP_ERR_STATE,
                            "ep_ll_dispatch: the shape (or the set of masked ranks) differs from "
                            "that of %s (call %u), whose hook has yet to run: ep_event_wait on "
                            "its event first",
                            flight->call, flight->serial);
    return EP_OK;
}

ep_status epc_ll_prepare_memory(epc_buffer *b, const epc_ll_shape *shape, epc_table *table,
                                bool capturing, bool *told)
{
    epc_ll *ll = b->ll;
    *told = false;
    if (ll && memcmp(&ll->shape, shape, sizeof *shape) == 0)
        return EP_OK;
    if (capturing)
        return epi_fail(
            EP_ERR_STATE,
            "ep_ll_dispatch: the first call with a shape waits for every rank and can't be "
            "captured; make it once before");
    EPI_TRY(check_unused(b));
    if (b->has_last) /* this rank writes to no peer any more */
        EPI_TRY(epi_gpu_event_wait(b->last_done));
    epc_ll_drop(b);
    return set_up(b, shape, table, told);
}

void epc_ll_refuse_memory(epc_buffer *b, ep_status status)
{
    char reason[EPI_ERROR_MAX];
    setup own, *all = calloc((size_t)b->num_ranks, sizeof *all);
    snprintf(reason, sizeof reason, "%s", ep_last_error());
    epc_resolve_all(b); /* as the others do first, and windows may grow for it */
    epi_fail(status, "%s", reason);
    memset(&own, 0, sizeof own);
    own.status = status;
    if (all)
        exchange(b, &own, all);
    free(all);
}

/* ---------------------------------------------------------------- the end */

static bool reached(uint32_t have, uint32_t want)
{
    return (int32_t)(have - want) >= 0;
}

/* Whether the rank of these flags has done with all that this rank let it read from memory of a
   shape. */
static bool has_read(const epc_ll *ll, const epc_state *state, const uint32_t *flags)
{
    bool done = true;
    for (int i = 0; i < 2; i++) {
        const uint32_t *of_slot = flags + EPC_FLAG_LL + i * EPC_LL_FLAGS;
        if (ll->slot[i].used)
            done &= reached(of_slot[EPC_LL_PULLED], state->ll_epoch[i]);
        if (ll->slot[i].combined)
            done &= reached(of_slot[EPC_LL_READ], state->ll_combine[i]);
    }
    return done;
}

/* From that of every shape: the last call may have been a graph's. */
static bool has_read_all(const epc_buffer *b, const epc_state *state, const uint32_t *flags)
{
    bool done = !b->ll || has_read(b->ll, state, flags);
    for (const epc_ll *ll = b->ll_kept; ll; ll = ll->next)
        done &= has_read(ll, state, flags);
    return done;
}

static bool all_have_read(const epc_buffer *b, const epc_state *state, uint32_t *flags)
{
    size_t bytes = (size_t)b->num_ranks * EPC_NUM_FLAGS * sizeof *flags;
    if (epi_gpu_get(flags, b->segments[0].memory, bytes) != EP_OK)
        return true; /* a device that fails is not waited for */
    for (int r = 0; r < b->num_ranks; r++)
        if (r != b->rank && !b->buffer->group->masked[r] && !(b->lost >> r & 1) &&
            !has_read_all(b, state, flags + r * EPC_NUM_FLAGS))
            return false;
    return true;
}

void epc_ll_await_readers(epc_buffer *b)
{
    static const struct timespec nap = {0, 1000000};
    epc_state state;
    if ((!b->ll && !b->ll_kept) || epi_gpu_get(&state, b->comm.state, sizeof state) != EP_OK)
        return;
    uint32_t *flags = malloc((size_t)b->num_ranks * EPC_NUM_FLAGS * sizeof *flags);
    for (int64_t ms = 0; flags && ms < b->buffer->group->timeout_ms; ms++) {
        if (all_have_read(b, &state, flags))
            break;
        nanosleep(&nap, NULL);
    }
    free(flags);
}
