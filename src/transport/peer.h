/* SPDX-License-Identifier: MIT */
/*
 * Device memory that the processes of a host reach in each other. Implemented
 * in the folder of a device's transport; part of the device's module.
 */
#ifndef EPI_TRANSPORT_PEER_H
#define EPI_TRANSPORT_PEER_H

#include "entrepot/status.h"

#include <stddef.h>
#include <stdint.h>

/* An allocation as its owner names it to others; plain bytes. */
typedef struct epi_peer_handle {
    uint8_t bytes[64]; /* the driver's name for it */
    uint64_t process;  /* tells processes of the host apart */
    uint64_t base;     /* address at the owner */
    uint64_t size;
    uint64_t identity; /* differs between allocations that had the same address */
    int32_t device;    /* index at the owner */
    int32_t unused;
} epi_peer_handle;

/* Names the allocation that `memory` lies in. EP_ERR_UNSUPPORTED where it can't be shared. */
ep_status epi_peer_export(const void *memory, epi_peer_handle *handle);
/* Base, size and identity alone: cheap, and enough to find a known allocation again. */
ep_status epi_peer_identify(const void *memory, epi_peer_handle *handle);
/* Maps an allocation of another rank; *memory is its base here. */
ep_status epi_peer_open(const epi_peer_handle *handle, void **memory);
void epi_peer_close(const epi_peer_handle *handle, void *memory);

#endif
