/* SPDX-License-Identifier: MIT */
/*
 * Calls on buffers whose tensors live on an accelerator. The core checks the
 * arguments and hands the call to the device's module, which is built from the
 * same tree and sees these structs, but reaches functions of the core only
 * through the table below.
 */
#ifndef EPI_EP_BACKEND_H
#define EPI_EP_BACKEND_H

#include "entrepot/low_latency.h"
#include "ep/handle.h"

typedef struct epi_backend_services {
    ep_status (*allgather)(ep_group *group, const void *send, void *recv, size_t bytes);
    ep_status (*experts_init)(epi_experts *experts, const char *call, int64_t count,
                              const int32_t *expert_rank, int num_ranks, int rank);
    void (*experts_free)(epi_experts *experts);
    /* A handle without the arrays that a CPU dispatch fills; one holder. */
    ep_handle *(*handle_new)(ep_buffer *buffer);
    void (*handle_release)(ep_handle *handle);
    /* The public event around the device's. */
    ep_status (*event_new)(ep_buffer *buffer, void *device, ep_event **event);
    /* The device's part of an event, NULL for one of a CPU buffer. */
    void *(*event_device)(const ep_event *event);
    /* Memory of this host that all ranks see: `bytes` of each, zero at first. */
    ep_status (*shared_create)(ep_group *group, size_t bytes, epi_window **window);
    void (*shared_destroy)(epi_window *window);
} epi_backend_services;

/* Of ep_layout_on_stream, checked. */
typedef struct epi_layout_call {
    const ep_tensor *topk_idx;
    int64_t num_experts;
    const int32_t *expert_rank;
    int32_t num_ranks, ranks_per_node;
    int32_t *per_rank, *per_node, *per_expert;
    uint8_t *in_rank;
    void *stream;
} epi_layout_call;

typedef struct epi_backend_ops {
    void (*start)(const epi_backend_services *services);

    ep_status (*layout)(const epi_layout_call *call);

    /* Collective; sets buffer->device. The arguments are checked, the ranks agree on them. */
    ep_status (*create)(ep_buffer *buffer);
    void (*destroy)(ep_buffer *buffer);
    ep_status (*alloc)(ep_buffer *buffer, size_t bytes, void **memory);
    ep_status (*free)(ep_buffer *buffer, void *memory);
    void (*query)(const ep_buffer *buffer, ep_buffer_info *info);

    /* Collective, after a failure: waits for the device, and has all ranks count on from the same
       numbers. Low-latency results and halves of calls still due end. */
    ep_status (*align)(ep_buffer *buffer);

    /* The rank's part of a call that was refused with `status`; returns it. */
    ep_status (*reject)(ep_buffer *buffer, const char *call, ep_status status);
    ep_status (*dispatch)(ep_buffer *buffer, const ep_dispatch_args *args, ep_recv *recv,
                          ep_event **event);
    ep_status (*combine)(ep_buffer *buffer, const ep_combine_args *args, ep_event **event);
    ep_status (*dispatch_backward)(ep_buffer *buffer, const ep_dispatch_backward_args *args,
                                   ep_event **event);
    ep_status (*combine_backward)(ep_buffer *buffer, const ep_combine_backward_args *args,
                                  ep_recv *recv, ep_event **event);
    void (*recv_release)(void *owner);

    /* Fills what is still missing of the handle's host arrays. */
    ep_status (*handle_fetch)(ep_handle *handle);
    void (*handle_free)(ep_handle *handle);

    ep_status (*ll_dispatch)(ep_buffer *buffer, const ep_ll_dispatch_args *args, ep_ll_recv *recv,
                             ep_event **event);
    ep_status (*ll_combine)(ep_buffer *buffer, const ep_ll_combine_args *args, ep_event **event);
    ep_status (*ll_combine_buffer)(ep_buffer *buffer, ep_handle *handle, ep_tensor *y);
    void (*ll_recv_retire)(void *owner);
    void (*ll_recv_release)(void *owner);

    ep_status (*event_wait)(void *event);
    ep_status (*event_wait_counts)(void *event);
    ep_status (*event_query)(void *event);
    ep_status (*event_stream_wait)(void *event, void *stream);
    void (*event_free)(void *event);
} epi_backend_ops;

/* The backend of a device, ready to use. */
ep_status epi_backend_find(ep_device_type device, const epi_backend_ops **ops);

/* A call refused before it reached a CPU buffer's queue or a device. */
ep_status epi_reject(ep_buffer *buffer, const char *call, ep_status status);

#endif
