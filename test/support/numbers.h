/* SPDX-License-Identifier: MIT */
/* Reads the numbers of data files, without a JSON library. */
#ifndef EP_TEST_NUMBERS_H
#define EP_TEST_NUMBERS_H

#include <stddef.h>

/* Whether the shared data files lie beside the checkout. */
int numbers_present(void);

/*
 * The numbers between `key` and the next other key (or the end) of a file
 * below the shared data folder, in their order; NULL if there is no such file
 * or key. The caller frees them.
 */
double *numbers_read(const char *file, const char *key, size_t *count);

/* The same, for a file whose size is known: fails the test when it differs. */
double *numbers_expect(const char *file, const char *key, size_t count);

#endif
