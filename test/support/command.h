/* SPDX-License-Identifier: MIT */
/* Runs a program to its end and keeps what it printed. */
#ifndef EP_TEST_COMMAND_H
#define EP_TEST_COMMAND_H

#include <stdbool.h>

#define COMMAND_OUTPUT_MAX (1 << 20)

typedef struct command_result {
    int code;  /* exit code, or 128 + the signal that ended it */
    char *out; /* what it printed, at most COMMAND_OUTPUT_MAX bytes, 0-terminated */
    char *err;
} command_result;

/* Runs argv (NULL-terminated, argv[0] is the program); killed after a minute. Fails the test when
   it cannot be started. */
command_result command_run(const char *const *argv);
/* The same for one line of words parted by single blanks; "entrepot" as first word is the command
   of this build. */
command_result command_line(const char *line);
void command_free(command_result *result);

/* Whether `text` is exactly one JSON value and a newline. */
bool json_is_one_value(const char *text);
/* The number after the first "key": in `text`; NaN when there is none. */
double json_number(const char *text, const char *key);

#endif
