/* SPDX-License-Identifier: MIT */
/*
 * The option parser of every command. Options are `--name VALUE`, `--name=VALUE`
 * or `-n VALUE` where a letter is given; `--` ends them. Numbers are strict: the
 * whole text, in range. `--help` is understood everywhere.
 *
 *   int64_t ranks = 8;
 *   const option table[] = {
 *       OPTION_INTEGER("ranks", "R", &ranks, 1, 1024, "ranks to start"),
 *       OPTION_SWITCH("json", &json, "one JSON object on standard output"),
 *   };
 *   const options_spec spec = {"entrepot demo", "[options]", "What it does.", table, 2};
 *   int exit_code;
 *   int first = options_parse(&spec, argc, argv, &exit_code);
 *   if (first < 0)
 *       return exit_code;
 */
#ifndef APPS_OPTIONS_H
#define APPS_OPTIONS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum option_kind {
    OPTION_KIND_SWITCH,  /* bool */
    OPTION_KIND_INTEGER, /* int64_t */
    OPTION_KIND_REAL,    /* double */
    OPTION_KIND_TEXT,    /* const char *, points into argv */
    OPTION_KIND_TEXTS,   /* option_texts; the option may be given several times */
    OPTION_KIND_CHOICE   /* int, index into choices */
} option_kind;

#define OPTION_TEXTS_MAX 64

typedef struct option_texts {
    const char *text[OPTION_TEXTS_MAX]; /* point into argv */
    int count;
} option_texts;

typedef struct option {
    const char *name;     /* without the dashes */
    const char *argument; /* what --help calls the value; NULL for a switch */
    option_kind kind;
    void *value; /* of the kind's type; left alone when the option is not given */
    int64_t min, max;
    double real_min, real_max;
    const char *const *choices; /* NULL-terminated */
    const char *help;
    bool *given; /* may be NULL; set when the option is given */
    char letter; /* short form, 0 for none */
} option;

#define OPTION_SWITCH(name, value, help)                                       \
    {                                                                          \
        name, NULL, OPTION_KIND_SWITCH, value, 0, 0, 0, 0, NULL, help, NULL, 0 \
    }
#define OPTION_INTEGER(name, argument, value, min, max, help)                           \
    {                                                                                   \
        name, argument, OPTION_KIND_INTEGER, value, min, max, 0, 0, NULL, help, NULL, 0 \
    }
#define OPTION_REAL(name, argument, value, min, max, help)                           \
    {                                                                                \
        name, argument, OPTION_KIND_REAL, value, 0, 0, min, max, NULL, help, NULL, 0 \
    }
#define OPTION_TEXT(name, argument, value, help)                                 \
    {                                                                            \
        name, argument, OPTION_KIND_TEXT, value, 0, 0, 0, 0, NULL, help, NULL, 0 \
    }
#define OPTION_TEXTS(name, argument, value, help)                                 \
    {                                                                             \
        name, argument, OPTION_KIND_TEXTS, value, 0, 0, 0, 0, NULL, help, NULL, 0 \
    }
#define OPTION_CHOICE(name, argument, value, choices, help)                           \
    {                                                                                 \
        name, argument, OPTION_KIND_CHOICE, value, 0, 0, 0, 0, choices, help, NULL, 0 \
    }

typedef struct options_spec {
    const char *command; /* as typed: "entrepot bench ep" */
    const char *usage;   /* what follows it: "[options] -- PROGRAM ARGS" */
    const char *about;   /* printed by --help, before the options */
    const option *options;
    size_t num_options;
    bool takes_operands; /* false: words that are no option are bad usage */
} options_spec;

/*
 * Parses argv[1..]. Returns the index of the first operand (argc when there is
 * none), or -1 when the command is over: *exit_code is then EXIT_OK after
 * --help, or EXIT_USAGE after a message on stderr.
 */
int options_parse(const options_spec *spec, int argc, char **argv, int *exit_code);

/* Reports a bad value the way the parser does, for checks it cannot make; returns EXIT_USAGE.
   `expected` ends the sentence "--NAME is 'VALUE'; it can be ...". */
int options_bad_value(const options_spec *spec, const char *name, const char *value,
                      const char *expected);

/* Reports any other misuse of the command; returns EXIT_USAGE. */
int options_misuse(const options_spec *spec, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Strict numbers: the whole text (no blanks), in range. */
bool parse_integer(const char *text, int64_t min, int64_t max, int64_t *value);
bool parse_real(const char *text, double min, double max, double *value);

#endif
