/* SPDX-License-Identifier: MIT */
/* This process, as other processes of the host tell it from theirs. */
#ifndef EPI_TRANSPORT_CUDA_IPC_PROCESS_H
#define EPI_TRANSPORT_CUDA_IPC_PROCESS_H

#include <stdint.h>

/* The same for every thread of the process; a forked child has another. Never 0. */
uint64_t epi_process_number(void);

#endif
