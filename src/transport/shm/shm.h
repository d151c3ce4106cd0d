/* SPDX-License-Identifier: MIT */
/* Ranks that are processes of one host: windows are memory files without a name. */
#ifndef EPI_TRANSPORT_SHM_H
#define EPI_TRANSPORT_SHM_H

#include "transport/ops.h"

ep_status epi_shm_open(epi_bootstrap *bootstrap, epi_transport **transport);

#endif
