/* SPDX-License-Identifier: MIT */
#include "text_file.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>

/* Grows by doubling, as pipes do not tell their size. */
static char *read_all(FILE *file, size_t *size)
{
    size_t capacity = 1 << 16;
    char *text = malloc(capacity);
    *size = 0;
    while (text) {
        *size += fread(text + *size, 1, capacity - 1 - *size, file);
        if (*size < capacity - 1)
            break;
        capacity *= 2;
        char *more = realloc(text, capacity);
        if (!more)
            free(text);
        text = more;
    }
    if (text)
        text[*size] = 0;
    return text;
}

char *text_file_read(const char *path, size_t *size)
{
    FILE *file = fopen(path, "re");
    if (!file)
        return NULL;
    char *text = read_all(file, size);
    bool failed = ferror(file) != 0;
    int error = text ? errno : ENOMEM;
    fclose(file);
    if (text && !failed)
        return text;
    free(text);
    errno = error;
    return NULL;
}
