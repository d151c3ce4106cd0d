/* SPDX-License-Identifier: MIT */
/*
 * Why calls are given up. Kernels pass on a word (EPC_WHY) that has the rank and the
 * status; the text of a refusal lies in memory of the host that all ranks see, under
 * the number that the word carries.
 */
#include "ep/cuda/internal.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TEXTS 8 /* of a rank's last refusals; a slower peer finds the status alone */

typedef struct epc_reason {
    _Atomic uint32_t number; /* 0 while it is written */
    char text[EPI_ERROR_MAX];
} epc_reason;

struct epc_reasons {
    epi_window *window;
    size_t offset;
    uint32_t last; /* number of this rank's last one, 1..65535 */
};

static epc_reason *reason_of(const epc_reasons *reasons, int rank, uint32_t number)
{
    return (epc_reason *)(reasons->window->peer[rank] + reasons->offset) + number % TEXTS;
}

ep_status epc_reasons_create(epc_buffer *b)
{
    epc_reasons *reasons = calloc(1, sizeof *reasons);
    if (!reasons)
        return epi_fail(EP_ERR_MEMORY, "ep_buffer_create: out of memory");
    b->reasons = reasons;
    reasons->offset = (epi_control_bytes(b->num_ranks) + 63) / 64 * 64;
    return epc_core.shared_create(b->buffer->group, reasons->offset + TEXTS * sizeof(epc_reason),
                                  &reasons->window);
}

void epc_reasons_destroy(epc_buffer *b)
{
    if (b->reasons && b->reasons->window)
        epc_core.shared_destroy(b->reasons->window);
    free(b->reasons);
    b->reasons = NULL;
}

uint32_t epc_reason_publish(epc_buffer *b, ep_status status, const char *text)
{
    epc_reasons *reasons = b->reasons;
    reasons->last = reasons->last % 65535 + 1;
    epc_reason *own = reason_of(reasons, b->rank, reasons->last);
    atomic_store(&own->number, 0);
    strncpy(own->text, text, sizeof own->text - 1);
    atomic_store(&own->number, reasons->last);
    return EPC_WHY(b->rank, status, reasons->last);
}

/* The text under a number, unless it has made way for another. */
static bool read_text(const epc_buffer *b, int rank, uint32_t number, char *text)
{
    epc_reason *theirs = reason_of(b->reasons, rank, number);
    if (atomic_load(&theirs->number) != number)
        return false;
    memcpy(text, theirs->text, EPI_ERROR_MAX);
    atomic_thread_fence(memory_order_acquire);
    text[EPI_ERROR_MAX - 1] = 0;
    return atomic_load(&theirs->number) == number;
}

ep_status epc_gave_up_error(const epc_flight *flight, uint32_t why)
{
    const epc_buffer *b = flight->owner;
    int rank = (int)(why & 0xff);
    ep_status status = (ep_status)(why >> 8 & 0xff);
    uint32_t more = why >> 16;
    char text[EPI_ERROR_MAX + 2] = "";
    if (status == EP_ERR_TIMEOUT && more)
        snprintf(text, sizeof text, ": no word from rank %u", more - 1);
    else if (more && rank < b->num_ranks && read_text(b, rank, more, text + 2))
        memcpy(text, ": ", 2);
    else if (status != EP_ERR_ABORTED)
        snprintf(text, sizeof text, ": %s", ep_status_string(status));
    return epi_fail(EP_ERR_ABORTED, "%s (call %u): rank %d gave up%s", flight->call, flight->serial,
                    rank, text);
}
