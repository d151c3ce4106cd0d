/* SPDX-License-Identifier: MIT */
/*
 * Notifications and event count of transports whose windows are plain shared
 * memory: the words of an epi_control and a futex.
 *
 * Neither side may miss the other. The notifier raises its word, then looks
 * whether anybody sleeps; the waiter says that it sleeps, then looks at the
 * words. A full fence between the two steps on both sides makes at least one
 * of them see the other.
 */
#ifndef EPI_TRANSPORT_EVENTCOUNT_H
#define EPI_TRANSPORT_EVENTCOUNT_H

#include "transport/ops.h"

/* Whether the futex is looked up by address space (threads) or by memory object (processes). */
typedef enum epi_futex_scope { EPI_FUTEX_SHARED, EPI_FUTEX_PRIVATE } epi_futex_scope;

/* Raises word (source, slot) to `value` and wakes whoever sleeps on `control`. */
void epi_control_raise(epi_control *control, int source, int slot, uint64_t value,
                       epi_futex_scope scope);

uint32_t epi_control_sleep_begin(epi_control *control);
void epi_control_sleep(epi_control *control, uint32_t ticket, int64_t timeout_ns,
                       epi_futex_scope scope);

#endif
