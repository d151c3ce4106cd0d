/* SPDX-License-Identifier: MIT */
/* The module's entry, and how its errors reach the core. Needs none of the runtime. */
#include "base/error.h"
#include "device/module.h"

/* Errors of the module's code go to the core, which keeps them per thread. */
static epi_module_services core;

ep_status epi_vfail(ep_status status, const char *format, va_list args)
{
    return core.vfail(status, format, args);
}

ep_status epi_fail(ep_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    epi_vfail(status, format, args);
    va_end(args);
    return status;
}

const char *ep_last_error(void)
{
    return core.last_error();
}

const char *ep_status_string(ep_status status)
{
    return core.status_string(status);
}

extern const void *epi_cuda_backend(void); /* src/ep/cuda; void: this room does not see its type */

__attribute__((visibility("default"))) const epi_module *epi_module_open(
    const epi_module_services *services);
__attribute__((visibility("default"))) const epi_module *epi_module_open(
    const epi_module_services *services)
{
    static epi_module module = {.version = EP_VERSION_STRING, .device = &epi_module_device_ops};
    core = *services;
    module.backend = epi_cuda_backend();
    return &module;
}
