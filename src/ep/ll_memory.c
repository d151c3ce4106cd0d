/* SPDX-License-Identifier: MIT */
/* Low latency: memory, of which only as much is backed as rows need. */
#include "ep/ll.h"

#include "base/error.h"

#include <stdlib.h>

#define PAGE ((size_t)EPI_POOL_ALIGN)

epi_ll_layout epi_ll_layout_at(const epi_ll *ll, int rank)
{
    return epi_ll_layout_of(&ll->shape, ll->buffer->num_ranks, ll->local_of[rank],
                            ll->buffer->config.verify);
}

uint8_t *epi_ll_area(const epi_ll *ll, int slot, int rank)
{
    return ll->buffer->window->peer[rank] + ll->slot[slot].peer_area[rank];
}

/* ------------------------------------------------------------- backing */

static size_t expert_room(const epi_ll *ll, const epi_ll_rows *rows)
{
    return (size_t)ll->shape.expert_rows * rows->row_bytes;
}

static void count_backed(epi_ll *ll, epi_ll_rows *rows, int local, size_t bytes)
{
    ll->buffer->sparse_bytes += bytes - rows->backed[local];
    epi_pool_count(&ll->buffer->pool, bytes, rows->backed[local]);
    rows->total += bytes - rows->backed[local];
    rows->backed[local] = bytes;
}

/* Gives back what no row of this call needs. */
static void drop_unused(epi_ll *ll, epi_ll_rows *rows, const int32_t *count)
{
    epi_window *window = ll->buffer->window;
    for (int l = 0; l < ll->experts.num_local; l++) {
        size_t start = rows->base + (size_t)l * expert_room(ll, rows);
        size_t need = (size_t)count[l] * rows->row_bytes;
        if (rows->backed[l] <= need)
            continue;
        size_t from = (start + need + PAGE - 1) / PAGE * PAGE;
        size_t to = (start + rows->backed[l]) / PAGE * PAGE;
        if (from < to)
            window->transport->ops->window_drop(window, from, to);
        count_backed(ll, rows, l, need);
    }
}

static ep_status back_rows(epi_ll *ll, epi_ll_rows *rows, const int32_t *count)
{
    epi_window *window = ll->buffer->window;
    size_t more = 0;
    for (int l = 0; l < ll->experts.num_local; l++) {
        size_t need = (size_t)count[l] * rows->row_bytes;
        more += need > rows->backed[l] ? need - rows->backed[l] : 0;
    }
    if (!more)
        return EP_OK;
    if (rows->total + more > ll->row_bound * rows->row_bytes)
        drop_unused(ll, rows, count);
    for (int l = 0; l < ll->experts.num_local; l++) {
        size_t need = (size_t)count[l] * rows->row_bytes;
        if (need <= rows->backed[l])
            continue;
        size_t start = rows->base + (size_t)l * expert_room(ll, rows);
        size_t from = (start + rows->backed[l]) / PAGE * PAGE;
        size_t to = (start + need + PAGE - 1) / PAGE * PAGE;
        EPI_TRY(window->transport->ops->window_back(window, from, to));
        count_backed(ll, rows, l, need);
    }
    return EP_OK;
}

/* The window's memory changes in one thread at a time: the caller's and the worker both do it. */
ep_status epi_ll_back_rows(epi_ll *ll, epi_ll_rows *rows, const int32_t *count)
{
    pthread_mutex_lock(&ll->buffer->pool_lock);
    ep_status status = back_rows(ll, rows, count);
    pthread_mutex_unlock(&ll->buffer->pool_lock);
    return status;
}

/* ------------------------------------------------------------- making */

static size_t end_of(const epi_ll *ll, const epi_ll_rows *rows)
{
    return rows->base + (size_t)ll->experts.num_local * expert_room(ll, rows);
}

/* Backs the last page: a caller that looks at all S rows of an expert must find memory, or a hole
   that the system fills, but not the end of a file. */
static ep_status reach_end(epi_ll *ll, const epi_ll_rows *rows)
{
    epi_window *window = ll->buffer->window;
    size_t end = end_of(ll, rows);
    if (end == rows->base)
        return EP_OK;
    return window->transport->ops->window_back(window, (end - 1) / PAGE * PAGE,
                                               (end + PAGE - 1) / PAGE * PAGE);
}

/* Called with the pool's lock held, as those that follow. */
static ep_status new_rows(epi_ll *ll, epi_ll_rows *rows, size_t row_bytes)
{
    size_t local = (size_t)ll->experts.num_local;
    rows->row_bytes = row_bytes;
    rows->backed = calloc(local + 1, sizeof *rows->backed);
    if (!rows->backed)
        return epi_fail(EP_ERR_MEMORY, "out of memory for low-latency rows");
    ep_status status = epi_pool_take(
        &ll->buffer->sparse_pool, local * (size_t)ll->shape.expert_rows * row_bytes, &rows->base);
    if (status != EP_OK) {
        free(rows->backed);
        rows->backed = NULL;
        return status;
    }
    return reach_end(ll, rows);
}

static ep_status new_slot(epi_ll *ll, epi_ll_slot *slot)
{
    ep_buffer *buffer = ll->buffer;
    size_t room = (size_t)ll->experts.num_local * (size_t)ll->shape.expert_rows;
    slot->peer_area = calloc((size_t)buffer->num_ranks, sizeof *slot->peer_area);
    slot->scales = calloc(room + 1, ll->scale_bytes ? ll->scale_bytes : 1);
    slot->source_token = calloc(room + 1, sizeof *slot->source_token);
    if (!slot->peer_area || !slot->scales || !slot->source_token)
        return epi_fail(EP_ERR_MEMORY, "out of memory for low-latency results");
    EPI_TRY(epi_pool_take(&buffer->pool, epi_ll_layout_at(ll, buffer->rank).bytes, &slot->area));
    EPI_TRY(new_rows(ll, &slot->x, ll->row_bytes));
    return new_rows(ll, &slot->y, 2 * (size_t)ll->shape.hidden);
}

static ep_status new_slots(epi_ll *ll)
{
    pthread_mutex_lock(&ll->buffer->pool_lock);
    ep_status status = EP_OK;
    for (int i = 0; i < 2 && status == EP_OK; i++)
        status = new_slot(ll, &ll->slot[i]);
    pthread_mutex_unlock(&ll->buffer->pool_lock);
    return status;
}

ep_status epi_ll_new(ep_buffer *buffer, const char *call, const epi_ll_shape *shape,
                     const int32_t *expert_rank, epi_ll **out)
{
    epi_ll *ll = calloc(1, sizeof *ll);
    if (!ll)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    ll->buffer = buffer;
    ll->holders = 1;
    ll->shape = *shape;
    ll->row_bytes = epi_ll_row_bytes(shape);
    ll->scale_bytes = epi_ll_scale_bytes(shape);
    ll->local_of = calloc((size_t)buffer->num_ranks, sizeof *ll->local_of);
    ep_status status = ll->local_of ? EP_OK : epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    if (status == EP_OK)
        status = epi_experts_init(&ll->experts, call, shape->num_experts, expert_rank,
                                  buffer->num_ranks, buffer->rank);
    for (int64_t e = 0; status == EP_OK && e < shape->num_experts; e++)
        ll->local_of[ll->experts.rank[e]]++;
    ll->row_bound = epi_ll_row_bound(shape, buffer->num_ranks, ll->experts.num_local);
    if (status == EP_OK)
        status = new_slots(ll);
    if (status != EP_OK) {
        epi_ll_release(ll);
        epi_ll_reclaim(buffer);
        return status;
    }
    *out = ll;
    return EP_OK;
}

/* ------------------------------------------------------------- freeing */

static void free_rows(epi_ll *ll, epi_ll_rows *rows)
{
    epi_window *window = ll->buffer->window;
    if (!rows->backed)
        return;
    size_t from = (rows->base + PAGE - 1) / PAGE * PAGE, to = end_of(ll, rows) / PAGE * PAGE;
    if (from < to) /* also what the caller touched past the rows */
        window->transport->ops->window_drop(window, from, to);
    for (int l = 0; l < ll->experts.num_local; l++)
        count_backed(ll, rows, l, 0);
    epi_pool_give(&ll->buffer->sparse_pool, rows->base);
}

/* Gives back the window's memory. */
static void leave_window(epi_ll *ll)
{
    for (int i = 0; i < 2; i++) {
        epi_ll_slot *slot = &ll->slot[i];
        if (slot->area)
            epi_pool_give(&ll->buffer->pool, slot->area);
        if (slot->has_y_block)
            epi_pool_give(&ll->buffer->pool, slot->y_block);
        free_rows(ll, &slot->x);
        free_rows(ll, &slot->y);
    }
}

static void free_ll(epi_ll *ll)
{
    for (int i = 0; i < 2; i++) {
        epi_ll_slot *slot = &ll->slot[i];
        free(slot->x.backed);
        free(slot->y.backed);
        free(slot->scales);
        free(slot->source_token);
        free(slot->peer_area);
    }
    epi_experts_free(&ll->experts);
    free(ll->local_of);
    free(ll);
}

void epi_ll_hold(epi_ll *ll)
{
    pthread_mutex_lock(&ll->buffer->pool_lock);
    ll->holders++;
    pthread_mutex_unlock(&ll->buffer->pool_lock);
}

void epi_ll_release(epi_ll *ll)
{
    if (!ll)
        return;
    ep_buffer *buffer = ll->buffer;
    pthread_mutex_lock(&buffer->pool_lock);
    if (--ll->holders == 0) { /* peers may still read it */
        ll->next = buffer->ll_old;
        buffer->ll_old = ll;
    }
    pthread_mutex_unlock(&buffer->pool_lock);
}

/* ------------------------------------------------------------- whose turn */

epi_ll *epi_ll_current(ep_buffer *buffer)
{
    pthread_mutex_lock(&buffer->pool_lock);
    epi_ll *ll = buffer->ll;
    if (ll)
        ll->holders++;
    pthread_mutex_unlock(&buffer->pool_lock);
    return ll;
}

void epi_ll_replace(ep_buffer *buffer, epi_ll *ll)
{
    pthread_mutex_lock(&buffer->pool_lock);
    epi_ll *old = buffer->ll;
    buffer->ll = ll;
    pthread_mutex_unlock(&buffer->pool_lock);
    epi_ll_release(old);
}

int epi_ll_next_slot(epi_ll *ll)
{
    pthread_mutex_lock(&ll->buffer->pool_lock);
    int slot = (int)(ll->calls & 1);
    pthread_mutex_unlock(&ll->buffer->pool_lock);
    return slot;
}

uint64_t epi_ll_take_turn(epi_ll *ll)
{
    pthread_mutex_lock(&ll->buffer->pool_lock);
    uint64_t turn = ++ll->calls;
    pthread_mutex_unlock(&ll->buffer->pool_lock);
    return turn;
}

void epi_ll_end_turn(epi_ll *ll, uint64_t turn, bool undo)
{
    ep_buffer *buffer = ll->buffer;
    pthread_mutex_lock(&buffer->pool_lock);
    bool current = buffer->ll == ll, last = turn == ll->calls;
    if (current && undo && last)
        ll->calls--;
    else if (current)
        buffer->ll = NULL;
    pthread_mutex_unlock(&buffer->pool_lock);
    if (current && !(undo && last))
        epi_ll_release(ll); /* the buffer's hold */
}

/* ------------------------------------------------------------- old memory */

uint64_t epi_ll_last_old(ep_buffer *buffer)
{
    uint64_t last = 0;
    pthread_mutex_lock(&buffer->pool_lock);
    for (const epi_ll *ll = buffer->ll_old; ll; ll = ll->next)
        if (ll->last_epoch > last)
            last = ll->last_epoch;
    pthread_mutex_unlock(&buffer->pool_lock);
    return last;
}

static bool all_have_ended(const ep_buffer *buffer, uint64_t epoch)
{
    bool all = true;
    for (int r = 0; r < buffer->num_ranks;
         r++) /* looks at masked ones too: what they said counts */
        all &= epi_slot_load(buffer->window, r, EPI_SLOT_DONE) >= epoch || buffer->group->masked[r];
    return all;
}

void epi_ll_reclaim(ep_buffer *buffer)
{
    pthread_mutex_lock(&buffer->pool_lock);
    for (epi_ll **link = &buffer->ll_old, *ll; (ll = *link);) {
        if (all_have_ended(buffer, ll->last_epoch)) {
            *link = ll->next;
            leave_window(ll);
            free_ll(ll);
        } else {
            link = &ll->next;
        }
    }
    pthread_mutex_unlock(&buffer->pool_lock);
}

void epi_ll_destroy(ep_buffer *buffer)
{
    /* Peers keep their own view of the window: what they still read stays as it is. */
    epi_ll_drop(buffer);
    while (buffer->ll_old) {
        epi_ll *ll = buffer->ll_old;
        buffer->ll_old = ll->next;
        free_ll(ll);
    }
}
