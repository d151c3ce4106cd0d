/* SPDX-License-Identifier: MIT */
#include "json_matrix.h"

#include "text_file.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    NUMBER_MAX = 63, /* characters of the longest number that makes sense */
    DEPTH_MAX = 64   /* of values that are skipped */
};

typedef struct reader {
    const char *text, *next, *end;
    const json_matrix_spec *spec;
    json_matrix *m;
    size_t capacity; /* of m->values */
    char *message;
} reader;

/* Puts "line 3, column 7: " at the front of the message; returns where it goes on. */
static size_t put_place(const reader *r, const char *at)
{
    size_t line = 1;
    const char *start = r->text;
    for (const char *c = r->text; c < at; c++)
        if (*c == '\n') {
            line++;
            start = c + 1;
        }
    int n = snprintf(r->message, JSON_MATRIX_MESSAGE_MAX, "line %zu, column %zu: ", line,
                     (size_t)(at - start) + 1);
    return (size_t)n;
}

static bool fail(const reader *r, const char *at, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static bool fail(const reader *r, const char *at, const char *format, ...)
{
    size_t used = put_place(r, at);
    va_list args;
    va_start(args, format);
    vsnprintf(r->message + used, JSON_MATRIX_MESSAGE_MAX - used, format, args);
    va_end(args);
    return false;
}

/* "expected WHAT, found ..." at the next character. */
static bool expected(const reader *r, const char *what)
{
    if (r->next == r->end)
        return fail(r, r->next, "expected %s, found the end of the file", what);
    unsigned char c = (unsigned char)*r->next;
    if (isprint(c))
        return fail(r, r->next, "expected %s, found '%c'", what, c);
    return fail(r, r->next, "expected %s, found the byte 0x%02x", what, c);
}

static void skip_blanks(reader *r)
{
    while (r->next < r->end && memchr(" \t\r\n", *r->next, 4))
        r->next++;
}

/* The next character after blanks; -1 at the end. */
static int peek(reader *r)
{
    skip_blanks(r);
    return r->next < r->end ? (unsigned char)*r->next : -1;
}

static bool take_comma(reader *r)
{
    if (peek(r) != ',')
        return false;
    r->next++;
    return true;
}

static bool take(reader *r, char c, const char *what)
{
    if (peek(r) != (unsigned char)c)
        return expected(r, what);
    r->next++;
    return true;
}

/* Steps over a string; *content and *length are what is between the quotes, escapes left in. */
static bool read_string(reader *r, const char *what, const char **content, size_t *length)
{
    if (!take(r, '"', what))
        return false;
    *content = r->next;
    while (r->next < r->end && *r->next != '"') {
        if ((unsigned char)*r->next < 0x20)
            return expected(r, "a printable character or '\"'");
        if (*r->next == '\\') {
            r->next++;
            if (r->next == r->end || !memchr("\"\\/bfnrtu", *r->next, 9))
                return expected(r, "one of \"\\/bfnrtu after a backslash");
        }
        r->next++;
    }
    if (r->next == r->end)
        return expected(r, "'\"'");
    *length = (size_t)(r->next++ - *content);
    return true;
}

static bool skip_digits(reader *r)
{
    if (r->next == r->end || !isdigit((unsigned char)*r->next))
        return expected(r, "a digit");
    while (r->next < r->end && isdigit((unsigned char)*r->next))
        r->next++;
    return true;
}

static bool at_any(const reader *r, const char *set)
{
    return r->next < r->end && *r->next && strchr(set, *r->next);
}

/* A number by JSON's grammar, which is narrower than strtod's. */
static bool read_number(reader *r, double *value)
{
    const char *start = r->next;
    if (at_any(r, "-"))
        r->next++;
    if (at_any(r, "0"))
        r->next++;
    else if (!skip_digits(r))
        return false;
    if (at_any(r, ".")) {
        r->next++;
        if (!skip_digits(r))
            return false;
    }
    if (at_any(r, "eE")) {
        r->next++;
        if (at_any(r, "+-"))
            r->next++;
        if (!skip_digits(r))
            return false;
    }
    char copy[NUMBER_MAX + 1];
    size_t length = (size_t)(r->next - start);
    if (length > NUMBER_MAX)
        return fail(r, start, "expected a number of at most %d characters, found %zu", NUMBER_MAX,
                    length);
    memcpy(copy, start, length);
    copy[length] = '\0';
    *value = strtod(copy, NULL);
    return true;
}

static bool skip_word(reader *r)
{
    static const char *const words[] = {"true", "false", "null"};
    for (int i = 0; i < 3; i++) {
        size_t length = strlen(words[i]);
        if ((size_t)(r->end - r->next) >= length && memcmp(r->next, words[i], length) == 0) {
            r->next += length;
            return true;
        }
    }
    return expected(r, "a value");
}

static bool skip_value(reader *r, int depth);

/* The members of an object or array that is skipped, up to its end. */
static bool skip_members(reader *r, char end, int depth)
{
    const char *what = end == '}' ? "',' or '}'" : "',' or ']'", *content;
    size_t length;
    r->next++;
    if (peek(r) == end) {
        r->next++;
        return true;
    }
    for (;;) {
        if (end == '}' &&
            (!read_string(r, "a name in quotes", &content, &length) || !take(r, ':', "':'")))
            return false;
        if (!skip_value(r, depth))
            return false;
        if (peek(r) == end) {
            r->next++;
            return true;
        }
        if (!take(r, ',', what))
            return false;
    }
}

static bool skip_value(reader *r, int depth)
{
    const char *content;
    size_t length;
    double value;
    int c = peek(r);
    if (depth == DEPTH_MAX)
        return fail(r, r->next, "expected at most %d levels of nesting", DEPTH_MAX);
    if (c == '{' || c == '[')
        return skip_members(r, c == '{' ? '}' : ']', depth + 1);
    if (c == '"')
        return read_string(r, "a string", &content, &length);
    if (c == '-' || (c >= '0' && c <= '9'))
        return read_number(r, &value);
    return skip_word(r);
}

static bool append(reader *r, size_t count, double value)
{
    if (count == r->capacity) {
        size_t capacity = r->capacity ? 2 * r->capacity : 1024;
        double *values = realloc(r->m->values, capacity * sizeof *values);
        if (!values) {
            snprintf(r->message, JSON_MATRIX_MESSAGE_MAX, "out of memory for %zu numbers",
                     capacity);
            return false;
        }
        r->m->values = values;
        r->capacity = capacity;
    }
    r->m->values[count] = value;
    return true;
}

static bool read_element(reader *r, double *value)
{
    const json_matrix_spec *s = r->spec;
    char what[96];
    int c = peek(r);
    const char *start = r->next;
    snprintf(what, sizeof what, "a %snumber in %.9g..%.9g", s->whole ? "whole " : "", s->least,
             s->most);
    if (c != '-' && !(c >= '0' && c <= '9'))
        return expected(r, what);
    if (!read_number(r, value))
        return false;
    if (*value >= s->least && *value <= s->most && (!s->whole || floor(*value) == *value))
        return true;
    return fail(r, start, "expected %s, found %.*s", what, (int)(r->next - start), start);
}

/* One row, from its bracket on; appends to the `done` values before it. */
static bool read_row(reader *r, size_t *done)
{
    size_t first = *done, count;
    double value;
    if (!take(r, '[', "'[' before a row of numbers"))
        return false;
    do {
        if (!read_element(r, &value) || !append(r, *done, value))
            return false;
        count = ++*done - first;
    } while (take_comma(r));
    if (r->m->rows > 0 && count != r->m->columns)
        return fail(r, r->next, "expected %zu numbers as in the rows before, found %zu",
                    r->m->columns, count);
    r->m->columns = count;
    r->m->rows++;
    return take(r, ']', "',' or ']'");
}

static bool read_matrix(reader *r)
{
    size_t done = 0;
    skip_blanks(r);
    if (r->m->rows > 0)
        return fail(r, r->next, "expected one \"%s\" only, found another", r->spec->key);
    if (!take(r, '[', "'[' before the rows"))
        return false;
    do {
        if (!read_row(r, &done))
            return false;
    } while (take_comma(r));
    return take(r, ']', "',' or ']'");
}

static bool read_member(reader *r)
{
    const char *name;
    size_t length;
    if (!read_string(r, "a name in quotes", &name, &length) || !take(r, ':', "':'"))
        return false;
    if (length == strlen(r->spec->key) && memcmp(name, r->spec->key, length) == 0)
        return read_matrix(r);
    return skip_value(r, 0);
}

static bool read_object(reader *r)
{
    if (!take(r, '{', "'{'"))
        return false;
    if (peek(r) != '}')
        do {
            if (!read_member(r))
                return false;
        } while (take_comma(r));
    const char *end = r->next;
    if (!take(r, '}', "',' or '}'"))
        return false;
    if (r->m->rows == 0)
        return fail(r, end, "expected a member \"%s\" before the end of the object", r->spec->key);
    return peek(r) < 0 || expected(r, "the end of the file");
}

bool json_matrix_parse(const char *text, size_t size, const json_matrix_spec *spec, json_matrix *m,
                       char message[JSON_MATRIX_MESSAGE_MAX])
{
    reader r = {text, text, text + size, spec, m, 0, message};
    *m = (json_matrix){0};
    if (read_object(&r))
        return true;
    json_matrix_free(m);
    return false;
}

bool json_matrix_load(const char *path, const json_matrix_spec *spec, json_matrix *m,
                      char message[JSON_MATRIX_MESSAGE_MAX])
{
    size_t size;
    *m = (json_matrix){0};
    char *text = text_file_read(path, &size);
    if (!text)
        snprintf(message, JSON_MATRIX_MESSAGE_MAX, "%s", strerror(errno));
    bool good = text && json_matrix_parse(text, size, spec, m, message);
    free(text);
    return good;
}

void json_matrix_free(json_matrix *m)
{
    free(m->values);
    *m = (json_matrix){0};
}
