/* SPDX-License-Identifier: MIT */
/*
 * Lets a test that was written for host memory run on a device as well. Included
 * after the library's headers, it makes the calls below go through stand-ins of
 * the same form. Where EP_TEST_DEVICE names no device these only pass on; else
 * buffers are made on the rank's device, inputs and outputs go there and back, and
 * of results the test sees host copies. A result's copy, or that of a send buffer,
 * given as expert outputs is written back to where it came from and used there.
 * A blocking call becomes one with an event, so that its status is its own; when it
 * fails, what it left in the result is released and the result is as it was before.
 * A tensor whose device is ON_DEVICE_OTHER lies on another kind of device than the
 * buffer, and device_index counts from the buffer's.
 */
#ifndef EP_TEST_ON_DEVICE_H
#define EP_TEST_ON_DEVICE_H

#include "entrepot/low_latency.h"

#define ON_DEVICE_OTHER ((ep_device_type)99)

ep_status on_device_buffer_create(ep_group *group, const ep_buffer_config *config,
                                  ep_buffer **buffer);
void on_device_buffer_destroy(ep_buffer *buffer);
ep_status on_device_dispatch(ep_buffer *buffer, const ep_dispatch_args *args, ep_recv *recv,
                             ep_event **event);
ep_status on_device_combine(ep_buffer *buffer, const ep_combine_args *args, ep_event **event);
ep_status on_device_dispatch_backward(ep_buffer *buffer, const ep_dispatch_backward_args *args,
                                      ep_event **event);
ep_status on_device_combine_backward(ep_buffer *buffer, const ep_combine_backward_args *args,
                                     ep_recv *recv, ep_event **event);
void on_device_recv_release(ep_recv *recv);
ep_status on_device_ll_dispatch(ep_buffer *buffer, const ep_ll_dispatch_args *args,
                                ep_ll_recv *recv, ep_event **event);
ep_status on_device_ll_combine(ep_buffer *buffer, const ep_ll_combine_args *args, ep_event **event);
ep_status on_device_ll_combine_buffer(ep_buffer *buffer, ep_handle *handle, ep_tensor *y);
void on_device_ll_recv_release(ep_ll_recv *recv);
ep_status on_device_event_wait(ep_event *event);
void on_device_event_release(ep_event *event);

#ifndef EP_TEST_ON_DEVICE_ITSELF
#define ep_buffer_create on_device_buffer_create
#define ep_buffer_destroy on_device_buffer_destroy
#define ep_dispatch on_device_dispatch
#define ep_combine on_device_combine
#define ep_dispatch_backward on_device_dispatch_backward
#define ep_combine_backward on_device_combine_backward
#define ep_recv_release on_device_recv_release
#define ep_ll_dispatch on_device_ll_dispatch
#define ep_ll_combine on_device_ll_combine
#define ep_ll_combine_buffer on_device_ll_combine_buffer
#define ep_ll_recv_release on_device_ll_recv_release
#define ep_event_wait on_device_event_wait
#define ep_event_release on_device_event_release
#endif

#endif
