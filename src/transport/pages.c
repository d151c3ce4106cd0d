/* SPDX-License-Identifier: MIT */
#include "transport/pages.h"

#include "base/error.h"
#include "transport/available.h"

#include <errno.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define CHECKED_MIN ((size_t)2 << 20) /* below it is not worth reading files for */

static size_t round_up(size_t bytes, size_t unit)
{
    return bytes > SIZE_MAX - (unit - 1) ? SIZE_MAX : (bytes + unit - 1) / unit * unit;
}

size_t epi_pages_round(size_t bytes)
{
    return round_up(bytes, (size_t)sysconf(_SC_PAGESIZE));
}

ep_status epi_pages_check_available(size_t bytes)
{
    if (bytes < CHECKED_MIN)
        return EP_OK;
    uint64_t available = epi_memory_available("/proc", "/sys/fs/cgroup");
    if (bytes > available)
        return epi_fail(EP_ERR_MEMORY, "%zu bytes more of window memory: %llu are available", bytes,
                        (unsigned long long)available);
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
    while (to > from && madvise(base + from, to - from, MADV_POPULATE_WRITE) != 0) {
        if (errno == EINTR)
            continue;
        if (errno == EINVAL) /* before Linux 5.14: pages come at first touch */
            return EP_OK;
        return epi_fail_errno(EP_ERR_MEMORY, "backing %zu bytes of a window", to - from);
    }
    return EP_OK;
}

void epi_pages_drop(uint8_t *base, size_t from, size_t to)
{
    if (from < to)
        (void)madvise(base + from, to - from, MADV_DONTNEED);
}
