/* SPDX-License-Identifier: MIT */
#include "device/module.h"

#include "base/error.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MODULE_FILE "libentrepot_cuda.so"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const epi_module *opened;
static char reason[EPI_ERROR_MAX];

static const epi_module_services services = {.version = EP_VERSION_STRING,
                                             .vfail = epi_vfail,
                                             .last_error = ep_last_error,
                                             .status_string = ep_status_string};

static void *open_file(const char *path)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library)
        snprintf(reason, sizeof reason, "%s", dlerror());
    return library;
}

/* Beside the library or program that holds this code, or in ../lib of there. */
static void *open_beside(void)
{
    Dl_info self;
    char path[4096];
    static const char *const folders[] = {"", "../lib/", "lib/"};
    if (!dladdr((const void *)&services, &self) || !self.dli_fname)
        return NULL;
    const char *slash = strrchr(self.dli_fname, '/');
    int folder = slash ? (int)(slash - self.dli_fname) + 1 : 0;
    void *library = NULL;
    for (size_t i = 0; i < sizeof folders / sizeof *folders && !library; i++) {
        snprintf(path, sizeof path, "%.*s%s" MODULE_FILE, folder, self.dli_fname, folders[i]);
        library = open_file(path);
    }
    return library;
}

static void open_module(void)
{
    const char *named = getenv("EP_CUDA_MODULE");
    void *library = named && *named ? open_file(named) : open_beside();
    if (!library && !(named && *named))
        library = open_file(MODULE_FILE);
    if (!library)
        return;
    epi_module_open_fn open;
    *(void **)&open = dlsym(library, EPI_MODULE_SYMBOL);
    const epi_module *module = open ? open(&services) : NULL;
    if (!module || strcmp(module->version, EP_VERSION_STRING) != 0)
        snprintf(reason, sizeof reason, "%s is of version %s, the library of %s", MODULE_FILE,
                 module ? module->version : "none", EP_VERSION_STRING);
    else
        opened = module;
}

ep_status epi_cuda_module(const epi_module **module)
{
    pthread_once(&once, open_module);
    *module = opened;
    return opened ? EP_OK
                  : epi_fail(EP_ERR_UNSUPPORTED, "CUDA support could not be opened: %s", reason);
}
