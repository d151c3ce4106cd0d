/* SPDX-License-Identifier: MIT */
/* Notifications on their way, and the thread that delivers each when its time has come. */
#ifndef EPI_TRANSPORT_FAULT_PUMP_H
#define EPI_TRANSPORT_FAULT_PUMP_H

#include "transport/ops.h"

typedef struct epi_pump epi_pump;

typedef struct epi_parcel {
    epi_window *window; /* of the wrapped transport */
    int dst;
    int slot;
    uint64_t value;
    int64_t due_ns;
    uint64_t order; /* set by the pump: parcels due at the same time go in the order they came */
} epi_parcel;

ep_status epi_pump_create(epi_pump **pump);
/* What is still on its way is dropped. NULL is allowed. */
void epi_pump_destroy(epi_pump *pump);

/* false when there is no memory; the caller delivers then. */
bool epi_pump_add(epi_pump *pump, const epi_parcel *parcel);

/* Delivers at once all that is on its way from `window`; none of it is left when this returns. */
void epi_pump_flush(epi_pump *pump, const epi_window *window);

#endif
