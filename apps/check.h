/* SPDX-License-Identifier: MIT */
/*
 * The independent reference of --check: plain scalar code that shares nothing
 * with the library but its data types. It computes from the workload alone what
 * a rank must receive and what combine must give back, bit for bit.
 *
 * The expert of the benchmark is y = w * x, rounded to BF16, where x is the row
 * as received and w the float32 sum of the weights of this rank's experts, in
 * top-k order.
 */
#ifndef APPS_CHECK_H
#define APPS_CHECK_H

#include "workload.h"

#include "entrepot/ep.h"

#define CHECK_MESSAGE_MAX 256

/* E4M3 code of a number: to nearest even, saturating at 448. */
uint8_t check_e4m3_from(double value);
double check_e4m3_value(uint8_t code);

/* The row as it arrives: E4M3 codes and float32 scales, one per 128 channels. */
void check_quantise(const uint16_t *row, int64_t hidden, uint8_t *codes, float *scales);

/* Rows, order, expert ids, weights and (where given) source tokens of what `rank` received, experts
   in equal blocks. On a difference returns false and names the first one. */
bool check_dispatch(const workload *w, int rank, bool fp8, const ep_recv *recv,
                    char message[CHECK_MESSAGE_MAX]);

/* Outputs of combine [tokens, hidden] BF16 at `rank`: the very bits of a float32 sum in ascending
   rank order, and within the tolerance of a float64 one. */
bool check_combine(const workload *w, int rank, bool fp8, const uint16_t *out,
                   char message[CHECK_MESSAGE_MAX]);

#endif
