/* SPDX-License-Identifier: MIT */
/* Address space and memory of windows. */
#ifndef EPI_TRANSPORT_PAGES_H
#define EPI_TRANSPORT_PAGES_H

#include "entrepot/status.h"

#include <stddef.h>
#include <stdint.h>

/* Rounds up to pages; SIZE_MAX when that overflows. */
size_t epi_pages_round(size_t bytes);

/* EP_ERR_MEMORY when the machine or the control group could not give `bytes` more. A race with
   others remains; it is what keeps a hopeless request from waking the out-of-memory killer. */
ep_status epi_pages_check_available(size_t bytes);

/* Maps all of a memory file, or anonymous private memory for fd -1, and reserves no swap for it. */
ep_status epi_pages_map(int fd, size_t reserve, uint8_t **base);
void epi_pages_unmap(uint8_t *base, size_t reserve);

/* Backs [base + from, base + to) with memory now; EP_ERR_MEMORY if there is none. */
ep_status epi_pages_populate(uint8_t *base, size_t from, size_t to);

/* Gives whole pages of private memory back to the system; they read as zero. */
void epi_pages_drop(uint8_t *base, size_t from, size_t to);

#endif
