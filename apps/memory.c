/* SPDX-License-Identifier: MIT */
#include "memory.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/* The number after `key` in a file of lines "Key:   123 kB", in bytes; -1 when it is not there. */
static int64_t read_kib(const char *path, const char *key)
{
    char line[256];
    int64_t kib = -1;
    FILE *file = fopen(path, "re");
    if (!file)
        return -1;
    while (kib < 0 && fgets(line, sizeof line, file)) {
        if (strncmp(line, key, strlen(key)) == 0 &&
            sscanf(line + strlen(key), "%" SCNd64, &kib) != 1)
            kib = -1;
    }
    fclose(file);
    return kib < 0 ? -1 : kib * 1024;
}

int64_t memory_peak_share(void)
{
    int64_t share = read_kib("/proc/self/smaps_rollup", "Pss:");
    int64_t peak = read_kib("/proc/self/status", "VmHWM:");
    int64_t resident = read_kib("/proc/self/status", "VmRSS:");
    return share < 0 || peak < resident ? share : share + (peak - resident);
}
