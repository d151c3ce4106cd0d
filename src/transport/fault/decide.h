/* SPDX-License-Identifier: MIT */
/* What happens to each notification: the same for the same options, seed, rank and count. */
#ifndef EPI_TRANSPORT_FAULT_DECIDE_H
#define EPI_TRANSPORT_FAULT_DECIDE_H

#include "transport/fault/options.h"

#include <stdbool.h>

typedef struct epi_fault_decider {
    epi_fault_options options;
    int rank;
    uint64_t random;
    int64_t num_decided;
} epi_fault_decider;

typedef struct epi_fault_decision {
    bool kill;
    int64_t stall_ns;
    int64_t delay_ns;
    bool repeat;
} epi_fault_decision;

epi_fault_decider epi_fault_decider_start(const epi_fault_options *options, int rank);
epi_fault_decision epi_fault_decide(epi_fault_decider *decider);

#endif
