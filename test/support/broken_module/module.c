/* SPDX-License-Identifier: MIT */
/* A CUDA module of no use, in the way that BROKEN_MODULE of the environment names. */
#include "device/module.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const epi_module_services *core;

static bool is(const char *way)
{
    const char *asked = getenv("BROKEN_MODULE");
    return asked && strcmp(asked, way) == 0;
}

static ep_status fail(ep_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    core->vfail(status, format, args);
    va_end(args);
    return status;
}

static ep_status count(int32_t *found)
{
    *found = 0;
    if (is("abort"))
        abort();
    if (is("exit"))
        _exit(7);
    return is("fail") ? fail(EP_ERR_DEVICE, "the driver is out of sorts") : EP_OK;
}

static ep_status query(int32_t index, ep_device_info *info)
{
    (void)index, (void)info;
    return EP_OK;
}

__attribute__((visibility("default"))) const epi_module *epi_module_open(
    const epi_module_services *services);

const epi_module *epi_module_open(const epi_module_services *services)
{
    static const epi_device_ops device = {.count = count, .query = query};
    static epi_module module = {.device = &device};
    core = services;
    module.version = is("version") ? "9.9" : EP_VERSION_STRING;
    return &module;
}
