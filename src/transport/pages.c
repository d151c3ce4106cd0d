/* SPDX-License-Identifier: MIT */
#include "transport/pages.h"

#include "base/error.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_PAGE ((size_t)2 << 20)

static size_t round_up(size_t bytes, size_t unit)
{
    return bytes > SIZE_MAX - (unit - 1) ? SIZE_MAX : (bytes + unit - 1) / unit * unit;
}

size_t epi_pages_round(size_t bytes)
{
    return round_up(bytes, (size_t)sysconf(_SC_PAGESIZE));
}

/* MemAvailable of /proc/meminfo in bytes, or UINT64_MAX where it cannot be read. */
static uint64_t machine_available(void)
{
    FILE *file = fopen("/proc/meminfo", "re");
    if (file == NULL)
        return UINT64_MAX;
    uint64_t available = UINT64_MAX;
    char line[128];
    unsigned long long kib;
    while (fgets(line, sizeof line, file) != NULL)
        if (sscanf(line, "MemAvailable: %llu kB", &kib) == 1)
            available = (uint64_t)kib * 1024;
    fclose(file);
    return available;
}

ep_status epi_pages_check_available(size_t bytes)
{
    if (bytes < HUGE_PAGE) /* not worth reading a file for */
        return EP_OK;
    uint64_t available = machine_available();
    if (bytes > available)
        return epi_fail(EP_ERR_MEMORY, "%zu bytes more of window memory: this machine has %llu",
                        bytes, (unsigned long long)available);
    return EP_OK;
}

ep_status epi_pages_map(int fd, size_t reserve, uint8_t **base)
{
    int flags = MAP_NORESERVE | (fd >= 0 ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS);
    void *map = mmap(NULL, reserve, PROT_READ | PROT_WRITE, flags, fd, 0);
    if (map == MAP_FAILED)
        return epi_fail_errno(EP_ERR_MEMORY, "mapping %zu bytes of address space for a window",
                              reserve);
    *base = map;
    return EP_OK;
}

void epi_pages_unmap(uint8_t *base, size_t reserve)
{
    if (base != NULL)
        munmap(base, reserve);
}

ep_status epi_pages_populate(uint8_t *base, size_t from, size_t to)
{
    if (to <= from || madvise(base + from, to - from, MADV_POPULATE_WRITE) == 0)
        return EP_OK;
    if (errno == EINVAL) /* before Linux 5.14: pages come at first touch */
        return EP_OK;
    return epi_fail_errno(EP_ERR_MEMORY, "backing %zu bytes of a window", to - from);
}

void epi_pages_drop(uint8_t *base, size_t from, size_t to)
{
    if (from < to)
        (void)madvise(base + from, to - from, MADV_DONTNEED);
}
