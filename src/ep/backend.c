/* SPDX-License-Identifier: MIT */
#include "ep/backend.h"

#include "base/error.h"
#include "device/module.h"
#include "ep/event.h"

#include <pthread.h>

static ep_status shared_create(ep_group *group, size_t bytes, epi_window **window)
{
    return group->transport->ops->window_create(group->transport, bytes, bytes, window);
}

static void shared_destroy(epi_window *window)
{
    window->transport->ops->window_destroy(window);
}

static const epi_backend_services services = {
    .allgather = ep_group_allgather,
    .experts_init = epi_experts_init,
    .experts_free = epi_experts_free,
    .handle_new = epi_handle_of_device,
    .handle_release = ep_handle_release,
    .event_new = epi_event_of_device,
    .event_device = epi_event_device,
    .shared_create = shared_create,
    .shared_destroy = shared_destroy,
};

/* Once: calls of other threads read the module's copy. */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void start_cuda(void)
{
    const epi_module *module;
    if (epi_cuda_module(&module) == EP_OK)
        ((const epi_backend_ops *)module->backend)->start(&services);
}

ep_status epi_backend_find(ep_device_type device, const epi_backend_ops **ops)
{
    const epi_module *module;
    if (device != EP_DEVICE_CUDA)
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "device is %d; it must be EP_DEVICE_CPU (0) or EP_DEVICE_CUDA (1)",
                        (int)device);
    EPI_TRY(epi_cuda_module(&module));
    *ops = module->backend;
    pthread_once(&once, start_cuda);
    return EP_OK;
}

ep_status epi_reject(ep_buffer *buffer, const char *call, ep_status status)
{
    return buffer->backend ? buffer->backend->reject(buffer, call, status)
                           : epi_op_reject(buffer, call, status);
}
