/* SPDX-License-Identifier: MIT */
#ifndef EPI_TRANSPORT_FAULT_OPTIONS_H
#define EPI_TRANSPORT_FAULT_OPTIONS_H

#include "entrepot/status.h"

#include <stdint.h>

/* docs/testing.md says what each does. */
typedef struct epi_fault_options {
    int64_t seed;
    int64_t delay_us;   /* 0: none */
    int64_t reorder;    /* 0 or 1 */
    int64_t repeat;     /* percent */
    int64_t stall_rank; /* -1: none */
    int64_t stall_at;
    int64_t stall_ms;
    int64_t kill_rank; /* -1: none */
    int64_t kill_at;
} epi_fault_options;

/* EP_ERR_ARGUMENT names the key, its value and the range. */
ep_status epi_fault_options_parse(const char *text, int num_ranks, epi_fault_options *options);

#endif
