/* SPDX-License-Identifier: MIT */
/* Low-latency dispatch: from everybody's tokens to rows packed per local expert. */
#include "ep/ll_dispatch.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const epi_ll_head *head_of(const epi_ll_dispatch *d, int source)
{
    return (const epi_ll_head *)epi_ll_area(d->ll, d->slot, source);
}

static const int32_t *ids_of(const epi_ll_dispatch *d, int source)
{
    return (const int32_t *)(epi_ll_area(d->ll, d->slot, source) +
                             epi_ll_layout_at(d->ll, source).ids);
}

static bool masked(const epi_ll_dispatch *d, int source)
{
    return d->op.buffer->group->masked[source];
}

/* ------------------------------------------------------------- counting */

/* Where no expert may overflow, every rank counts for all experts, so all see the same error. */
static ep_status check_overflow(const epi_ll_dispatch *d)
{
    const epi_ll_shape *shape = &d->ll->shape;
    if (shape->overflow != EP_OVERFLOW_ERROR ||
        shape->expert_rows >= shape->max_tokens * d->op.buffer->num_ranks)
        return EP_OK;
    int64_t *total = calloc((size_t)shape->num_experts, sizeof *total);
    if (!total)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", d->op.name);
    for (int s = 0; s < d->op.buffer->num_ranks; s++) {
        if (masked(d, s))
            continue;
        const int32_t *ids = ids_of(d, s), *end = ids + head_of(d, s)->num_tokens * shape->topk;
        for (; ids < end; ids++)
            if (*ids >= 0)
                total[*ids]++;
    }
    ep_status status = EP_OK;
    for (int64_t e = 0; e < shape->num_experts && status == EP_OK; e++)
        if (total[e] > shape->expert_rows)
            status = epi_fail(EP_ERR_CAPACITY,
                              "%s: expert %lld on rank %d receives %lld rows; max_expert_rows is "
                              "%lld",
                              d->op.name, (long long)e, (int)d->ll->experts.rank[e],
                              (long long)total[e], (long long)shape->expert_rows);
    free(total);
    return status;
}

/* Rows of each source within each expert's: fills range, count, dropped, packed and the table that
   the sources will read in combine. */
static void count_rows(epi_ll_dispatch *d)
{
    epi_ll *ll = d->ll;
    epi_ll_result *result = epi_ll_result_of(d);
    int num_ranks = d->op.buffer->num_ranks, me = d->op.buffer->rank;
    uint8_t *area = epi_ll_area(ll, d->slot, me);
    epi_ll_layout layout = epi_ll_layout_at(ll, me);
    const int32_t *owner = ll->experts.rank;
    int32_t *begin = (int32_t *)(area + layout.begin), *packed = (int32_t *)(area + layout.packed);
    for (int s = 0; s < num_ranks; s++) {
        if (masked(d, s))
            continue;
        const int32_t *ids = ids_of(d, s), *end = ids + head_of(d, s)->num_tokens * ll->shape.topk;
        for (; ids < end; ids++)
            if (*ids >= 0 && owner[*ids] == me)
                result->range[ll->experts.local[*ids] * num_ranks + s]++;
    }
    int32_t sum = 0, room = (int32_t)ll->shape.expert_rows;
    for (int l = 0; l < ll->experts.num_local; l++) {
        int32_t next = 0;
        for (int s = 0; s < num_ranks; s++) {
            int64_t *range = &result->range[l * num_ranks + s];
            int32_t rows = (int32_t)*range, fits = next + rows <= room ? rows : room - next;
            begin[l * num_ranks + s] = next;
            *range = (int64_t)next << 32 | fits;
            result->dropped[l] += rows - fits;
            next += fits;
        }
        result->count[l] = next;
        result->packed[l] = packed[l] = sum;
        sum += next;
    }
    result->packed[ll->experts.num_local] = sum;
}

/* ------------------------------------------------------------- placing */

typedef struct placer {
    epi_ll_dispatch *d;
    bool streaming;
    ep_status *status; /* [parts] */
    char (*message)[EPI_ERROR_MAX];
} placer;

static void put_scales(const epi_ll *ll, epi_ll_slot *slot, bool by_column, int local, int32_t row,
                       const uint8_t *scales)
{
    size_t words = ll->scale_bytes / 4, room = (size_t)ll->shape.expert_rows;
    uint8_t *base = slot->scales + (size_t)local * room * ll->scale_bytes;
    if (!by_column) {
        memcpy(base + (size_t)row * ll->scale_bytes, scales, ll->scale_bytes);
        return;
    }
    for (size_t i = 0; i < words; i++)
        memcpy(base + (i * room + (size_t)row) * 4, scales + i * 4, 4);
}

static ep_status verify_token(const epi_ll_dispatch *d, int source, int64_t token,
                              const uint8_t *row, const uint8_t *scales, uint64_t want)
{
    uint64_t have = epi_row_sum(row, d->ll->row_bytes, scales, d->ll->scale_bytes, (int32_t)token);
    if (have == want)
        return EP_OK;
    return epi_fail(EP_ERR_CORRUPT,
                    "%s (call %llu): token %lld of rank %d does not match its checksum", d->op.name,
                    (unsigned long long)d->op.epoch, (long long)token, source);
}

static ep_status place_source(const placer *p, int source, int32_t *next)
{
    epi_ll_dispatch *d = p->d;
    epi_ll *ll = d->ll;
    epi_ll_slot *slot = &ll->slot[d->slot];
    const struct epi_codec *codec = epi_codec();
    int num_ranks = d->op.buffer->num_ranks, me = d->op.buffer->rank, topk = ll->shape.topk;
    const uint8_t *area = epi_ll_area(ll, d->slot, source);
    epi_ll_layout layout = epi_ll_layout_at(ll, source);
    const int32_t *ids = ids_of(d, source);
    uint8_t *x = d->op.buffer->window->base + slot->x.base;
    int32_t room = (int32_t)ll->shape.expert_rows;
    for (int l = 0; l < ll->experts.num_local; l++)
        next[l] = (int32_t)(epi_ll_result_of(d)->range[l * num_ranks + source] >> 32);
    int64_t num_tokens = head_of(d, source)->num_tokens;
    for (int64_t t = 0; t < num_tokens; t++) {
        const uint8_t *row = area + layout.rows + (size_t)t * ll->row_bytes;
        const uint8_t *scales = area + layout.scales + (size_t)t * ll->scale_bytes;
        bool verified = !d->op.buffer->config.verify;
        for (int k = 0; k < topk; k++) {
            int32_t id = ids[t * topk + k];
            if (id < 0 || ll->experts.rank[id] != me)
                continue;
            int local = ll->experts.local[id];
            if (next[local] >= room)
                continue;
            size_t at = (size_t)local * (size_t)room + (size_t)next[local];
            if (!verified)
                EPI_TRY(verify_token(d, source, t, row, scales,
                                     ((const uint64_t *)(area + layout.sums))[t]));
            verified = true;
            codec->copy(x + at * ll->row_bytes, row, ll->row_bytes, p->streaming);
            if (ll->scale_bytes)
                put_scales(ll, slot, d->scales_by_column, local, next[local], scales);
            slot->source_token[at] = (int32_t)t;
            next[local]++;
        }
    }
    codec->fence();
    return EP_OK;
}

/* Parts share the sources; each source's rows have their own places. */
static void place_part(void *context, int part, int parts)
{
    const placer *p = context;
    epi_ll_dispatch *d = p->d;
    int64_t begin, end;
    epi_team_share(d->op.buffer->num_ranks, part, parts, &begin, &end);
    int32_t *next = malloc(((size_t)d->ll->experts.num_local + 1) * sizeof *next);
    p->status[part] = next ? EP_OK : epi_fail(EP_ERR_MEMORY, "%s: out of memory", d->op.name);
    for (int64_t s = begin; s < end && p->status[part] == EP_OK; s++)
        if (!masked(d, (int)s))
            p->status[part] = place_source(p, (int)s, next);
    if (p->status[part] != EP_OK)
        snprintf(p->message[part], sizeof p->message[part], "%s", ep_last_error());
    free(next);
}

static ep_status place_rows(epi_ll_dispatch *d)
{
    int parts = epi_team_parts(d->op.buffer->team);
    size_t bytes = (size_t)epi_ll_result_of(d)->packed[d->ll->experts.num_local] * d->ll->row_bytes;
    placer p = {.d = d, .streaming = bytes > EPI_STREAM_BYTES};
    p.status = calloc((size_t)parts, sizeof *p.status);
    p.message = calloc((size_t)parts, sizeof *p.message);
    ep_status status = EP_OK;
    if (!p.status || !p.message)
        status = epi_fail(EP_ERR_MEMORY, "%s: out of memory", d->op.name);
    else
        epi_team_run(d->op.buffer->team, place_part, &p);
    for (int i = 0; i < parts && status == EP_OK; i++)
        if (p.status[i] != EP_OK)
            status = epi_fail(p.status[i], "%s", p.message[i]);
    free(p.status);
    free(p.message);
    return status;
}

/* ------------------------------------------------------------- result */

static ep_tensor tensor_3d(void *data, ep_dtype dtype, int64_t a, int64_t b, int64_t c)
{
    ep_tensor tensor = ep_tensor_2d(data, dtype, a, b);
    tensor.ndim = 3;
    tensor.shape[2] = c;
    tensor.stride[2] = 1;
    tensor.stride[1] = c;
    tensor.stride[0] = b * c;
    return tensor;
}

static ep_tensor scales_tensor(const epi_ll *ll, const epi_ll_slot *slot, bool by_column)
{
    int64_t words = (int64_t)ll->scale_bytes / 4, room = ll->shape.expert_rows;
    ep_dtype dtype = ll->shape.scale == EP_SCALE_UE8M0 ? EP_UE8M0X4 : EP_F32;
    ep_tensor tensor = tensor_3d(slot->scales, dtype, ll->experts.num_local, room, words);
    if (by_column) {
        tensor.stride[1] = 1;
        tensor.stride[2] = room;
    }
    return tensor;
}

void epi_ll_describe(epi_ll_dispatch *d)
{
    const epi_ll *ll = d->ll;
    const epi_ll_slot *slot = &ll->slot[d->slot];
    const epi_ll_result *result = epi_ll_result_of(d);
    int64_t local = ll->experts.num_local, room = ll->shape.expert_rows;
    ep_ll_recv recv = EP_LL_RECV_INIT;
    recv.x = tensor_3d(d->op.buffer->window->base + slot->x.base, (ep_dtype)ll->shape.wire, local,
                       room, ll->shape.hidden);
    if (ll->scale_bytes)
        recv.scales = scales_tensor(ll, slot, d->scales_by_column);
    recv.count = ep_tensor_1d(result->count, EP_I32, local);
    recv.dropped = ep_tensor_1d(result->dropped, EP_I32, local);
    recv.source_token = ep_tensor_2d(slot->source_token, EP_I32, local, room);
    recv.source_range = ep_tensor_2d(result->range, EP_I64, local, d->op.buffer->num_ranks);
    recv.handle = epi_handle_hold(d->handle);
    recv.owner = d->handle;
    size_t size = d->recv->size;
    recv.size = size;
    memcpy(d->recv, &recv, size < sizeof recv ? size : sizeof recv);
}

/* ------------------------------------------------------------- the whole */

/* The areas read must be of this call; those of a rank that went on may be of a later one. */
static ep_status check_heads(epi_ll_dispatch *d)
{
    for (int s = 0; s < d->op.buffer->num_ranks; s++) {
        if (masked(d, s) || head_of(d, s)->epoch == d->op.epoch)
            continue;
        if (epi_op_gave_up(d->op.buffer, s, d->op.epoch))
            return epi_op_aborted(&d->op, s);
        return epi_fail(EP_ERR_MISMATCH,
                        "%s (call %llu): rank %d is out of step: an earlier call failed on some "
                        "ranks alone, or it has left this rank out",
                        d->op.name, (unsigned long long)d->op.epoch, s);
    }
    return EP_OK;
}

ep_status epi_ll_receive(epi_ll_dispatch *d)
{
    EPI_TRY(check_heads(d));
    EPI_TRY(check_overflow(d));
    count_rows(d);
    EPI_TRY(epi_ll_back_rows(d->ll, &d->ll->slot[d->slot].x, epi_ll_result_of(d)->count));
    EPI_TRY(place_rows(d));
    EPI_TRY(epi_op_check_given_up(&d->op));
    EPI_TRY(check_heads(d));
    if (epi_tensor_given(&d->expert_tokens)) {
        int32_t *tokens = d->expert_tokens.data;
        for (int l = 0; l < d->ll->experts.num_local; l++)
            tokens[l * d->expert_tokens.stride[0]] += epi_ll_result_of(d)->count[l];
    }
    return EP_OK;
}
