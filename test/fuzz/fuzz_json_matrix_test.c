/* SPDX-License-Identifier: MIT */
/* Any bytes as a matrix in JSON: either it is read in full and in range, or the message says where
 * not and what was expected there. */
#include "json_matrix.h"

#include "support/fuzz.h"

#include <stdlib.h>
#include <string.h>

/* Reads "line L, column C: expected " and checks that the place is in the text. */
static void check_message(const char *message, const char *text, size_t size)
{
    char *end;
    if (strncmp(message, "line ", 5) != 0)
        abort();
    unsigned long line = strtoul(message + 5, &end, 10);
    if (strncmp(end, ", column ", 9) != 0)
        abort();
    unsigned long column = strtoul(end + 9, &end, 10);
    if (strncmp(end, ": expected ", 11) != 0)
        abort();
    const char *at = text, *stop = text + size;
    for (unsigned long l = 1; l < line; l++) {
        at = memchr(at, '\n', (size_t)(stop - at));
        if (!at++)
            abort();
    }
    if (column < 1 || column - 1 > (unsigned long)(stop - at))
        abort();
}

static int one_input(const uint8_t *data, size_t size)
{
    static const json_matrix_spec spec = {"logical_count", 0, 1e6, false};
    char message[JSON_MATRIX_MESSAGE_MAX];
    json_matrix m;
    if (!json_matrix_parse((const char *)data, size, &spec, &m, message)) {
        check_message(message, (const char *)data, size);
        if (m.values || m.rows || m.columns)
            abort();
        return 0;
    }
    if (m.rows < 1 || m.columns < 1)
        abort();
    for (size_t i = 0; i < m.rows * m.columns; i++)
        if (!(m.values[i] >= 0 && m.values[i] <= 1e6))
            abort();
    json_matrix_free(&m);
    return 0;
}

static const char *const seeds[] = {
    "{\"logical_count\": [[1, 2.5, 3e2], [0, 0, 7]]}",
    "{\"a\": {\"b\": [true, null, \"\\u00e4\\n\"]}, \"logical_count\":[[1],\n[2]], \"c\": "
    "-0.5e-3}\n",
    "{\"logical_count\": [[90, 132], [20, 107]], \"steps\": [], \"x\": {}}", NULL};
static const char *const words[] = {
    "\"logical_count\"", "[[", "]]", "},", "-1", "1e999", "1e7", "nan", "\\", "\"", "{\"",
    "[[[[[[[[",          "\n", "01", "1.", NULL};
static const struct fuzz_target target = {"json_matrix", one_input, seeds, words, 4096, NULL};

FUZZ_MAIN(target)
