/* SPDX-License-Identifier: MIT */
/*
 * Reads a matrix of numbers, {"key": [[...], ...]}, from JSON. Other members
 * are checked and skipped. A reader of its own, since an error has to say where
 * it is and what was expected there, also for JSON that is well-formed and not
 * the matrix.
 */
#ifndef APPS_JSON_MATRIX_H
#define APPS_JSON_MATRIX_H

#include <stdbool.h>
#include <stddef.h>

#define JSON_MATRIX_MESSAGE_MAX 256

typedef struct json_matrix {
    double *values; /* [rows][columns] */
    size_t rows, columns;
} json_matrix;

/* What is wanted: numbers of least..most, only whole ones if `whole`. */
typedef struct json_matrix_spec {
    const char *key;
    double least, most;
    bool whole;
} json_matrix_spec;

/*
 * On failure returns false, leaves `m` empty and says in `message` "line L,
 * column C: expected ..., found ..." (both counted from 1, columns in bytes).
 */
bool json_matrix_parse(const char *text, size_t size, const json_matrix_spec *spec, json_matrix *m,
                       char message[JSON_MATRIX_MESSAGE_MAX]);

/* The same for a file; a message about the file itself has no place in it. */
bool json_matrix_load(const char *path, const json_matrix_spec *spec, json_matrix *m,
                      char message[JSON_MATRIX_MESSAGE_MAX]);

void json_matrix_free(json_matrix *m);

#endif
