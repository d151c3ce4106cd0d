/* SPDX-License-Identifier: MIT */
#include "base/process.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

bool epi_read_text(const char *path, char *text, size_t bytes)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t got = read(fd, text, bytes - 1);
    close(fd);
    if (got <= 0)
        return false;
    text[got] = '\0';
    return true;
}

bool epi_process_start_time(pid_t pid, uint64_t *start_time)
{
    char path[40], text[1024];
    snprintf(path, sizeof path, "/proc/%lld/stat", (long long)pid);
    if (!epi_read_text(path, text, sizeof text))
        return false;
    /* Fields are counted from the end of the name, which may contain anything. The state is the
       third, the start time the 22nd. */
    const char *at = strrchr(text, ')');
    if (at == NULL || at[1] != ' ' || at[2] == 'Z' || at[2] == 'X')
        return false;
    at++;
    for (int field = 3; field < 22 && at != NULL; field++)
        at = strchr(at + 1, ' ');
    unsigned long long start;
    if (at == NULL || sscanf(at, "%llu", &start) != 1)
        return false;
    *start_time = start;
    return true;
}
