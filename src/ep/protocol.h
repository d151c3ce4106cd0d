/* SPDX-License-Identifier: MIT */
/*
 * What ranks write into each other's windows beside rows. See docs/protocol.md.
 *
 * Every call on a buffer has a number, its epoch, counted alike on every rank.
 * A call is: write the mail, raise ENTER; look at everybody's mail; where a
 * receiver must make room first, await ROOM; move rows; raise LEAVE. A rank
 * that gives a call up raises ABORT. The values raised are epochs.
 */
#ifndef EPI_EP_PROTOCOL_H
#define EPI_EP_PROTOCOL_H

#include "transport/ops.h"

enum epi_slot {
    EPI_SLOT_ENTER = 0,   /* my mail of this call is in your window */
    EPI_SLOT_ROOM = 1,    /* my window has room for this call's rows, or never will */
    EPI_SLOT_LEAVE = 2,   /* my rows are in your window; I no longer read yours */
    EPI_SLOT_ABORT = 3,   /* I gave this call up; why is in my mail */
    EPI_SLOT_LL_SENT = 4, /* my tokens of this call can be read in my window */
    EPI_SLOT_LL_Y = 5,    /* my expert outputs of this call can be read in my window */
    EPI_SLOT_DONE = 6,    /* all my calls up to this one have ended: I read no more for them */
};

/* Arguments that must be the same on every rank. */
enum epi_agreed {
    EPI_AGREED_CALL,
    EPI_AGREED_HIDDEN,
    EPI_AGREED_DTYPE,
    EPI_AGREED_TOPK,
    EPI_AGREED_TOPK_DTYPE,
    EPI_AGREED_EXPERTS,
    EPI_AGREED_TABLE,
    EPI_AGREED_WEIGHTS,
    EPI_AGREED_SCALE,
    EPI_AGREED_LAYOUT,
    EPI_AGREED_ALIGNMENT,
    EPI_AGREED_HANDLE,
    EPI_AGREED_MASK,
    EPI_AGREED_MAX_TOKENS,
    EPI_AGREED_EXPERT_ROWS,
    EPI_AGREED_OVERFLOW,
    EPI_NUM_AGREED
};

enum epi_call_kind { EPI_CALL_DISPATCH = 1, EPI_CALL_COMBINE = 2, EPI_CALL_LL_SETUP = 3 };

/* Where a rank's expert outputs (or other rows to be read) lie. */
enum epi_place { EPI_PLACE_NONE = 0, EPI_PLACE_WINDOW = 1, EPI_PLACE_ORDINARY = 2 };

typedef struct epi_rows_place {
    int32_t place; /* enum epi_place */
    int32_t has_weights;
    uint64_t address; /* offset in the window, or address in the process */
    uint64_t stride;  /* bytes from row to row */
    uint64_t weights; /* offset of [rows, K] float32 in the window */
    uint64_t sums;    /* verify mode: offset of [rows] checksums in the window */
} epi_rows_place;

/* One rank's message to every other about one call; followed by int32 counts [R + E]. */
typedef struct epi_mail {
    uint64_t epoch; /* of the call it was written for */
    int64_t agreed[EPI_NUM_AGREED];
    int64_t num_tokens;
    int64_t worst;           /* bound on the rows of this receiver; 0: none */
    uint64_t base, capacity; /* region of this receiver's window offered for the call */
    epi_rows_place rows;
} epi_mail;

/* A receiver's answer when its offer was too small. */
typedef struct epi_room {
    uint64_t base;
    int64_t status; /* ep_status */
    char text[240];
} epi_room;

/* Why a rank gave a call up; `origin` is the rank that failed first. */
typedef struct epi_abort {
    uint64_t epoch;
    int64_t status;
    int32_t origin;
    int32_t early; /* it had sent nothing, so no rank can have completed the call */
    char text[488];
} epi_abort;

/* What a source says of the calls it gave up. It waits for nobody meanwhile, so it may be many
   calls ahead: of its last calls in a row that it gave up before it sent anything it says the first
   and the last, and of any call the reason, each in its place by the epoch. A reason is written
   over when the reader is known to be past its call. */
#define EPI_REASONS 8

typedef struct epi_aborts {
    _Atomic uint64_t first, last; /* last is 0 while first changes */
    epi_abort reason[EPI_REASONS];
} epi_aborts;

/*
 * Two sets of mail per source, by the epoch's parity: a rank writes a set again
 * only when the reader is known to be past the call before last.
 */
typedef struct epi_mailbox {
    epi_room room;
    epi_mail mail;
    int32_t counts[];
} epi_mailbox;

#endif
