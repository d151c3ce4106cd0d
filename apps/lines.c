/* SPDX-License-Identifier: MIT */
#include "lines.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

void lines_start(lines *l, int from, int to, const char *prefix)
{
    l->from = from;
    l->to = to;
    l->used = 0;
    snprintf(l->prefix, sizeof l->prefix, "%s", prefix);
    fcntl(from, F_SETFL, fcntl(from, F_GETFL) | O_NONBLOCK);
}

static void write_all(int fd, const char *text, size_t size)
{
    while (size > 0) {
        ssize_t n = write(fd, text, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return; /* nobody reads: what ranks print is lost, the job goes on */
        text += n;
        size -= (size_t)n;
    }
}

/* One write per line keeps lines of different ranks whole. */
static void emit(lines *l, const char *text, size_t size)
{
    char out[sizeof l->prefix + LINES_MAX + 1];
    size_t n = strlen(l->prefix);
    memcpy(out, l->prefix, n);
    memcpy(out + n, text, size);
    n += size;
    out[n++] = '\n';
    write_all(l->to, out, n);
}

static void emit_lines(lines *l)
{
    size_t start = 0;
    for (size_t i = 0; i < l->used; i++) {
        if (l->text[i] == '\n') {
            emit(l, l->text + start, i - start);
            start = i + 1;
        }
    }
    l->used -= start;
    memmove(l->text, l->text + start, l->used);
    if (l->used == LINES_MAX) {
        emit(l, l->text, l->used);
        l->used = 0;
    }
}

bool lines_copy(lines *l)
{
    while (l->from >= 0) {
        ssize_t n = read(l->from, l->text + l->used, LINES_MAX - l->used);
        if (n > 0) {
            l->used += (size_t)n;
            emit_lines(l);
        } else if (n < 0 && errno == EINTR) {
            continue;
        } else if (n < 0 && errno == EAGAIN) {
            return true;
        } else {
            lines_end(l);
        }
    }
    return false;
}

void lines_end(lines *l)
{
    if (l->used > 0)
        emit(l, l->text, l->used);
    l->used = 0;
    if (l->from >= 0)
        close(l->from);
    l->from = -1;
}
