/* SPDX-License-Identifier: MIT */
#define EP_TEST_ON_DEVICE_ITSELF
#include "support/on_device.h"

#include "support/tensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MOST_BYTES ((size_t)1 << 30) /* a tensor that claims more is one of a test of arguments */

/* Host memory of the test and what stands for it on the device. */
typedef struct mirror {
    char *host, *device;
    size_t bytes;
    const void *key; /* of the result it belongs to */
    struct mirror *next;
} mirror;

/* A call: what has to come back from the device, and the memory lent to it. */
typedef struct call {
    ep_event *event;
    ep_status status;
    bool done;
    char *lent[8], *back[8]; /* device memory, and where its contents go or NULL */
    size_t bytes[8];
    int count;
    ep_recv *recv, recv_before;
    ep_ll_recv *ll_recv, ll_recv_before;
    bool by_hook;
    bool viewed;
    struct call *next;
} call;

static _Thread_local mirror *mirrors;
static _Thread_local call *calls; /* with an event that the test has */
static _Thread_local int num_buffers;

static bool on_device(void)
{
    return test_device.type != EP_DEVICE_CPU;
}

static void copy(void *to, const void *from, size_t bytes)
{
    if (ep_device_copy(test_device.type, test_device.index, to, from, bytes, test_device.stream) ==
        EP_OK)
        return;
    fprintf(stderr, "the test's device: %s\n", ep_last_error());
    abort();
}

/* Bytes from the first element to the last; false for what is no tensor. */
static bool extent(const ep_tensor *t, size_t *bytes)
{
    size_t size = (unsigned)t->dtype < 32 ? ep_dtype_size(t->dtype) : 0, elements = 1;
    if (!t->data || t->device != EP_DEVICE_CPU || t->ndim < 1 || t->ndim > 3 || size == 0)
        return false;
    *bytes = 0;
    for (int i = 0; i < t->ndim; i++) {
        if (t->shape[i] < 0 || t->stride[i] < 0 || (size_t)t->shape[i] > MOST_BYTES ||
            (size_t)t->stride[i] > MOST_BYTES)
            return false;
        if (t->shape[i] == 0)
            return true;
        elements += (size_t)(t->shape[i] - 1) * (size_t)t->stride[i];
    }
    *bytes = elements * size;
    return *bytes <= MOST_BYTES;
}

/* ---------------------------------------------------------------- mirrors */

static mirror *mirror_of(const void *host)
{
    for (mirror *m = mirrors; m; m = m->next)
        if ((const char *)host >= m->host && (const char *)host < m->host + m->bytes)
            return m;
    return NULL;
}

/* The test sees a host copy instead of the device's tensor. */
static void view(ep_tensor *t, const void *key)
{
    size_t bytes;
    ep_tensor host = *t;
    host.device = EP_DEVICE_CPU;
    if (t->device == EP_DEVICE_CPU || !extent(&host, &bytes))
        return;
    mirror *m = test_zeros(1, sizeof *m);
    *m = (mirror){test_zeros((int64_t)bytes + 64, 1), t->data, bytes + 1, key, mirrors};
    mirrors = m;
    host.data = m->host;
    *t = host;
}

static void drop_views(const void *key)
{
    for (mirror **each = &mirrors; *each;) {
        mirror *m = *each;
        if (m->key != key) {
            each = &m->next;
            continue;
        }
        *each = m->next;
        free(m->host);
        free(m);
    }
}

static void refresh_views(const void *key)
{
    for (mirror *m = mirrors; m; m = m->next)
        if (m->key == key)
            copy(m->host, m->device, m->bytes - 1);
}

/* ---------------------------------------------------------------- arguments */

/* Moves a tensor to the device: to where it came from, or to memory lent to the call. */
static void move(call *c, ep_tensor *t, bool comes_back)
{
    size_t bytes;
    if (t->device == ON_DEVICE_OTHER) {
        t->device = EP_DEVICE_CPU;
        return;
    }
    if (!extent(t, &bytes)) {
        if (t->ndim && t->device == EP_DEVICE_CPU)
            t->device = test_device.type, t->device_index += test_device.index;
        return;
    }
    mirror *m = mirror_of(t->data);
    char *host = t->data, *device = m ? m->device + (host - m->host) : test_memory_new(bytes + 256);
    copy(device, host, bytes);
    t->data = device;
    t->device = test_device.type;
    t->device_index += test_device.index;
    if (m)
        return;
    c->lent[c->count] = device;
    c->back[c->count] = comes_back ? host : NULL;
    c->bytes[c->count++] = bytes;
}

static void in(call *c, ep_tensor *t)
{
    move(c, t, false);
}

static void out(call *c, ep_tensor *t)
{
    move(c, t, true);
}

/* ---------------------------------------------------------------- calls */

static void make_views(call *c)
{
    if (c->recv && c->recv->owner) {
        ep_recv *r = c->recv;
        ep_tensor *all[] = {&r->x,
                            &r->scales,
                            &r->topk_idx,
                            &r->topk_weights,
                            &r->source_token,
                            &r->source_offset,
                            &r->expert_offset,
                            &r->tokens_per_expert};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            view(all[i], r->owner);
    }
    if (c->ll_recv && c->ll_recv->handle) {
        ep_ll_recv *r = c->ll_recv;
        ep_tensor *all[] = {&r->x,     &r->scales, &r->source_token, &r->source_range,
                            &r->count, &r->dropped};
        for (size_t i = 0; i < sizeof all / sizeof *all; i++)
            view(all[i], r->handle);
    }
    c->viewed = true;
}

/* The call has ended: everything comes back, and what was lent may serve another. */
static void end_call(call *c)
{
    c->done = true;
    for (int i = 0; i < c->count; i++) {
        if (c->back[i])
            copy(c->back[i], c->lent[i], c->bytes[i]);
        test_memory_free(c->lent[i]);
    }
    c->count = 0;
    if (c->status != EP_OK)
        return;
    if (!c->viewed)
        make_views(c);
    if (c->recv)
        refresh_views(c->recv->owner);
    if (c->ll_recv)
        refresh_views(c->ll_recv->handle);
}

/* On a CPU the result of a call that failed would not be filled. */
static void take_back(call *c)
{
    if (c->ll_recv && !c->by_hook && c->ll_recv->owner != c->ll_recv_before.owner) {
        on_device_ll_recv_release(c->ll_recv);
        *c->ll_recv = c->ll_recv_before;
    }
    if (c->recv && c->recv->owner != c->recv_before.owner) {
        ep_handle *handle = c->recv->handle;
        ep_recv_release(c->recv);
        ep_handle_release(handle);
    }
    if (c->recv)
        *c->recv = c->recv_before;
}

/* The message must outlive the copies made after the call. */
static ep_status settle(call *c)
{
    c->status = ep_event_wait(c->event);
    end_call(c);
    if (c->status != EP_OK)
        take_back(c);
    return c->status;
}

/* What every stand-in does once the call has returned `status`. */
static ep_status returned(call *c, ep_status status, ep_event **event)
{
    c->status = status;
    if (status != EP_OK || !c->event) {
        end_call(c);
        ep_event_release(c->event);
        free(c);
        return status;
    }
    if (event) {
        *event = c->event;
        c->next = calls;
        calls = c;
        if (c->ll_recv && c->ll_recv->handle)
            make_views(c); /* a hook's result has its tensors already */
        return status;
    }
    status = settle(c);
    ep_event_release(c->event);
    free(c);
    return status;
}

static call *new_call(void)
{
    return test_zeros(1, sizeof(call));
}

static call *call_of(const ep_event *event)
{
    for (call *c = calls; c; c = c->next)
        if (c->event == event)
            return c;
    return NULL;
}

ep_status on_device_event_wait(ep_event *event)
{
    call *c = call_of(event);
    if (!c || c->done)
        return ep_event_wait(event);
    return settle(c);
}

void on_device_event_release(ep_event *event)
{
    for (call **each = &calls; *each; each = &(*each)->next) {
        call *c = *each;
        if (c->event != event)
            continue;
        *each = c->next;
        if (!c->done)
            settle(c);
        free(c);
        break;
    }
    ep_event_release(event);
}

/* ---------------------------------------------------------------- stand-ins */

ep_status on_device_buffer_create(ep_group *group, const ep_buffer_config *config,
                                  ep_buffer **buffer)
{
    ep_buffer_config here = EP_BUFFER_CONFIG_INIT;
    if (!test_device_wanted() || !group || (config && config->size != sizeof here))
        return ep_buffer_create(group, config, buffer);
    if (!on_device() && test_device_enter(ep_group_rank(group)) != EP_OK)
        return EP_ERR_DEVICE;
    if (config)
        here = *config;
    here.device = test_device.type;
    here.device_index += test_device.index;
    ep_status status = ep_buffer_create(group, &here, buffer);
    num_buffers += status == EP_OK;
    return status;
}

void on_device_buffer_destroy(ep_buffer *buffer)
{
    ep_buffer_destroy(buffer);
    if (buffer && on_device() && --num_buffers == 0)
        test_device_leave();
}

/* Arguments that are none go to the call as they are. */
#define PASS_ON(condition) (!on_device() || !args || args->size != sizeof *args || (condition))

ep_status on_device_dispatch(ep_buffer *buffer, const ep_dispatch_args *args, ep_recv *recv,
                             ep_event **event)
{
    if (PASS_ON(!recv || recv->size != sizeof *recv))
        return ep_dispatch(buffer, args, recv, event);
    ep_dispatch_args a = *args;
    call *c = new_call();
    in(c, &a.x);
    in(c, &a.scales);
    in(c, &a.topk_idx);
    in(c, &a.topk_weights);
    a.stream = a.stream ? a.stream : test_device.stream;
    c->recv = recv;
    c->recv_before = *recv;
    return returned(c, ep_dispatch(buffer, &a, recv, &c->event), event);
}

ep_status on_device_combine(ep_buffer *buffer, const ep_combine_args *args, ep_event **event)
{
    if (PASS_ON(false))
        return ep_combine(buffer, args, event);
    ep_combine_args a = *args;
    call *c = new_call();
    in(c, &a.y);
    in(c, &a.topk_weights);
    in(c, &a.bias[0]);
    in(c, &a.bias[1]);
    out(c, &a.out);
    out(c, &a.out_weights);
    a.stream = a.stream ? a.stream : test_device.stream;
    return returned(c, ep_combine(buffer, &a, &c->event), event);
}

ep_status on_device_dispatch_backward(ep_buffer *buffer, const ep_dispatch_backward_args *args,
                                      ep_event **event)
{
    if (PASS_ON(false))
        return ep_dispatch_backward(buffer, args, event);
    ep_dispatch_backward_args a = *args;
    call *c = new_call();
    in(c, &a.grad_recv_x);
    in(c, &a.grad_recv_weights);
    out(c, &a.grad_x);
    out(c, &a.grad_topk_weights);
    a.stream = a.stream ? a.stream : test_device.stream;
    return returned(c, ep_dispatch_backward(buffer, &a, &c->event), event);
}

ep_status on_device_combine_backward(ep_buffer *buffer, const ep_combine_backward_args *args,
                                     ep_recv *recv, ep_event **event)
{
    if (PASS_ON(!recv || recv->size != sizeof *recv))
        return ep_combine_backward(buffer, args, recv, event);
    ep_combine_backward_args a = *args;
    call *c = new_call();
    in(c, &a.grad_out);
    in(c, &a.topk_weights);
    in(c, &a.y);
    out(c, &a.grad_topk_weights);
    a.stream = a.stream ? a.stream : test_device.stream;
    c->recv = recv;
    c->recv_before = *recv;
    return returned(c, ep_combine_backward(buffer, &a, recv, &c->event), event);
}

void on_device_recv_release(ep_recv *recv)
{
    if (recv && recv->owner && on_device()) {
        drop_views(recv->owner);
        recv->x.device = test_device.type; /* as the library made it: it looks there */
    }
    ep_recv_release(recv);
}

ep_status on_device_ll_dispatch(ep_buffer *buffer, const ep_ll_dispatch_args *args,
                                ep_ll_recv *recv, ep_event **event)
{
    if (PASS_ON(!recv || recv->size != sizeof *recv))
        return ep_ll_dispatch(buffer, args, recv, event);
    ep_ll_dispatch_args a = *args;
    call *c = new_call();
    in(c, &a.x);
    in(c, &a.topk_idx);
    out(c, &a.expert_tokens);
    out(c, &a.wait_cost);
    a.stream = a.stream ? a.stream : test_device.stream;
    if (!event && a.completion == EP_COMPLETE_BY_HOOK)
        a.completion = EP_COMPLETE_IN_BACKGROUND;
    c->ll_recv = recv;
    c->ll_recv_before = *recv;
    c->by_hook = a.completion == EP_COMPLETE_BY_HOOK;
    return returned(c, ep_ll_dispatch(buffer, &a, recv, &c->event), event);
}

ep_status on_device_ll_combine(ep_buffer *buffer, const ep_ll_combine_args *args, ep_event **event)
{
    if (PASS_ON(false))
        return ep_ll_combine(buffer, args, event);
    ep_ll_combine_args a = *args;
    call *c = new_call();
    in(c, &a.y);
    in(c, &a.topk_idx);
    in(c, &a.topk_weights);
    out(c, &a.out);
    out(c, &a.wait_cost);
    a.stream = a.stream ? a.stream : test_device.stream;
    if (!event && a.completion == EP_COMPLETE_BY_HOOK)
        a.completion = EP_COMPLETE_IN_BACKGROUND;
    return returned(c, ep_ll_combine(buffer, &a, &c->event), event);
}

ep_status on_device_ll_combine_buffer(ep_buffer *buffer, ep_handle *handle, ep_tensor *y)
{
    ep_status status = ep_ll_combine_buffer(buffer, handle, y);
    if (status == EP_OK)
        view(y, handle);
    return status;
}

void on_device_ll_recv_release(ep_ll_recv *recv)
{
    if (recv && recv->handle)
        drop_views(recv->handle);
    ep_ll_recv_release(recv);
}
