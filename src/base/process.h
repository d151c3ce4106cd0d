/* SPDX-License-Identifier: MIT */
/* Other processes as /proc shows them. */
#ifndef EPI_BASE_PROCESS_H
#define EPI_BASE_PROCESS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Start time in clock ticks since boot of a process that runs; together with its number it tells a
   process from a later one of the same number. False when there is none or it is a zombie. */
bool epi_process_start_time(pid_t pid, uint64_t *start_time);

/* Reads the beginning of a small file as text; false where it cannot be read or is empty. */
bool epi_read_text(const char *path, char *text, size_t bytes);

#endif
