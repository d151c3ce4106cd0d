/* SPDX-License-Identifier: MIT */
#include "json.h"

#include <inttypes.h>
#include <math.h>

static void write_text(FILE *out, const char *text)
{
    fputc('"', out);
    for (const unsigned char *c = (const unsigned char *)text; *c; c++) {
        if (*c == '"' || *c == '\\')
            fprintf(out, "\\%c", *c);
        else if (*c < 0x20)
            fprintf(out, "\\u%04x", *c);
        else
            fputc(*c, out);
    }
    fputc('"', out);
}

/* What comes before every value: the comma, and the key inside objects. */
static void lead(json *j, const char *key)
{
    if (j->has_member[j->depth])
        fputs(", ", j->out);
    j->has_member[j->depth] = true;
    if (key) {
        write_text(j->out, key);
        fputs(": ", j->out);
    }
}

static void open_value(json *j, const char *key, char bracket)
{
    lead(j, key);
    fputc(bracket, j->out);
    if (j->depth + 1 < JSON_MAX_DEPTH)
        j->depth++;
    j->has_member[j->depth] = false;
}

static void close_value(json *j, char bracket)
{
    fputc(bracket, j->out);
    if (j->depth > 0)
        j->depth--;
}

void json_start(json *j, FILE *out)
{
    j->out = out;
    j->depth = 0;
    j->has_member[0] = false;
}

bool json_finish(json *j)
{
    fputc('\n', j->out);
    return fflush(j->out) == 0 && !ferror(j->out);
}

void json_open_object(json *j, const char *key)
{
    open_value(j, key, '{');
}

void json_close_object(json *j)
{
    close_value(j, '}');
}

void json_open_array(json *j, const char *key)
{
    open_value(j, key, '[');
}

void json_close_array(json *j)
{
    close_value(j, ']');
}

void json_text(json *j, const char *key, const char *value)
{
    if (!value) {
        json_null(j, key);
        return;
    }
    lead(j, key);
    write_text(j->out, value);
}

void json_integer(json *j, const char *key, int64_t value)
{
    lead(j, key);
    fprintf(j->out, "%" PRId64, value);
}

void json_real(json *j, const char *key, double value)
{
    if (!isfinite(value)) {
        json_null(j, key);
        return;
    }
    lead(j, key);
    fprintf(j->out, "%.9g", value);
}

void json_bool(json *j, const char *key, bool value)
{
    lead(j, key);
    fputs(value ? "true" : "false", j->out);
}

void json_null(json *j, const char *key)
{
    lead(j, key);
    fputs("null", j->out);
}
