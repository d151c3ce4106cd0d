/* SPDX-License-Identifier: MIT */
#include "device/module.h"

#include "base/error.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define MODULE_VARIABLE "EP_CUDA_MODULE"
#define MODULE_FILE "libentrepot_cuda.so"

static pthread_once_t once = PTHREAD_ONCE_INIT;
static const epi_module *opened;
static bool by_name; /* the file that the environment names */
static char reason[EPI_ERROR_MAX];

static const epi_module_services services = {.version = EP_VERSION_STRING,
                                             .vfail = epi_vfail,
                                             .last_error = ep_last_error,
                                             .status_string = ep_status_string};

/* What the loader says of a file that is there stays the reason, whatever else is tried: of places
   without one it has nothing to say. */
static void *open_file(const char *path)
{
    static bool was_there;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library || was_there)
        return library;
    const char *why = dlerror(); /* may name a library that this one needs, and not this one */
    bool named = strstr(why, path) != NULL;
    snprintf(reason, sizeof reason, "%.300s%s%s", named ? "" : path, named ? "" : ": ", why);
    was_there = strchr(path, '/') && access(path, F_OK) == 0;
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

static const char *path_of(void *library)
{
    struct link_map *map;
    return dlinfo(library, RTLD_DI_LINKMAP, &map) == 0 ? map->l_name : MODULE_FILE;
}

/* Takes the module of an opened file, which may be any. */
static void take_module(void *library)
{
    epi_module_open_fn open;
    *(void **)&open = dlsym(library, EPI_MODULE_SYMBOL);
    const epi_module *module = open ? open(&services) : NULL;
    if (!module)
        snprintf(reason, sizeof reason, "%s is no CUDA module of this library", path_of(library));
    else if (strcmp(module->version, EP_VERSION_STRING) != 0)
        snprintf(reason, sizeof reason, "%s is of version %s, the library of %s", path_of(library),
                 module->version, EP_VERSION_STRING);
    else
        opened = module;
}

static void open_module(void)
{
    const char *named = getenv(MODULE_VARIABLE);
    by_name = named && *named;
    void *library = by_name ? open_file(named) : open_beside();
    if (!library && !by_name)
        library = open_file(MODULE_FILE);
    if (library)
        take_module(library);
}

ep_status epi_cuda_module(const epi_module **module)
{
    pthread_once(&once, open_module);
    *module = opened;
    return opened ? EP_OK
                  : epi_fail(EP_ERR_UNSUPPORTED, "CUDA support could not be opened: %s%s",
                             by_name ? MODULE_VARIABLE ": " : "", reason);
}
