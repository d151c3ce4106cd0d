/* SPDX-License-Identifier: MIT */
/* Copies what a rank prints, line by line, each with a prefix. */
#ifndef APPS_LINES_H
#define APPS_LINES_H

#include <stdbool.h>
#include <stddef.h>

#define LINES_MAX 8192 /* longer lines are cut there and go on with a new prefix */

typedef struct lines {
    int from;        /* read end of the rank's pipe; -1 once it has ended */
    int to;          /* where lines go */
    char prefix[24]; /* "[3] " */
    size_t used;
    char text[LINES_MAX];
} lines;

void lines_start(lines *l, int from, int to, const char *prefix);

/* Copies what can be read now without waiting. Returns false once the pipe has ended; the rest,
   a line without an end too, has then been written. */
bool lines_copy(lines *l);

/* Writes what is left of an unfinished line and closes the pipe. */
void lines_end(lines *l);

#endif
