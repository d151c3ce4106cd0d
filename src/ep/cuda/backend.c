/* SPDX-License-Identifier: MIT */
/* Buffers on CUDA devices, and the table of calls that the core reaches. */
#include "ep/cuda/internal.h"

#include <stdlib.h>
#include <string.h>

epi_backend_services epc_core;

static void start(const epi_backend_services *services)
{
    epc_core = *services;
}

/* ---------------------------------------------------------------- buffers */

static ep_status check_device(epc_buffer *b)
{
    EPI_TRY(epi_gpu_info_of(b->device, &b->gpu));
    if (b->gpu.compute < 80)
        return epi_fail(
            EP_ERR_UNSUPPORTED,
            "ep_buffer_create: device %d has compute capability %d.%d; 8.0 or more is needed",
            b->device, b->gpu.compute / 10, b->gpu.compute % 10);
    if (b->num_ranks > EPC_MAX_RANKS)
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "ep_buffer_create: the group has %d ranks; on CUDA it must have 1..%d",
                        b->num_ranks, EPC_MAX_RANKS);
    if (b->max_experts > EPC_MAX_EXPERTS)
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "ep_buffer_create: max_experts is %d; on CUDA it must be 1..%d",
                        b->max_experts, EPC_MAX_EXPERTS);
    b->bulk = b->bulk && b->gpu.compute >= 90;
    return EP_OK;
}

/* Kernels are loaded now: a launch that had to load one could wait for a peer's kernel. */
static ep_status load_kernels(epc_buffer *b)
{
    EPI_TRY(epi_gpu_check(epc_verify_prepare(), "cudaFuncGetAttributes"));
    EPI_TRY(epi_gpu_check(epc_layout_prepare(), "cudaFuncGetAttributes"));
    EPI_TRY(epi_gpu_check(epc_ll_prepare(b->gpu.max_shared - 11 * 1024), "cudaFuncSetAttribute"));
    EPI_TRY(epi_gpu_check(epc_dispatch_prepare(b->gpu.max_shared - 2048), "cudaFuncSetAttribute"));
    return epi_gpu_check(epc_combine_prepare(b->gpu.max_shared - 11 * 1024),
                         "cudaFuncSetAttribute");
}

static ep_status make_local(epc_buffer *b)
{
    EPI_TRY(epc_settings_read(b));
    EPI_TRY(check_device(b));
    EPI_TRY(epc_window_check(b));
    EPI_TRY(load_kernels(b));
    b->report_bytes =
        sizeof(epc_report) +
        ((size_t)b->num_ranks * (size_t)b->num_ranks + (size_t)b->max_experts) * sizeof(int32_t);
    b->report_bytes = (b->report_bytes + 63) / 64 * 64;
    EPI_TRY(epi_gpu_host_alloc((EPC_MAX_FLIGHTS + 1) * b->report_bytes, (void **)&b->reports));
    b->free_slots = ~0ull;
    EPI_TRY(epi_gpu_stream_create(&b->stream));
    return epi_gpu_event_create(&b->last_done);
}

/* Ranks on one device share its multiprocessors. */
static ep_status find_sharing(epc_buffer *b, ep_status mine)
{
    struct {
        int64_t status;
        uint8_t uuid[16];
        char text[160];
    } own, *all = calloc((size_t)b->num_ranks, sizeof *all);
    memset(&own, 0, sizeof own);
    own.status = mine;
    memcpy(own.uuid, b->gpu.uuid, sizeof own.uuid);
    if (mine != EP_OK)
        strncpy(own.text, ep_last_error(), sizeof own.text - 1);
    ep_status status = all ? epc_core.allgather(b->buffer->group, &own, all, sizeof own)
                           : epi_fail(EP_ERR_MEMORY, "ep_buffer_create: out of memory");
    if (status == EP_OK && mine != EP_OK) /* a rank's own reason comes before the others' */
        status = epi_fail(mine, "%s", own.text);
    for (int r = 0; status == EP_OK && r < b->num_ranks; r++) {
        if (b->buffer->group->masked[r])
            continue;
        if (all[r].status != EP_OK)
            status =
                epi_fail(EP_ERR_ABORTED, "ep_buffer_create: rank %d failed: %s", r, all[r].text);
        b->sharing += memcmp(all[r].uuid, own.uuid, sizeof own.uuid) == 0;
    }
    free(all);
    if (status == EP_OK && b->sharing > b->gpu.multiprocessors)
        status = epi_fail(EP_ERR_UNSUPPORTED,
                          "ep_buffer_create: %d ranks share a device of %d multiprocessors",
                          b->sharing, b->gpu.multiprocessors);
    return status;
}

static void free_tables(epc_buffer *b)
{
    for (epc_table *table = b->tables, *next; table; table = next) {
        next = table->next;
        free(table);
    }
}

static void free_flights(epc_flight *flight)
{
    for (epc_flight *next; flight; flight = next) {
        next = flight->next;
        if (flight->handle)
            epc_core.handle_release(flight->handle);
        epi_gpu_event_destroy(flight->done);
        free(flight->second);
        free(flight);
    }
}

static void destroy_device(epc_buffer *b)
{
    if (b->has_last)
        epi_gpu_event_wait(b->last_done);
    if (b->reports)
        epc_collect(b);
    epc_ll_await_readers(b);
    free_flights(b->flights);
    free_flights(b->kept);
    epc_ll_destroy(b);
    free_tables(b);
    epc_exports_destroy(b);
    epc_reasons_destroy(b);
    epc_window_destroy(b);
    epi_gpu_event_destroy(b->last_done);
    epi_gpu_stream_destroy(b->stream);
    if (b->reports)
        epi_gpu_host_free(b->reports);
    free(b);
}

static ep_status build(epc_buffer *b)
{
    EPI_TRY(find_sharing(b, make_local(b)));
    EPI_TRY(epc_window_create(b));
    EPI_TRY(epc_reasons_create(b));
    return epc_exports_create(b);
}

static ep_status create(ep_buffer *buffer)
{
    int before;
    EPI_TRY(epi_gpu_enter(buffer->config.device_index, &before));
    epc_buffer *b = calloc(1, sizeof *b);
    ep_status status = b ? EP_OK : epi_fail(EP_ERR_MEMORY, "ep_buffer_create: out of memory");
    if (b) {
        b->buffer = buffer;
        b->device = buffer->config.device_index;
        b->rank = buffer->rank;
        b->num_ranks = buffer->num_ranks;
        b->max_experts = buffer->config.max_experts;
        status = build(b);
    }
    if (status == EP_OK)
        buffer->device = b;
    else if (b)
        destroy_device(b);
    epi_gpu_leave(before);
    return status;
}

static void destroy(ep_buffer *buffer)
{
    int before;
    if (epi_gpu_enter(buffer->config.device_index, &before) != EP_OK)
        return;
    destroy_device(epc_of(buffer));
    epi_gpu_leave(before);
}

static ep_status alloc(ep_buffer *buffer, size_t bytes, void **memory)
{
    epc_buffer *b = epc_of(buffer);
    int before;
    epc_collect(b); /* peers may still write to results of calls that have failed since */
    epc_block *block = epc_take_shared(b, bytes);
    if (!block) {
        EPI_TRY(epi_gpu_enter(b->device, &before));
        ep_status status = epc_take_within(b, bytes, &block);
        epi_gpu_leave(before);
        EPI_TRY(status);
    }
    *memory = block->memory;
    return EP_OK;
}

static ep_status give_back(ep_buffer *buffer, void *memory)
{
    epc_buffer *b = epc_of(buffer);
    epc_block *block = epc_find(b, memory);
    if (!block || block == b->segments[0].blocks)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_buffer_free: memory is %p; it must come from ep_buffer_alloc", memory);
    epc_give(b, block);
    return EP_OK;
}

static void query(const ep_buffer *buffer, ep_buffer_info *info)
{
    epc_buffer *b = epc_of(buffer);
    pthread_mutex_lock(&b->buffer->pool_lock);
    for (int s = 0; s < 2 * EPC_MAX_SEGMENTS; s++)
        info->window_bytes += b->segments[s].bytes;
    info->control_bytes = b->control_bytes;
    info->used_bytes = b->used;
    info->peak_bytes = b->peak + b->control_bytes;
    info->num_calls = b->calls;
    pthread_mutex_unlock(&b->buffer->pool_lock);
}

/* ---------------------------------------------------------------- refusals */

ep_status epc_begin_refusal(epc_buffer *b, epc_flight **flight)
{
    ep_status earlier = epc_begin(b, "a refused call", b->stream, NULL, flight);
    if (earlier == EP_OK)
        return EP_OK;
    EPI_TRY(epc_begin(b, "a refused call", b->stream, NULL, flight));
    b->failed = earlier; /* the next call reports it: this one has an error of its own */
    return EP_OK;
}

/* A kernel of one block that tells the others; its own report is of no interest. */
static ep_status launch_refusal(epc_buffer *b, ep_status status)
{
    epc_flight *flight;
    epc_combine_params p;
    memset(&p, 0, sizeof p);
    p.reject = epc_reason_publish(b, status, ep_last_error());
    EPI_TRY(epc_begin_refusal(b, &flight));
    p.field[EPC_F_OP] = EPC_OP_REJECT;
    p.dtype = EPC_BF16;
    p.serial = flight->serial;
    p.report = flight->report;
    p.timeout_ns = b->buffer->group->timeout_ms * 1000000;
    epc_fill_comm(b, &p.comm);
    ep_status launched =
        epi_gpu_check(epc_combine_launch(&p, 1, 0, flight->stream), "cudaLaunchKernel");
    if (launched != EP_OK) {
        epc_cancel(flight);
        return launched;
    }
    flight->claimed = true;
    return epc_launched(flight, NULL);
}

ep_status epc_reject(ep_buffer *buffer, const char *call, ep_status status)
{
    char message[EPI_ERROR_MAX];
    int before;
    strncpy(message, ep_last_error(), sizeof message - 1);
    message[sizeof message - 1] = 0;
    if (epi_gpu_enter(buffer->config.device_index, &before) == EP_OK) {
        /* if even this fails, the others time out */
        if (strncmp(call, "ep_ll_", 6) == 0)
            epc_ll_refuse(epc_of(buffer), strcmp(call, "ep_ll_combine") == 0, status);
        else
            launch_refusal(epc_of(buffer), status);
        epi_gpu_leave(before);
    }
    return epi_fail(status, "%s", message);
}

/* ---------------------------------------------------------------- the table */

/* Calls run with the buffer's device as the thread's, and leave the thread's as it was. */
#define ON_DEVICE(call)                                                  \
    do {                                                                 \
        int before_;                                                     \
        EPI_TRY(epi_gpu_enter((buffer)->config.device_index, &before_)); \
        ep_status status_ = (call);                                      \
        epi_gpu_leave(before_);                                          \
        return status_;                                                  \
    } while (0)

/* Each call of the caller's counts once, whether it is made, refused or made in halves: by these
   numbers ranks tell whether they speak of the same handle. */
#define COLLECTIVE(call)           \
    do {                           \
        epc_of((buffer))->calls++; \
        ON_DEVICE(call);           \
    } while (0)

/* The core has refused the call. */
static ep_status reject(ep_buffer *buffer, const char *call, ep_status status)
{
    epc_of(buffer)->calls++;
    return epc_reject(buffer, call, status);
}

static ep_status dispatch(ep_buffer *buffer, const ep_dispatch_args *args, ep_recv *recv,
                          ep_event **event)
{
    COLLECTIVE(epc_dispatch_call(buffer, args, recv, event));
}

static ep_status combine(ep_buffer *buffer, const ep_combine_args *args, ep_event **event)
{
    COLLECTIVE(epc_combine_call(buffer, args, event));
}

static ep_status dispatch_backward(ep_buffer *buffer, const ep_dispatch_backward_args *args,
                                   ep_event **event)
{
    COLLECTIVE(epc_dispatch_backward_call(buffer, args, event));
}

static ep_status combine_backward(ep_buffer *buffer, const ep_combine_backward_args *args,
                                  ep_recv *recv, ep_event **event)
{
    COLLECTIVE(epc_combine_backward_call(buffer, args, recv, event));
}

static ep_status ll_dispatch(ep_buffer *buffer, const ep_ll_dispatch_args *args, ep_ll_recv *recv,
                             ep_event **event)
{
    COLLECTIVE(epc_ll_dispatch_call(buffer, args, recv, event));
}

static ep_status ll_combine(ep_buffer *buffer, const ep_ll_combine_args *args, ep_event **event)
{
    COLLECTIVE(epc_ll_combine_call(buffer, args, event));
}

static ep_status align(ep_buffer *buffer)
{
    ON_DEVICE(epc_align(epc_of(buffer)));
}

static ep_status launch_layout(const epi_layout_call *call)
{
    const ep_tensor *ids = call->topk_idx;
    const epc_layout_params p = {.ids = ids->data,
                                 .tokens = ids->shape[0],
                                 .stride = ids->stride[0],
                                 .topk = (int32_t)ids->shape[1],
                                 .wide = ids->dtype == EP_I64,
                                 .num_experts = (int32_t)call->num_experts,
                                 .num_ranks = call->num_ranks,
                                 .ranks_per_node = call->ranks_per_node,
                                 .expert_rank = call->expert_rank,
                                 .per_rank = call->per_rank,
                                 .per_node = call->per_node,
                                 .per_expert = call->per_expert,
                                 .in_rank = call->in_rank};
    return epi_gpu_check(epc_layout_launch(&p, call->stream), "cudaLaunchKernel");
}

static ep_status layout(const epi_layout_call *call)
{
    int before;
    EPI_TRY(epi_gpu_enter(call->topk_idx->device_index, &before));
    ep_status status = launch_layout(call);
    epi_gpu_leave(before);
    return status;
}

static const epi_backend_ops ops = {
    .start = start,
    .layout = layout,
    .create = create,
    .destroy = destroy,
    .alloc = alloc,
    .free = give_back,
    .query = query,
    .align = align,
    .reject = reject,
    .dispatch = dispatch,
    .combine = combine,
    .dispatch_backward = dispatch_backward,
    .combine_backward = combine_backward,
    .recv_release = epc_recv_release,
    .handle_fetch = epc_handle_fetch,
    .handle_free = epc_handle_free,
    .ll_dispatch = ll_dispatch,
    .ll_combine = ll_combine,
    .ll_combine_buffer = epc_ll_combine_buffer_call,
    .ll_recv_retire = epc_ll_recv_retire,
    .ll_recv_release = epc_ll_recv_release,
    .event_wait = epc_event_wait,
    .event_wait_counts = epc_event_wait_counts,
    .event_query = epc_event_query,
    .event_stream_wait = epc_event_stream_wait,
    .event_free = epc_event_free,
};

const void *epi_cuda_backend(void);
const void *epi_cuda_backend(void)
{
    return &ops;
}
