/* SPDX-License-Identifier: MIT */
/* Reads a file in one piece. */
#ifndef APPS_TEXT_FILE_H
#define APPS_TEXT_FILE_H

#include <stddef.h>

/* The file's bytes and one zero byte after them; free() it. NULL with errno set on failure. */
char *text_file_read(const char *path, size_t *size);

#endif
