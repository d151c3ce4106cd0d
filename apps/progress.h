/* SPDX-License-Identifier: MIT */
/* A progress bar on stderr, drawn only when that is a terminal. */
#ifndef APPS_PROGRESS_H
#define APPS_PROGRESS_H

#include <stdint.h>

void progress_draw(const char *what, int64_t done, int64_t total);
void progress_clear(void);

#endif
