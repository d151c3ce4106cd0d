/* SPDX-License-Identifier: MIT */
#include "options.h"

#include "exit.h"

#include <ctype.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

bool parse_integer(const char *text, int64_t min, int64_t max, int64_t *value)
{
    if (!isdigit((unsigned char)text[0]) && text[0] != '-')
        return false; /* strtoll would skip blanks */
    char *end;
    errno = 0;
    long long parsed = strtoll(text, &end, 10);
    if (errno || end == text || *end || parsed < min || parsed > max)
        return false;
    *value = parsed;
    return true;
}

bool parse_real(const char *text, double min, double max, double *value)
{
    if (text[0] == 0 || isspace((unsigned char)text[0]))
        return false;
    char *end;
    errno = 0;
    double parsed = strtod(text, &end);
    if (errno || end == text || *end || !(parsed >= min && parsed <= max))
        return false;
    *value = parsed;
    return true;
}

/* "an integer in 1..64", as messages and --help put it. */
static void describe(const option *o, char *text, size_t size)
{
    switch (o->kind) {
    case OPTION_KIND_INTEGER:
        snprintf(text, size, "an integer in %" PRId64 "..%" PRId64, o->min, o->max);
        break;
    case OPTION_KIND_REAL:
        snprintf(text, size, "a number in %g..%g", o->real_min, o->real_max);
        break;
    case OPTION_KIND_CHOICE: {
        size_t used = 0;
        text[0] = 0;
        for (int i = 0; o->choices[i] && used < size; i++) {
            const char *joint = i == 0 ? "" : o->choices[i + 1] ? ", " : " or ";
            used += (size_t)snprintf(text + used, size - used, "%s%s", joint, o->choices[i]);
        }
        break;
    }
    case OPTION_KIND_TEXTS:
        snprintf(text, size, "any text, up to %d times", OPTION_TEXTS_MAX);
        break;
    default:
        snprintf(text, size, "any text");
    }
}

static bool add_text(option_texts *texts, const char *text)
{
    if (!text[0] || texts->count == OPTION_TEXTS_MAX)
        return false;
    texts->text[texts->count++] = text;
    return true;
}

static bool store(const option *o, const char *text)
{
    switch (o->kind) {
    case OPTION_KIND_INTEGER:
        return parse_integer(text, o->min, o->max, o->value);
    case OPTION_KIND_REAL:
        return parse_real(text, o->real_min, o->real_max, o->value);
    case OPTION_KIND_CHOICE:
        for (int i = 0; o->choices[i]; i++) {
            if (strcmp(o->choices[i], text) == 0) {
                *(int *)o->value = i;
                return true;
            }
        }
        return false;
    case OPTION_KIND_TEXT:
        *(const char **)o->value = text;
        return text[0] != 0;
    case OPTION_KIND_TEXTS:
        return add_text(o->value, text);
    case OPTION_KIND_SWITCH:
        *(bool *)o->value = true;
        return true;
    }
    return false;
}

int options_misuse(const options_spec *spec, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "%s: ", spec->command);
    vfprintf(stderr, format, args);
    fprintf(stderr, " (see %s --help)\n", spec->command);
    va_end(args);
    return EXIT_USAGE;
}

int options_bad_value(const options_spec *spec, const char *name, const char *value,
                      const char *expected)
{
    return options_misuse(spec, "--%s is '%s'; it can be %s", name, value, expected);
}

static void print_help(const options_spec *spec)
{
    printf("Usage: %s %s\n\n%s\n\nOptions:\n", spec->command, spec->usage, spec->about);
    for (size_t i = 0; i < spec->num_options; i++) {
        const option *o = &spec->options[i];
        char left[64], range[128] = "";
        snprintf(left, sizeof left, "%s%c%s--%s%s%s", o->letter ? "-" : "",
                 o->letter ? o->letter : ' ', o->letter ? ", " : "   ", o->name,
                 o->argument ? " " : "", o->argument ? o->argument : "");
        if (o->kind != OPTION_KIND_SWITCH && o->kind != OPTION_KIND_TEXT &&
            o->kind != OPTION_KIND_TEXTS)
            describe(o, range, sizeof range);
        printf("  %-26s %s%s%s%s\n", left, o->help, range[0] ? " (" : "", range,
               range[0] ? ")" : "");
    }
    printf("  %-26s %s\n", "    --help", "this text");
}

/* The option that `word` names, and where its "=VALUE" starts, if it has one. */
static const option *find(const options_spec *spec, const char *word, const char **value)
{
    *value = NULL;
    if (word[0] == '-' && word[1] == '-') {
        const char *name = word + 2;
        size_t length = strcspn(name, "=");
        for (size_t i = 0; i < spec->num_options; i++) {
            const option *o = &spec->options[i];
            if (strlen(o->name) == length && strncmp(o->name, name, length) == 0) {
                *value = name[length] ? name + length + 1 : NULL;
                return o;
            }
        }
    } else if (word[1] && !word[2]) {
        for (size_t i = 0; i < spec->num_options; i++) {
            if (spec->options[i].letter == word[1])
                return &spec->options[i];
        }
    }
    return NULL;
}

/* Handles the option at argv[i]; returns the words it took, or -1 after a message. */
static int take(const options_spec *spec, int argc, char **argv, int i)
{
    const char *value;
    const option *o = find(spec, argv[i], &value);
    int words = 1;
    char expected[256];
    if (!o) {
        options_misuse(spec, "unknown option '%s'", argv[i]);
        return -1;
    }
    if (o->kind == OPTION_KIND_SWITCH && value) {
        options_misuse(spec, "--%s takes no value, but '%s' was given", o->name, value);
        return -1;
    }
    describe(o, expected, sizeof expected);
    if (o->kind != OPTION_KIND_SWITCH && !value) {
        if (i + 1 == argc) {
            options_misuse(spec, "--%s needs a value: %s", o->name, expected);
            return -1;
        }
        value = argv[i + 1];
        words = 2;
    }
    if (!store(o, value)) {
        options_bad_value(spec, o->name, value, expected);
        return -1;
    }
    if (o->given)
        *o->given = true;
    return words;
}

int options_parse(const options_spec *spec, int argc, char **argv, int *exit_code)
{
    int i = 1;
    *exit_code = EXIT_USAGE;
    while (i < argc && argv[i][0] == '-' && argv[i][1]) {
        if (strcmp(argv[i], "--") == 0) {
            i++;
            break;
        }
        if (strcmp(argv[i], "--help") == 0) {
            print_help(spec);
            *exit_code = EXIT_OK;
            return -1;
        }
        int words = take(spec, argc, argv, i);
        if (words < 0)
            return -1;
        i += words;
    }
    if (i < argc && !spec->takes_operands) {
        options_misuse(spec, "unexpected word '%s'", argv[i]);
        return -1;
    }
    *exit_code = EXIT_OK;
    return i;
}
