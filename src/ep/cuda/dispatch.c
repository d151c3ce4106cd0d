/* SPDX-License-Identifier: MIT */
/* Dispatch on the device: room for its rows, one kernel, and the counts that it reports. */
#include "ep/cuda/internal.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- the region */

static int64_t known_rows(const epc_dispatch *d)
{
    return d->cached ? d->handle->rows : d->params.worst ? d->params.worst : -1;
}

/* Pieces of free memory beside the region, as the others are to see them. */
static void list_pieces(const epc_buffer *b, int64_t *pieces, int n)
{
    epc_free_pieces(b, pieces, n);
    for (int i = 0; i < n; i++)
        pieces[i] -= pieces[i] % EPC_PIECE_UNIT;
}

/* Exactly what is needed where that is known, else the largest piece there is. */
static ep_status offer_region(epc_dispatch *d)
{
    epc_buffer *b = d->flight->owner;
    int64_t rows = known_rows(d);
    if (rows >= 0) {
        size_t bytes = (size_t)epc_region_of(&d->params.shape, rows).end;
        d->region = epc_take_follower(d->flight, d->handle->device, bytes);
        /* Without room the call goes on: all ranks must learn of it together. */
    } else
        d->region = epc_take_largest(b);
    d->params.place = d->region ? d->region->segment : 0;
    d->params.offset = d->region ? d->region->memory - b->segments[d->region->segment].memory : 0;
    d->params.pieces[0] = d->region ? (int64_t)d->region->bytes : 0;
    list_pieces(b, &d->params.pieces[1], EPC_PIECES - 1);
    d->params.region = d->region ? d->region->memory : NULL;
    return EP_OK;
}

static ep_status launch(epc_dispatch *d)
{
    epc_flight *flight = d->flight;
    d->params.serial = flight->serial;
    d->params.report = flight->report;
    d->params.timeout_ns = flight->owner->buffer->group->timeout_ms * 1000000;
    flight->normal = true;
    flight->written = d->params.region;
    flight->written_bytes = (size_t)d->params.pieces[0];
    EPI_TRY(epi_gpu_check(epc_dispatch_launch(&d->params, d->blocks, d->shared, flight->stream),
                          "cudaLaunchKernel"));
    if (!d->params.verify)
        return EP_OK;
    d->params.flip = epc_flip_now(flight->owner);
    return epi_gpu_check(epc_check_rows_launch(&d->params, d->blocks, flight->stream),
                         "cudaLaunchKernel");
}

/* ---------------------------------------------------------------- counts */

/* Rows and counts as the kernel reported them. */
static ep_status read_counts(epc_dispatch *d)
{
    ep_handle *handle = d->handle;
    epc_handle *device = handle->device;
    epc_report *report = d->flight->report;
    size_t ranks = (size_t)d->flight->owner->num_ranks, local = (size_t)handle->num_local;
    handle->rows = report->rows;
    handle->num_rows = report->num_rows;
    device->follower = epc_follower_bytes(epc_region_of(&d->params.shape, handle->rows).end,
                                          handle->rows, d->spare);
    handle->rows_between = malloc(ranks * ranks * sizeof(int32_t));
    device->host_tokens = malloc((local + 1) * sizeof(int32_t));
    if (!handle->rows_between || !device->host_tokens)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", d->flight->call);
    memcpy(handle->rows_between, epc_report_matrix(report), ranks * ranks * sizeof(int32_t));
    memcpy(device->host_tokens, epc_report_experts(report, (int)ranks), local * sizeof(int32_t));
    return EP_OK;
}

/* What this rank lacks for its rows and for the calls that may follow; 0: nothing. */
static size_t missing_bytes(const epc_dispatch *d, int64_t rows)
{
    const epc_buffer *b = d->flight->owner;
    const epc_dispatch_params *p = &d->params;
    int64_t end = epc_region_of(&p->shape, rows).end;
    size_t all = (size_t)(end + EPC_FOLLOWERS * epc_follower_bytes(end, rows, p->spare));
    if (epc_has_room(p->pieces, end, rows, p->spare))
        return 0;
    if (p->spare && epc_window_bytes(b) + all <= b->buffer->config.window_max_bytes)
        return all;
    return end > p->pieces[0] ? (size_t)end : 0; /* what follows takes its chance */
}

/* The kernel ended because some rank's rows had no room: all ranks know, and all come here. */
static ep_status make_room(epc_dispatch *d)
{
    epc_flight *flight = d->flight;
    epc_buffer *b = flight->owner;
    EPI_TRY(epc_await_end(flight));
    epc_block *old = d->region;
    d->region = NULL;
    epc_give(b, old);
    /* All ranks' counts are in. What an earlier call's failure kept back may be all that lacked. */
    if (epc_settle(b, flight->serial, flight->ranks))
        list_pieces(b, d->params.pieces, EPC_PIECES);
    size_t bytes = missing_bytes(d, flight->report->rows);
    d->params.spare = 0; /* what can be had is had: now only the region counts */
    EPI_TRY(epc_grow(b, flight->call, bytes));
    if (++b->serial == 0)
        ++b->serial;
    flight->serial = b->serial;
    EPI_TRY(offer_region(d));
    EPI_TRY(launch(d));
    EPI_TRY(epi_gpu_event_record(flight->done, flight->stream));
    return epi_gpu_event_record(b->last_done, flight->stream);
}

static bool lacks_room(const epc_flight *flight)
{
    return epc_counts_are_in(flight) && !flight->report->fits && flight->report->detail[3] == 0;
}

/* Waits until the rows of a launched dispatch are known, and fills the result. EP_OK also when the
   kernel failed: its report says how. */
static ep_status learn_rows(epc_dispatch *d)
{
    epc_flight *flight = d->flight;
    for (int tries = 0; epc_await_counts(flight); tries++) {
        if (flight->report->fits) {
            EPI_TRY(read_counts(d));
            return epc_publish(d);
        }
        EPI_TRY(epc_await_end(flight));
        if (!lacks_room(flight) || tries == 2)
            break;
        EPI_TRY(make_room(d));
    }
    return EP_OK;
}

static void free_dispatch(epc_dispatch *d)
{
    if (!d)
        return;
    epc_give(d->flight->owner, d->region);
    epc_core.handle_release(d->handle);
    free(d);
}

ep_status epc_resolve(epc_flight *flight)
{
    epc_dispatch *d = flight->unresolved;
    ep_status status = learn_rows(d);
    flight->unresolved = NULL;
    if (status != EP_OK && flight->status == EP_OK) {
        flight->status = status;
        snprintf(flight->message, sizeof flight->message, "%s", ep_last_error());
    }
    /* Late writers may still know the region of a call that failed: it comes free with the flight.
     */
    flight->blocks[0] = d->region;
    d->region = NULL;
    free_dispatch(d);
    return flight->status == EP_OK ? EP_OK : epc_outcome(flight);
}

/* ---------------------------------------------------------------- calls */

static ep_handle *new_handle(epc_buffer *b, const ep_dispatch_args *args, const epc_table *table)
{
    ep_handle *handle = epc_core.handle_new(b->buffer);
    if (!handle)
        return NULL;
    handle->num_tokens = args->x.shape[0];
    handle->topk = (int)args->topk_idx.shape[1];
    handle->num_local = table->num_local;
    handle->num_experts = args->num_experts;
    handle->hidden = args->x.shape[1];
    handle->layout = args->layout;
    handle->alignment = args->expert_alignment;
    handle->topk_dtype = args->topk_idx.dtype;
    handle->rows = args->num_worst_tokens;
    handle->num_rows = -1; /* until the counts are in */
    return handle;
}

static ep_status prepare_handle(epc_dispatch *d, const ep_dispatch_args *args,
                                const epc_table *table)
{
    epc_buffer *b = d->flight->owner;
    epc_handle *device = NULL;
    if (d->cached) {
        d->handle = args->handle;
        atomic_fetch_add(&d->handle->holders, 1);
        return EP_OK;
    }
    d->handle = new_handle(b, args, table);
    if (!d->handle)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", d->flight->call);
    bool weights = args->layout == EP_ROWS_BY_EXPERT && epc_given(&args->topk_weights);
    EPI_TRY(epc_handle_new(b, d->handle, weights, &device));
    d->handle->device = device;
    device->call = b->calls;
    d->handle->id = b->calls;
    device->table = (uint32_t)((uint64_t)table->sum ^ (uint64_t)table->sum >> 32);
    if (!weights)
        return EP_OK;
    const ep_tensor *w = &args->topk_weights;
    return epi_gpu_copy_rows(device->weights, (size_t)w->shape[1] * 4, w->data,
                             (size_t)w->stride[0] * 4, (size_t)w->shape[1] * 4, (size_t)w->shape[0],
                             d->flight->stream);
}

static ep_status prepare(epc_dispatch *d, const ep_dispatch_args *args)
{
    epc_buffer *b = d->flight->owner;
    epc_table *table = NULL;
    EPI_TRY(epc_choose_blocks(b, d->flight->call, args->num_sms, &d->blocks));
    if (!d->cached) {
        if (args->topk_idx.shape[1] > EPC_MAX_TOPK)
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "%s: topk_idx.shape[1] (top-k) is %lld; on CUDA it must be 1..%d",
                            d->flight->call, (long long)args->topk_idx.shape[1], EPC_MAX_TOPK);
        EPI_TRY(epc_find_table(b, d->flight->call, args->num_experts, args->expert_rank, &table));
    }
    EPI_TRY(prepare_handle(d, args, table));
    epc_describe_dispatch(d, args, table);
    epc_plan_units(&d->params, b->num_ranks);
    EPI_TRY(epc_plan_block(b, d));
    EPI_TRY(epc_plan_scratch(b, d));
    epc_fill_comm(b, &d->params.comm);
    return offer_region(d);
}

static ep_status no_room(const epc_dispatch *d)
{
    const epc_buffer *b = d->flight->owner;
    int64_t rows = known_rows(d);
    size_t bytes = (size_t)epc_region_of(&d->params.shape, rows).end;
    return epi_fail(EP_ERR_CAPACITY,
                    "%s: %lld rows (%s) take %zu bytes in one piece, the window has %zu; this call "
                    "can't wait for it to grow: release results, or create the buffer with "
                    "window_bytes of %zu or more",
                    d->flight->call, (long long)rows, d->cached ? "of handle" : "num_worst_tokens",
                    bytes, epc_largest_piece(b), epc_window_bytes(b) + bytes);
}

/* Worst-case and cached modes: all is known, nothing is waited for. */
static ep_status complete_known(epc_dispatch *d, ep_event **event)
{
    epc_flight *flight = d->flight;
    atomic_fetch_add(&d->handle->holders, 1);
    flight->handle = d->handle;
    /* Without a region there are no rows to point at; the kernel tells the other ranks. */
    ep_status status = d->region ? epc_publish(d) : no_room(d);
    flight->claimed = status != EP_OK; /* said now, not by the next call */
    flight->blocks[0] = d->region;     /* the kernel writes there, whatever failed */
    d->region = NULL;
    free_dispatch(d);
    if (status != EP_OK) {
        char message[EPI_ERROR_MAX];
        snprintf(message, sizeof message, "%s", ep_last_error());
        epc_launched(flight, NULL);
        return epi_fail(status, "%s", message);
    }
    ep_status launched = epc_launched(flight, event);
    return launched;
}

static ep_status submit(epc_dispatch *d, ep_event **event)
{
    epc_flight *flight = d->flight;
    if (known_rows(d) >= 0)
        return complete_known(d, event);
    if (flight->slot >= EPC_MAX_FLIGHTS) {
        free_dispatch(d);
        epc_cancel(flight);
        return epi_fail(
            EP_ERR_STATE,
            "ep_dispatch: the stream is being captured; only calls with num_worst_tokens "
            "or handle can be, others wait for counts");
    }
    flight->unresolved = d;
    flight->by_counts = true;
    flight->claimed = event == NULL; /* this call itself reports how it goes, as far as it waits */
    EPI_TRY(epc_launched(flight, event));
    if (event)
        return EP_OK;
    ep_status status = epc_resolve(flight);
    if (status != EP_OK || !epc_counts_are_in(flight) || !flight->report->fits)
        return epc_end(flight);
    flight->claimed = false; /* what fails from now on, the next call reports */
    return EP_OK;
}

static ep_status start(ep_buffer *buffer, const char *call, const ep_dispatch_args *args,
                       ep_recv *recv, bool weighted, epc_dispatch **out)
{
    epc_flight *flight;
    EPI_TRY(epc_begin(epc_of(buffer), call, args->stream, args->previous, &flight));
    epc_dispatch *d = calloc(1, sizeof *d);
    if (!d) {
        epc_cancel(flight);
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", call);
    }
    flight->dispatches = true;
    d->flight = flight;
    d->recv = recv;
    d->cached = args->handle != NULL;
    d->weighted = weighted;
    d->wire_dtype = args->wire == EP_WIRE_FP8 ? EP_E4M3 : args->x.dtype;
    d->topk_dtype = args->topk_idx.dtype;
    d->scale = args->x.dtype != EP_E4M3           ? args->scale
               : args->scales.dtype == EP_UE8M0X4 ? EP_SCALE_UE8M0
                                                  : EP_SCALE_F32;
    if (args->allocator) {
        d->has_allocator = true;
        d->allocator = *args->allocator;
    }
    *out = d;
    return EP_OK;
}

/* Nothing was launched: frees everything and takes part in the collective by refusing it. */
static ep_status refuse(epc_dispatch *d, ep_status status)
{
    epc_flight *flight = d->flight;
    ep_buffer *buffer = flight->owner->buffer;
    const char *call = flight->call;
    free_dispatch(d);
    epc_cancel(flight);
    return epc_reject(buffer, call, status);
}

ep_status epc_dispatch_call(ep_buffer *buffer, const ep_dispatch_args *args, ep_recv *recv,
                            ep_event **event)
{
    epc_dispatch *d = NULL;
    ep_status status = start(buffer, "ep_dispatch", args, recv, false, &d);
    if (status != EP_OK)
        return epc_reject(buffer, "ep_dispatch", status);
    status = prepare(d, args);
    if (status == EP_OK)
        status = launch(d);
    return status == EP_OK ? submit(d, event) : refuse(d, status);
}

ep_status epc_combine_backward_call(ep_buffer *buffer, const ep_combine_backward_args *args,
                                    ep_recv *recv, ep_event **event)
{
    const char *call = "ep_combine_backward";
    ep_dispatch_args forward = EP_DISPATCH_ARGS_INIT;
    const epc_handle *device = args->handle->device;
    bool by_expert = args->handle->layout == EP_ROWS_BY_EXPERT;
    epc_dispatch *d = NULL;
    bool halves = epc_given(&args->grad_topk_weights);
    if (halves) { /* dot products first: a call of its own */
        epc_combine_call_args dots = {.call = call,
                                      .y = args->y,
                                      .dot = args->grad_out,
                                      .out_weights = args->grad_topk_weights,
                                      .handle = args->handle,
                                      .previous = args->previous,
                                      .stream = args->stream,
                                      .num_sms = args->num_sms,
                                      .first_half = true};
        EPI_TRY(epc_combine_run(buffer, &dots, NULL));
    }
    forward.x = args->grad_out;
    forward.handle = args->handle;
    forward.allocator = args->allocator;
    forward.previous = args->previous;
    forward.stream = args->stream;
    forward.num_sms = args->num_sms;
    ep_status status = start(buffer, call, &forward, recv, by_expert, &d);
    if (status != EP_OK)
        return epc_reject(buffer, call, status);
    status = prepare(d, &forward);
    d->flight->second_half = halves;
    d->params.second_half = halves;
    if (status == EP_OK && by_expert) {
        d->params.weighted = 1;
        d->params.row_weight =
            epc_given(&args->topk_weights) ? args->topk_weights.data : device->weights;
        d->params.row_weight_stride =
            epc_given(&args->topk_weights) ? args->topk_weights.stride[0] : args->handle->topk;
    }
    if (status == EP_OK)
        status = launch(d);
    return status == EP_OK ? submit(d, event) : refuse(d, status);
}
