/* SPDX-License-Identifier: MIT */
/* How much more memory this process may take. */
#ifndef EPI_TRANSPORT_AVAILABLE_H
#define EPI_TRANSPORT_AVAILABLE_H

#include <stdint.h>

/*
 * Bytes that the machine and the control groups of this process (either version) can still give,
 * file caches that would make room included; UINT64_MAX where nothing is known. `proc` and `cgroup`
 * are where those file systems are mounted, "/proc" and "/sys/fs/cgroup" but for tests.
 */
uint64_t epi_memory_available(const char *proc, const char *cgroup);

#endif
