/* SPDX-License-Identifier: MIT */
/*
 * Wraps another transport and makes what may go wrong go wrong, by seed: late,
 * repeated and reordered notifications, a rank that stalls, a rank that dies.
 */
#ifndef EPI_TRANSPORT_FAULT_H
#define EPI_TRANSPORT_FAULT_H

#include "transport/ops.h"

/* `options` is "KEY=VALUE,..." or "". Takes over `inner`, also where it fails. Collective. */
ep_status epi_fault_open(epi_bootstrap *bootstrap, epi_transport *inner, const char *options,
                         epi_transport **transport);

#endif
