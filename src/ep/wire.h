/* SPDX-License-Identifier: MIT */
/*
 * What ranks say to each other over the sockets of the local bootstrap. Frames
 * are a fixed head and a payload. Both ends are processes of one user on one
 * host, so numbers are in the host's order.
 *
 *   HELLO   rank -> hub   no payload
 *   GATHER  rank -> hub   this rank's bytes of an all-gather
 *   RESULT  hub -> rank   everybody's bytes
 *   FAIL    hub -> rank   why the group cannot be made
 */
#ifndef EPI_EP_WIRE_H
#define EPI_EP_WIRE_H

#include "entrepot/status.h"

#include <stddef.h>
#include <stdint.h>

#define EPI_WIRE_MAGIC 0x31425045u /* "EPB1": changes with anything said over the sockets */
#define EPI_WIRE_MESSAGE_MAX 400

typedef enum epi_frame_kind {
    EPI_FRAME_HELLO = 1,
    EPI_FRAME_GATHER = 2,
    EPI_FRAME_RESULT = 3,
    EPI_FRAME_FAIL = 4
} epi_frame_kind;

typedef struct epi_frame {
    uint32_t magic;
    uint32_t kind;
    int32_t rank; /* of the sender */
    int32_t num_ranks;
    uint32_t round;      /* 0 for HELLO and its RESULT, then counting all-gathers */
    uint32_t bytes;      /* of the payload */
    int32_t status;      /* of FAIL */
    int32_t reserved;    /* 0 */
    int64_t deadline_ns; /* when the sender gives up, on the host's monotonic clock */
} epi_frame;

/* What the receiver of a frame can tell beforehand. */
typedef struct epi_frame_expect {
    uint32_t kind;
    int32_t rank; /* -1: any */
    int32_t num_ranks;
    uint32_t round;
    uint32_t max_bytes;
} epi_frame_expect;

/* Reads a head from `size` bytes and checks it. EP_ERR_FORMAT says what is wrong with it;
   EP_ERR_MISMATCH when only num_ranks differs, and *frame is set. A FAIL passes wherever a RESULT
   is expected. */
ep_status epi_frame_parse(const void *data, size_t size, const epi_frame_expect *expect,
                          epi_frame *frame);

/* Makes a FAIL's payload, not terminated and of any content, the last error; returns its status. */
ep_status epi_frame_fail(const epi_frame *frame, const void *payload);

#endif
