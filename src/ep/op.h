/* SPDX-License-Identifier: MIT */
/*
 * A call in progress: a list of stages, each of which does work and may leave a
 * condition to wait for. One form serves blocking calls, calls on the worker
 * and calls that proceed in ep_event_wait; stages never sleep and never read a
 * clock.
 */
#ifndef EPI_EP_OP_H
#define EPI_EP_OP_H

#include "entrepot/ep.h"
#include "ep/protocol.h"

typedef struct epi_op epi_op;

typedef ep_status (*epi_stage)(epi_op *op);

/* Waits until words of other ranks' have reached a value. */
typedef struct epi_wait_for {
    bool active;
    bool entered; /* instead of `slot`: the peer is at call `value` or later */
    bool or_past; /* beside `slot`: the peer is past call `value`, which failed there */
    int slot;
    uint64_t value;
    const bool *from; /* [num_ranks] which ranks; NULL: all. Masked ones are never waited for. */
    bool begun;       /* looked at once; `seen` and `since_ns` are set */
    int missing;      /* ranks not seen yet */
    int64_t *cost;    /* [num_ranks] of the caller's: ns waited for each are added; may be NULL */
    int64_t since_ns; /* when the wait began; 0: not yet looked at */
} epi_wait_for;

struct epi_op {
    ep_buffer *buffer;
    const char *name;        /* for messages: "dispatch" */
    const epi_stage *stages; /* NULL-terminated */
    void (*finish)(
        epi_op *op,
        ep_status status); /* publishes or undoes, and frees what the op holds but not the op */
    uint64_t epoch;
    int stage;
    bool *seen; /* [num_ranks] of the current wait */
    int eager;  /* > 0: a call completed by its hook; so many stages run at once, the rest there */
    epi_wait_for wait;
    int aborted_by; /* rank whose abort ended the wait; -1 */
    bool rejected;  /* failed before it began: status and message are set */
    ep_status status;
    char message[512];
    ep_event *previous;
    ep_event *event;
    epi_op *next; /* in the buffer's queue */
};

/* Leaves a condition that the driver waits for before the next stage. */
void epi_op_await(epi_op *op, int slot, uint64_t value, const bool *from);
void epi_op_await_entered(epi_op *op, uint64_t epoch);
/* Until every rank has raised `slot` to `value` or is in a later call. */
void epi_op_await_left(epi_op *op, int slot, uint64_t value);

/*
 * Takes a call, whose object it owns from now on: runs it now, or with `event`
 * queues it. Returns its status, or EP_OK once *event completes it.
 */
ep_status epi_op_submit(epi_op *op, ep_event **event);

/* Submits a call whose arguments are bad, the rank's part of the collective. The thread's last
   error is the reason. Returns `status`. */
ep_status epi_op_reject(ep_buffer *buffer, const char *name, ep_status status);

/* Runs queued calls until none is left. */
void epi_op_drain(ep_buffer *buffer);

/* Whether `source` gave up call `epoch`. */
bool epi_op_gave_up(const ep_buffer *buffer, int source, uint64_t epoch);

/* The error of a call that `source` gave up. */
ep_status epi_op_aborted(epi_op *op, int source);

void *epi_worker_main(void *buffer);

#endif
