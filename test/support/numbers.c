/* SPDX-License-Identifier: MIT */
#include "support/numbers.h"
#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int numbers_present(void)
{
    return access(EP_TEST_DATA "/README.md", R_OK) == 0;
}

static char *read_file(const char *file)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", EP_TEST_DATA, file);
    FILE *in = fopen(path, "rb");
    if (!in)
        return NULL;
    fseek(in, 0, SEEK_END);
    long size = ftell(in);
    rewind(in);
    char *text = calloc((size_t)size + 1, 1);
    if (text && fread(text, 1, (size_t)size, in) != (size_t)size) {
        free(text);
        text = NULL;
    }
    fclose(in);
    return text;
}

/* Numbers of `text` up to a quote, which begins the next key. */
static size_t scan(const char *text, double *out)
{
    size_t n = 0;
    while (*text && *text != '"') {
        char *end;
        double value = strtod(text, &end);
        if (end == text) {
            text++;
            continue;
        }
        if (out)
            out[n] = value;
        n++;
        text = end;
    }
    return n;
}

double *numbers_read(const char *file, const char *key, size_t *count)
{
    char quoted[256];
    snprintf(quoted, sizeof quoted, "\"%s\":", key);
    char *text = read_file(file);
    char *at = text ? strstr(text, quoted) : NULL;
    double *out = NULL;
    if (at) {
        at += strlen(quoted);
        *count = scan(at, NULL);
        out = malloc((*count + 1) * sizeof *out);
        if (out)
            scan(at, out);
    }
    free(text);
    return out;
}

double *numbers_expect(const char *file, const char *key, size_t count)
{
    size_t found = 0;
    double *out = numbers_read(file, key, &found);
    assert_non_null(out);
    assert_int_equal(found, count);
    return out;
}
