/* SPDX-License-Identifier: MIT */
#include "transport/available.h"

#include "base/process.h"

#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TEXT_MAX 8192 /* of memory.stat and the like; what is looked for comes early */

/* The files of one version of control groups. */
typedef struct group_files {
    const char *folder; /* under the mount point */
    const char *limit;
    const char *usage;
    const char *cache; /* in memory.stat: what would be given up first */
} group_files;

static const group_files version_1 = {"/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
                                      "total_inactive_file "};
static const group_files version_2 = {"", "memory.max", "memory.current", "inactive_file "};

static uint64_t smaller(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* The number after `key` at the beginning of a line of `text`; `otherwise` when it is not there. */
static uint64_t number_after(const char *text, const char *key, uint64_t otherwise)
{
    size_t length = strlen(key);
    for (const char *line = text; line != NULL; line = strchr(line, '\n')) {
        line += *line == '\n';
        if (strncmp(line, key, length) == 0)
            return strtoull(line + length, NULL, 10);
        if (*line == '\0')
            break;
    }
    return otherwise;
}

static bool read_in(const char *folder, const char *name, char *text)
{
    char path[PATH_MAX];
    int length = snprintf(path, sizeof path, "%s/%s", folder, name);
    return length < (int)sizeof path && epi_read_text(path, text, TEXT_MAX);
}

static uint64_t machine_available(const char *proc)
{
    char text[TEXT_MAX];
    if (!read_in(proc, "meminfo", text))
        return UINT64_MAX;
    uint64_t kib = number_after(text, "MemAvailable:", UINT64_MAX);
    return kib < UINT64_MAX / 1024 ? kib * 1024 : UINT64_MAX;
}

/* What one group may still take; UINT64_MAX without a limit. */
static uint64_t group_available(const char *folder, const group_files *files)
{
    char text[TEXT_MAX];
    if (!read_in(folder, files->limit, text) || text[0] < '0' || text[0] > '9')
        return UINT64_MAX; /* no such group here, or "max" */
    uint64_t limit = strtoull(text, NULL, 10);
    if (!read_in(folder, files->usage, text))
        return UINT64_MAX;
    uint64_t usage = strtoull(text, NULL, 10);
    uint64_t cache = read_in(folder, "memory.stat", text) ? number_after(text, files->cache, 0) : 0;
    usage -= smaller(usage, cache);
    return limit - smaller(limit, usage);
}

/* The least of a group and all above it. In a container the path may be that of the host, of which
   only the top is mounted. */
static uint64_t tree_available(const char *cgroup, const char *path, const group_files *files)
{
    char folder[PATH_MAX];
    int top = snprintf(folder, sizeof folder, "%s%s", cgroup, files->folder);
    if (top >= (int)sizeof folder)
        return UINT64_MAX;
    snprintf(folder + top, sizeof folder - (size_t)top, "%s", path);
    uint64_t available = UINT64_MAX;
    for (;;) {
        available = smaller(available, group_available(folder, files));
        char *last = strrchr(folder + top, '/');
        if (last == NULL)
            return available;
        *last = '\0';
    }
}

/* One line "ID:CONTROLLERS:PATH" of /proc/self/cgroup. */
static uint64_t line_available(const char *cgroup, char *line)
{
    char *controllers = strchr(line, ':');
    char *path = controllers != NULL ? strchr(controllers + 1, ':') : NULL;
    if (path == NULL || path[1] != '/')
        return UINT64_MAX;
    *path++ = '\0';
    controllers++;
    if (controllers[0] == '\0')
        return tree_available(cgroup, path, &version_2);
    for (char *name, *rest = controllers; (name = strsep(&rest, ",")) != NULL;)
        if (strcmp(name, "memory") == 0)
            return tree_available(cgroup, path, &version_1);
    return UINT64_MAX;
}

uint64_t epi_memory_available(const char *proc, const char *cgroup)
{
    char text[TEXT_MAX];
    uint64_t available = machine_available(proc);
    if (!read_in(proc, "self/cgroup", text))
        return available;
    for (char *line, *rest = text; (line = strsep(&rest, "\n")) != NULL;)
        available = smaller(available, line_available(cgroup, line));
    return available;
}
