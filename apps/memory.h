/* SPDX-License-Identifier: MIT */
/* How much memory this process takes. */
#ifndef APPS_MEMORY_H
#define APPS_MEMORY_H

#include <stdint.h>

/* Bytes of memory this process is charged with, at its largest: its proportional share now
   (memory shared by n processes counts 1/n), and what it once had more than now. -1: unknown. */
int64_t memory_peak_share(void);

#endif
