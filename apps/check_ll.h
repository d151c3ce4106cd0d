/* SPDX-License-Identifier: MIT */
/*
 * The independent reference of --check for the low-latency mode, beside check.h.
 * There expert e gives y = factor(e) * x, rounded to BF16, and combine applies
 * the weights.
 */
#ifndef APPS_CHECK_LL_H
#define APPS_CHECK_LL_H

#include "check.h"

#include "entrepot/low_latency.h"

static inline float check_ll_factor(int64_t expert)
{
    return 1 + (float)(expert % 7) / 8;
}

/* Counts, rows, order, source tokens and ranges of what `rank` received. */
bool check_ll_dispatch(const workload *w, int rank, bool fp8, const ep_ll_recv *recv,
                       char message[CHECK_MESSAGE_MAX]);

/* Outputs [tokens, hidden] BF16: the very bits of a float32 fused multiply-add in top-k order, and
   within the tolerance of a float64 sum. */
bool check_ll_combine(const workload *w, int rank, bool fp8, const uint16_t *out,
                      char message[CHECK_MESSAGE_MAX]);

#endif
