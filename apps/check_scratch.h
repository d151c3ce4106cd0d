/* SPDX-License-Identifier: MIT */
/* What the references of both modes share; private to check*.c. */
#ifndef APPS_CHECK_SCRATCH_H
#define APPS_CHECK_SCRATCH_H

#include "check.h"

/* Routing of one rank, and one row in the making. */
typedef struct check_scratch {
    int32_t *ids;
    float *weights;
    uint16_t *row;
    uint8_t *codes;
    float *scales;
    float *value;  /* the row as experts see it */
    float *sum;    /* of outputs, as the library must form it */
    double *exact; /* of outputs */
} check_scratch;

bool check_scratch_alloc(const workload *w, check_scratch *s, char *message);
void check_scratch_free(check_scratch *s);

/* Sets the message; returns false. */
bool check_fail(char *message, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* A row of a rank as experts see it, in s->value. */
void check_expert_input(const workload *w, int rank, int64_t token, bool fp8, check_scratch *s);

/* Sums for the relative squared difference 1 - 2 sum(ab) / sum(a^2 + b^2). */
typedef struct check_difference {
    double product, squares;
} check_difference;

/* Compares a token's output with s->sum bit for bit, and adds to the difference from s->exact. */
bool check_output(const workload *w, int64_t token, const uint16_t *out, const check_scratch *s,
                  check_difference *d, char *message);
bool check_difference_below(const check_difference *d, double bound, char *message);

#endif
