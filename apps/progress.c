/* SPDX-License-Identifier: MIT */
#include "progress.h"

#include <stdio.h>
#include <unistd.h>

#define WIDTH 40

void progress_draw(const char *what, int64_t done, int64_t total)
{
    if (!isatty(STDERR_FILENO) || total <= 0)
        return;
    int filled = (int)(done * WIDTH / total);
    filled = filled > WIDTH ? WIDTH : filled;
    char bar[WIDTH + 1];
    for (int i = 0; i < WIDTH; i++)
        bar[i] = i < filled ? '#' : '.';
    bar[WIDTH] = 0;
    fprintf(stderr, "\r%-20.20s [%s] %3d%%", what, bar, (int)(done * 100 / total));
    fflush(stderr);
}

void progress_clear(void)
{
    if (isatty(STDERR_FILENO))
        fputs("\r\033[K", stderr);
}
