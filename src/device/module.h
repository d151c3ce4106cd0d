/* SPDX-License-Identifier: MIT */
/*
 * The device plug-in point: what a module gives the core, and the core a module.
 * Both are built from one tree; `version` is compared when a module is opened.
 */
#ifndef EPI_DEVICE_MODULE_H
#define EPI_DEVICE_MODULE_H

#include "entrepot/device.h"

#include <stdarg.h>
#include <stdbool.h>

/* Memory and execution of the module's devices; as in entrepot/device.h. */
typedef struct epi_device_ops {
    ep_status (*count)(int32_t *count);
    ep_status (*query)(int32_t index, ep_device_info *info);
    ep_status (*alloc)(int32_t index, size_t bytes, void **memory);
    ep_status (*free)(int32_t index, void *memory);
    ep_status (*copy)(int32_t index, void *to, const void *from, size_t bytes, void *stream);
    ep_status (*stream_create)(int32_t index, void **stream);
    ep_status (*stream_destroy)(int32_t index, void *stream);
    ep_status (*stream_wait)(int32_t index, void *stream);
    ep_status (*timer_create)(int32_t index, void **timer);
    ep_status (*timer_destroy)(int32_t index, void *timer);
    ep_status (*timer_mark)(int32_t index, void *timer, void *stream);
    ep_status (*timer_between)(int32_t index, void *from, void *to, float *milliseconds);
    ep_status (*graph_begin)(int32_t index, void *stream);
    ep_status (*graph_end)(int32_t index, void *stream, void **graph);
    ep_status (*graph_launch)(int32_t index, void *graph, void *stream);
    ep_status (*graph_destroy)(int32_t index, void *graph);
} epi_device_ops;

/* Those of the module that is being built; in its folder. */
extern const epi_device_ops epi_module_device_ops;

/* What every module needs of the core. */
typedef struct epi_module_services {
    const char *version;
    ep_status (*vfail)(ep_status status, const char *format, va_list args);
    const char *(*last_error)(void);
    const char *(*status_string)(ep_status status);
} epi_module_services;

typedef struct epi_module {
    const char *version;
    const epi_device_ops *device;
    const void *backend; /* calls of src/ep on this device's buffers, see ep/backend.h */
} epi_module;

#define EPI_MODULE_SYMBOL "epi_module_open"
typedef const epi_module *(*epi_module_open_fn)(const epi_module_services *services);

/* The CUDA module, opened once. EP_ERR_UNSUPPORTED says what is missing. */
ep_status epi_cuda_module(const epi_module **module);

#endif
