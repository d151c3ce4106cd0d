/* SPDX-License-Identifier: MIT */
/* Exit codes of every command; scripts depend on them. */
#ifndef APPS_EXIT_H
#define APPS_EXIT_H

enum {
    EXIT_OK = 0,
    EXIT_CHECK_FAILED = 1, /* the run went through, its result is wrong */
    EXIT_USAGE = 2,        /* bad option, value or input file */
    EXIT_RUNTIME = 3       /* the run itself failed */
};

#endif
