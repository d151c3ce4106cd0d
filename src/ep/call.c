/* SPDX-License-Identifier: MIT */
#include "ep/call.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"

#include <string.h>

void epi_call_notify_all(epi_op *op, int slot)
{
    ep_buffer *buffer = op->buffer;
    for (int i = 0; i < buffer->num_ranks; i++) {
        /* Start after this rank, so that not everybody wakes the same peer first. */
        int peer = (buffer->rank + 1 + i) % buffer->num_ranks;
        if (!buffer->group->masked[peer])
            buffer->window->transport->ops->notify(buffer->window, peer, slot, op->epoch);
    }
}

void epi_call_enter(epi_op *op, const epi_mail *mail, const int32_t *counts, int64_t num_counts)
{
    ep_buffer *buffer = op->buffer;
    for (int peer = 0; peer < buffer->num_ranks; peer++) {
        if (buffer->group->masked[peer])
            continue;
        epi_mailbox *box = epi_buffer_mailbox(buffer, peer, buffer->rank, op->epoch);
        box->mail = *mail;
        box->mail.epoch = op->epoch;
        if (num_counts)
            memcpy(box->counts, counts, (size_t)num_counts * sizeof *counts);
    }
    epi_call_notify_all(op, EPI_SLOT_ENTER);
    epi_op_await(op, EPI_SLOT_ENTER, op->epoch, NULL);
}

const epi_mailbox *epi_call_mail(const epi_op *op, int source)
{
    return epi_buffer_mailbox(op->buffer, op->buffer->rank, source, op->epoch);
}

int64_t epi_call_mask_sum(const ep_buffer *buffer)
{
    return buffer->group->mask_sum;
}

/* ENTER may have been raised by a later call of a rank that gave this one up: then what lies in
   its mailbox is older mail. */
static ep_status check_epochs(epi_op *op)
{
    for (int r = 0; r < op->buffer->num_ranks; r++)
        if (!op->buffer->group->masked[r] && epi_call_mail(op, r)->mail.epoch != op->epoch)
            return epi_op_aborted(op, r);
    return EP_OK;
}

ep_status epi_call_compare(const char *call, int rank_a, const int64_t *a, int rank_b,
                           const int64_t *b)
{
    static const char *const names[EPI_NUM_AGREED] = {
        [EPI_AGREED_CALL] = "the call (1 dispatch, 2 combine, 3 low-latency setup)",
        [EPI_AGREED_HIDDEN] = "hidden",
        [EPI_AGREED_DTYPE] = "dtype (ep_dtype)",
        [EPI_AGREED_TOPK] = "topk",
        [EPI_AGREED_TOPK_DTYPE] = "topk_idx.dtype (ep_dtype)",
        [EPI_AGREED_EXPERTS] = "num_experts",
        [EPI_AGREED_TABLE] = "expert_rank (checksum)",
        [EPI_AGREED_WEIGHTS] = "topk_weights given",
        [EPI_AGREED_SCALE] = "scale (ep_scale)",
        [EPI_AGREED_LAYOUT] = "layout (ep_row_layout)",
        [EPI_AGREED_ALIGNMENT] = "expert_alignment",
        [EPI_AGREED_HANDLE] = "handle (number of the call that made it)",
        [EPI_AGREED_MASK] = "masked ranks (checksum)",
        [EPI_AGREED_MAX_TOKENS] = "max_tokens",
        [EPI_AGREED_EXPERT_ROWS] = "max_expert_rows",
        [EPI_AGREED_OVERFLOW] = "overflow (ep_overflow)",
    };
    for (int i = 0; i < EPI_NUM_AGREED; i++)
        if (a[i] != b[i])
            return epi_disagree(call, names[i], rank_a, a[i], rank_b, b[i]);
    return EP_OK;
}

ep_status epi_call_agree(epi_op *op)
{
    const ep_buffer *buffer = op->buffer;
    EPI_TRY(check_epochs(op));
    int first = 0;
    while (buffer->group->masked[first])
        first++;
    const int64_t *want = epi_call_mail(op, first)->mail.agreed;
    for (int r = first + 1; r < buffer->num_ranks; r++)
        if (!buffer->group->masked[r])
            EPI_TRY(epi_call_compare(op->name, first, want, r, epi_call_mail(op, r)->mail.agreed));
    return EP_OK;
}

void epi_call_settle(epi_op *op)
{
    ep_buffer *buffer = op->buffer;
    const epi_transport_ops *ops = buffer->window->transport->ops;
    for (int r = 0; r < buffer->num_ranks; r++)
        if (buffer->group->masked[r] && epi_buffer_progress(buffer, r) < op->epoch &&
            ops->peer_alive(buffer->window->transport, r))
            return; /* left out but running: it may still write where it was told to */
    pthread_mutex_lock(&buffer->pool_lock);
    epi_pool_settle(&buffer->pool, op->epoch - 1);
    pthread_mutex_unlock(&buffer->pool_lock);
}

/* ------------------------------------------------------------- exposing */

/* Rows [skip, skip_end) are this rank's own: nobody else reads them, so they are not copied. */
typedef struct staging_job {
    const ep_tensor *tensor;
    uint8_t *to;
    int64_t skip, skip_end;
    bool streaming;
} staging_job;

static void stage_part(void *context, int part, int parts)
{
    const staging_job *job = context;
    const struct epi_codec *codec = epi_codec();
    size_t element = ep_dtype_size(job->tensor->dtype);
    size_t row = element * (size_t)job->tensor->shape[1];
    const uint8_t *from = job->tensor->data;
    int64_t begin, end;
    epi_team_share(job->tensor->shape[0], part, parts, &begin, &end);
    for (int64_t i = begin; i < end; i++)
        if (i < job->skip || i >= job->skip_end)
            codec->copy(job->to + (size_t)i * row,
                        from + element * (size_t)(i * job->tensor->stride[0]), row, job->streaming);
    codec->fence();
}

static ep_status stage_rows(ep_buffer *buffer, const ep_tensor *tensor, int64_t skip,
                            int64_t skip_end, size_t *offset)
{
    size_t bytes =
        ep_dtype_size(tensor->dtype) * (size_t)tensor->shape[1] * (size_t)tensor->shape[0];
    EPI_TRY(epi_buffer_take(buffer, bytes, offset));
    staging_job job = {
        .tensor = tensor, .to = buffer->window->base + *offset, .skip = skip, .skip_end = skip_end};
    epi_team_run(buffer->team, stage_part, &job);
    return EP_OK;
}

static ep_status expose_weights(ep_buffer *buffer, const ep_tensor *weights, epi_exposed *exposed)
{
    exposed->place.has_weights = 1;
    EPI_TRY(stage_rows(buffer, weights, 0, 0, &exposed->weights_staging));
    exposed->weights_staged = true;
    exposed->place.weights = exposed->weights_staging;
    return EP_OK;
}

/* Verify mode: checksums of the rows, beside them. */
static ep_status expose_sums(ep_buffer *buffer, const ep_tensor *tensor, epi_exposed *exposed)
{
    size_t rows = (size_t)tensor->shape[0], element = ep_dtype_size(tensor->dtype);
    EPI_TRY(epi_buffer_take(buffer, rows * sizeof(uint64_t), &exposed->sums_staging));
    exposed->sums_staged = true;
    exposed->place.sums = exposed->sums_staging;
    uint64_t *sums = (uint64_t *)(buffer->window->base + exposed->sums_staging);
    const uint8_t *row = tensor->data;
    for (size_t i = 0; i < rows; i++)
        sums[i] = epi_checksum(row + i * element * (size_t)tensor->stride[0],
                               element * (size_t)tensor->shape[1]);
    return EP_OK;
}

static void place_ordinary(const ep_tensor *tensor, epi_exposed *exposed)
{
    exposed->place.place = EPI_PLACE_ORDINARY;
    exposed->place.address = (uint64_t)(uintptr_t)tensor->data;
}

/* Memory outside the window: addressed where ranks share it, else copied. A system call could read
   it too, but took longer than the copy wherever it was measured; it serves when there is no room
   for a copy. */
static ep_status expose_ordinary(ep_buffer *buffer, const ep_tensor *tensor, int64_t own_begin,
                                 int64_t own_end, epi_exposed *exposed)
{
    epi_transport *transport = buffer->window->transport;
    if (transport->ops->peer_pointer || buffer->num_ranks == 1) {
        place_ordinary(tensor, exposed);
        return EP_OK;
    }
    ep_status status = stage_rows(buffer, tensor, own_begin, own_end, &exposed->staging);
    if (status == EP_ERR_MEMORY && transport->ops->can_peer_read(transport)) {
        place_ordinary(tensor, exposed);
        return EP_OK;
    }
    EPI_TRY(status);
    exposed->staged = true;
    exposed->place.place = EPI_PLACE_WINDOW;
    exposed->place.address = exposed->staging;
    exposed->place.stride = ep_dtype_size(tensor->dtype) * (size_t)tensor->shape[1];
    return EP_OK;
}

ep_status epi_expose(ep_buffer *buffer, const ep_tensor *tensor, const ep_tensor *weights,
                     int64_t own_begin, int64_t own_end, epi_exposed *exposed)
{
    size_t element = ep_dtype_size(tensor->dtype), rows = (size_t)tensor->shape[0];
    size_t step = element * (size_t)tensor->stride[0];
    size_t bytes = rows ? step * (rows - 1) + element * (size_t)tensor->shape[1] : 0;
    size_t offset;
    *exposed = (epi_exposed){.own = tensor->data, .own_stride = step};
    exposed->place.stride = step;
    if (epi_buffer_contains(buffer, tensor->data, bytes, &offset)) {
        exposed->place.place = EPI_PLACE_WINDOW;
        exposed->place.address = offset;
    } else {
        EPI_TRY(expose_ordinary(buffer, tensor, own_begin, own_end, exposed));
    }
    if (weights)
        EPI_TRY(expose_weights(buffer, weights, exposed));
    if (buffer->config.verify)
        EPI_TRY(expose_sums(buffer, tensor, exposed));
    return EP_OK;
}

void epi_unexpose(ep_buffer *buffer, epi_exposed *exposed)
{
    if (exposed->staged)
        epi_buffer_give(buffer, exposed->staging);
    if (exposed->weights_staged)
        epi_buffer_give(buffer, exposed->weights_staging);
    if (exposed->sums_staged)
        epi_buffer_give(buffer, exposed->sums_staging);
    *exposed = (epi_exposed){0};
}

/* ------------------------------------------------------------- reading */

static const void *ordinary_pointer(const epi_op *op, int source, uint64_t address)
{
    epi_transport *transport = op->buffer->window->transport;
    return transport->ops->peer_pointer ? transport->ops->peer_pointer(transport, source, address)
                                        : NULL;
}

bool epi_reader_must_fetch(const epi_op *op, int source)
{
    const epi_rows_place *place = &epi_call_mail(op, source)->mail.rows;
    return source != op->buffer->rank && place->place == EPI_PLACE_ORDINARY &&
           !ordinary_pointer(op, source, place->address);
}

const void *epi_reader_row(const epi_op *op, const epi_exposed *own, int source, int64_t row)
{
    if (source == op->buffer->rank)
        return (const uint8_t *)own->own + (size_t)row * own->own_stride;
    const epi_rows_place *place = &epi_call_mail(op, source)->mail.rows;
    uint64_t at = place->address + (uint64_t)row * place->stride;
    if (place->place == EPI_PLACE_WINDOW)
        return op->buffer->window->peer[source] + at;
    return ordinary_pointer(op, source, at);
}

ep_status epi_reader_fetch(const epi_op *op, int source, const int32_t *rows, int count,
                           uint8_t *const *local, size_t row_bytes, epi_remote_read *reads)
{
    const epi_rows_place *place = &epi_call_mail(op, source)->mail.rows;
    epi_transport *transport = op->buffer->window->transport;
    for (int i = 0; i < count; i++)
        reads[i] = (epi_remote_read){
            .remote = place->address + (uint64_t)rows[i] * place->stride,
            .local = local[i],
            .bytes = row_bytes,
        };
    return transport->ops->peer_read(transport, source, reads, (size_t)count);
}
