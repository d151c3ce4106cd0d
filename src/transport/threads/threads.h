/* SPDX-License-Identifier: MIT */
/* Ranks that are threads of one process: windows are ordinary memory. */
#ifndef EPI_TRANSPORT_THREADS_H
#define EPI_TRANSPORT_THREADS_H

#include "transport/ops.h"

ep_status epi_threads_open(epi_bootstrap *bootstrap, epi_transport **transport);

#endif
