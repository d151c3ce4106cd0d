/* SPDX-License-Identifier: MIT */
/*
 * Writes one JSON value to a stream. Keys are given inside objects and NULL
 * inside arrays. Numbers that JSON cannot hold (NaN, infinities) become null.
 *
 *   json j;
 *   json_start(&j, stdout);
 *   json_open_object(&j, NULL);
 *   json_integer(&j, "ranks", 8);
 *   json_close_object(&j);
 *   if (!json_finish(&j))
 *       return EXIT_RUNTIME;
 */
#ifndef APPS_JSON_H
#define APPS_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define JSON_MAX_DEPTH 32

typedef struct json {
    FILE *out;
    int depth;
    bool has_member[JSON_MAX_DEPTH]; /* whether a comma comes before the next one */
} json;

void json_start(json *j, FILE *out);
/* Ends the line and flushes; false when the stream could not be written. */
bool json_finish(json *j);

void json_open_object(json *j, const char *key);
void json_close_object(json *j);
void json_open_array(json *j, const char *key);
void json_close_array(json *j);

void json_text(json *j, const char *key, const char *value); /* NULL is written as null */
void json_integer(json *j, const char *key, int64_t value);
void json_real(json *j, const char *key, double value); /* 9 significant digits */
void json_bool(json *j, const char *key, bool value);
void json_null(json *j, const char *key);

#endif
