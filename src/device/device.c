/* SPDX-License-Identifier: MIT */
/* The public calls on devices, handed to the module that knows them. */
#include "entrepot/device.h"

#include "base/error.h"
#include "device/module.h"

#include <string.h>

static ep_status find(const char *call, ep_device_type type, const epi_device_ops **ops)
{
    const epi_module *module;
    if (type != EP_DEVICE_CUDA)
        return epi_fail(EP_ERR_ARGUMENT, "%s: type is %d; it must be EP_DEVICE_CUDA (1)", call,
                        (int)type);
    EPI_TRY(epi_cuda_module(&module));
    *ops = module->device;
    return EP_OK;
}

static ep_status is_null(const char *call, const char *argument)
{
    return epi_fail(EP_ERR_ARGUMENT, "%s: %s is NULL", call, argument);
}

ep_status ep_device_count(ep_device_type type, int32_t *count)
{
    const epi_module *module;
    if (!count)
        return is_null("ep_device_count", "count");
    *count = 0;
    if (type == EP_DEVICE_CPU) {
        *count = 1;
        return EP_OK;
    }
    if (type != EP_DEVICE_CUDA)
        return epi_fail(EP_ERR_ARGUMENT, "ep_device_count: type is %d; it must be 0 or 1",
                        (int)type);
    if (epi_cuda_module(&module) != EP_OK)
        return EP_OK;
    return module->device->count(count);
}

ep_status ep_device_query(ep_device_type type, int32_t index, ep_device_info *info)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_device_query", type, &ops));
    if (!info)
        return is_null("ep_device_query", "info");
    size_t size = info->size;
    if (size < sizeof size || size > 65536)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_device_query: info->size is %zu; it must be sizeof the struct (%zu "
                        "here)",
                        size, sizeof *info);
    ep_device_info full = {.size = sizeof full};
    EPI_TRY(ops->query(index, &full));
    memcpy(info, &full, size < sizeof full ? size : sizeof full);
    info->size = size;
    return EP_OK;
}

ep_status ep_device_alloc(ep_device_type type, int32_t index, size_t bytes, void **memory)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_device_alloc", type, &ops));
    if (!memory)
        return is_null("ep_device_alloc", "memory");
    return ops->alloc(index, bytes, memory);
}

ep_status ep_device_free(ep_device_type type, int32_t index, void *memory)
{
    const epi_device_ops *ops = NULL;
    if (!memory)
        return EP_OK;
    EPI_TRY(find("ep_device_free", type, &ops));
    return ops->free(index, memory);
}

ep_status ep_device_copy(ep_device_type type, int32_t index, void *to, const void *from,
                         size_t bytes, void *stream)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_device_copy", type, &ops));
    if (bytes && (!to || !from))
        return is_null("ep_device_copy", to ? "from" : "to");
    return ops->copy(index, to, from, bytes, stream);
}

ep_status ep_stream_create(ep_device_type type, int32_t index, void **stream)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_stream_create", type, &ops));
    if (!stream)
        return is_null("ep_stream_create", "stream");
    return ops->stream_create(index, stream);
}

ep_status ep_stream_destroy(ep_device_type type, int32_t index, void *stream)
{
    const epi_device_ops *ops = NULL;
    if (!stream)
        return EP_OK;
    EPI_TRY(find("ep_stream_destroy", type, &ops));
    return ops->stream_destroy(index, stream);
}

ep_status ep_stream_wait(ep_device_type type, int32_t index, void *stream)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_stream_wait", type, &ops));
    return ops->stream_wait(index, stream);
}

ep_status ep_timer_create(ep_device_type type, int32_t index, void **timer)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_timer_create", type, &ops));
    if (!timer)
        return is_null("ep_timer_create", "timer");
    return ops->timer_create(index, timer);
}

ep_status ep_timer_destroy(ep_device_type type, int32_t index, void *timer)
{
    const epi_device_ops *ops = NULL;
    if (!timer)
        return EP_OK;
    EPI_TRY(find("ep_timer_destroy", type, &ops));
    return ops->timer_destroy(index, timer);
}

ep_status ep_timer_mark(ep_device_type type, int32_t index, void *timer, void *stream)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_timer_mark", type, &ops));
    if (!timer)
        return is_null("ep_timer_mark", "timer");
    return ops->timer_mark(index, timer, stream);
}

ep_status ep_timer_between(ep_device_type type, int32_t index, void *from, void *to,
                           float *milliseconds)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_timer_between", type, &ops));
    if (!from || !to || !milliseconds)
        return is_null("ep_timer_between", !from ? "from" : !to ? "to" : "milliseconds");
    return ops->timer_between(index, from, to, milliseconds);
}

ep_status ep_graph_begin(ep_device_type type, int32_t index, void *stream)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_graph_begin", type, &ops));
    return ops->graph_begin(index, stream);
}

ep_status ep_graph_end(ep_device_type type, int32_t index, void *stream, void **graph)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_graph_end", type, &ops));
    if (!graph)
        return is_null("ep_graph_end", "graph");
    return ops->graph_end(index, stream, graph);
}

ep_status ep_graph_launch(ep_device_type type, int32_t index, void *graph, void *stream)
{
    const epi_device_ops *ops = NULL;
    EPI_TRY(find("ep_graph_launch", type, &ops));
    if (!graph)
        return is_null("ep_graph_launch", "graph");
    return ops->graph_launch(index, graph, stream);
}

ep_status ep_graph_destroy(ep_device_type type, int32_t index, void *graph)
{
    const epi_device_ops *ops = NULL;
    if (!graph)
        return EP_OK;
    EPI_TRY(find("ep_graph_destroy", type, &ops));
    return ops->graph_destroy(index, graph);
}
