/* SPDX-License-Identifier: MIT */
/* A runtime that does everything at once: streams and events are names; eight devices. */
#include "base/error.h"
#include "device/gpu.h"
#include "device/module.h"
#include "state.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NUM_DEVICES 8

static _Thread_local int current;
static void *capturing; /* the stream whose work is being recorded, and forgotten */

ep_status epi_gpu_check(int code, const char *call)
{
    return code ? epi_fail(EP_ERR_DEVICE, "%.*s: error %d (fake)", (int)strcspn(call, "("), call,
                           code)
                : EP_OK;
}

ep_status epi_gpu_enter(int index, int *before)
{
    *before = current;
    if (index < 0 || index >= NUM_DEVICES)
        return epi_fail(EP_ERR_DEVICE, "cudaSetDevice: invalid device ordinal (fake)");
    current = index;
    return EP_OK;
}

void epi_gpu_leave(int before)
{
    current = before;
}

/* An H100's. */
ep_status epi_gpu_info_of(int index, epi_gpu_info *info)
{
    info->compute = 90;
    info->multiprocessors = 132;
    info->max_shared = 232448;
    memset(info->uuid, index, sizeof info->uuid);
    return EP_OK;
}

/* ---------------------------------------------------------------- streams and events */

static ep_status new_name(void **name, int *count)
{
    *name = malloc(1);
    if (!*name)
        return epi_fail(EP_ERR_MEMORY, "out of memory (fake)");
    __atomic_fetch_add(count, 1, __ATOMIC_RELAXED);
    return EP_OK;
}

static void drop_name(void *name, int *count)
{
    if (name)
        __atomic_fetch_sub(count, 1, __ATOMIC_RELAXED);
    free(name);
}

ep_status epi_gpu_event_create(void **event)
{
    return new_name(event, &fake_gpu_state.num_events);
}

void epi_gpu_event_destroy(void *event)
{
    drop_name(event, &fake_gpu_state.num_events);
}

ep_status epi_gpu_event_record(void *event, void *stream)
{
    (void)event, (void)stream;
    return EP_OK;
}

ep_status epi_gpu_event_query(void *event)
{
    (void)event;
    return EP_OK;
}

ep_status epi_gpu_event_wait(void *event)
{
    (void)event;
    return EP_OK;
}

ep_status epi_gpu_stream_wait_event(void *stream, void *event)
{
    (void)stream, (void)event;
    return EP_OK;
}

ep_status epi_gpu_is_capturing(void *stream, bool *is)
{
    *is = stream && stream == capturing;
    return EP_OK;
}

ep_status epi_gpu_stream_create(void **stream)
{
    return new_name(stream, &fake_gpu_state.num_streams);
}

void epi_gpu_stream_destroy(void *stream)
{
    drop_name(stream, &fake_gpu_state.num_streams);
}

/* ---------------------------------------------------------------- public calls */

static ep_status count_devices(int32_t *count)
{
    *count = NUM_DEVICES;
    return EP_OK;
}

static ep_status query_device(int32_t index, ep_device_info *info)
{
    (void)index;
    snprintf(info->name, sizeof info->name, "fake");
    info->compute_major = 9;
    info->multiprocessors = 132;
    info->memory_bytes = (int64_t)64 << 30;
    return EP_OK;
}

static ep_status device_alloc(int32_t index, size_t bytes, void **memory)
{
    (void)index;
    return epi_gpu_alloc(bytes ? bytes : 1, memory);
}

static ep_status device_free(int32_t index, void *memory)
{
    (void)index;
    epi_gpu_free(memory);
    return EP_OK;
}

static ep_status device_copy(int32_t index, void *to, const void *from, size_t bytes, void *stream)
{
    (void)index;
    return epi_gpu_copy(to, from, bytes, stream);
}

static ep_status stream_create(int32_t index, void **stream)
{
    (void)index;
    return epi_gpu_stream_create(stream);
}

static ep_status stream_destroy(int32_t index, void *stream)
{
    (void)index;
    epi_gpu_stream_destroy(stream);
    return EP_OK;
}

static ep_status stream_wait(int32_t index, void *stream)
{
    (void)index, (void)stream;
    return EP_OK;
}

static ep_status graph_begin(int32_t index, void *stream)
{
    (void)index;
    capturing = stream;
    return EP_OK;
}

static ep_status graph_end(int32_t index, void *stream, void **graph)
{
    (void)index;
    capturing = NULL;
    *graph = stream;
    return EP_OK;
}

static ep_status graph_launch(int32_t index, void *graph, void *stream)
{
    (void)index, (void)graph, (void)stream;
    return EP_OK;
}

static ep_status graph_destroy(int32_t index, void *graph)
{
    (void)index, (void)graph;
    return EP_OK;
}

/* Timers are left out: nothing here takes time. */
const epi_device_ops epi_module_device_ops = {
    .count = count_devices,
    .query = query_device,
    .alloc = device_alloc,
    .free = device_free,
    .copy = device_copy,
    .stream_create = stream_create,
    .stream_destroy = stream_destroy,
    .stream_wait = stream_wait,
    .graph_begin = graph_begin,
    .graph_end = graph_end,
    .graph_launch = graph_launch,
    .graph_destroy = graph_destroy,
};
