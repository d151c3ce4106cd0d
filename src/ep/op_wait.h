/* SPDX-License-Identifier: MIT */
/* What a call in progress waits for; between op.c and op_wait.c only. */
#ifndef EPI_EP_OP_WAIT_H
#define EPI_EP_OP_WAIT_H

#include "ep/op.h"

/* EP_OK when the wait is over, EP_IN_PROGRESS, or an error that ends the call. */
ep_status epi_op_look(epi_op *op);

/* Whether `source` gave the call up, having sent nothing, among others in a row. */
bool epi_op_is_in_run(const ep_buffer *buffer, int source, uint64_t epoch);

/* For epi_wait: whether epi_op_look would not return EP_IN_PROGRESS; whether `rank` is missing. */
bool epi_op_wait_over(void *op);
bool epi_op_is_late(void *op, int rank);

int64_t epi_op_now_ns(const epi_op *op);

/* Records a phase of the call where the buffer is traced. */
void epi_op_trace(const epi_op *op, const char *phase, int64_t begin_ns, int64_t end_ns);

#endif
