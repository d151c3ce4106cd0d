/* SPDX-License-Identifier: MIT */
/*
 * A call in progress: a list of stages, each of which does work and may leave a
 * condition to wait for. One form serves blocking calls, calls on the worker and
 * calls that proceed in ep_event_wait; stages never sleep and never read a clock.
 */
#ifndef EPI_EP_OP_H
#define EPI_EP_OP_H

#include "entrepot/ep.h"
#include "ep/protocol.h"

typedef struct epi_op epi_op;

typedef struct epi_stage {
    ep_status (*run)(epi_op *op);
    const char *name; /* of the phase, for traces */
} epi_stage;

/* Waits until words of other ranks' have reached a value. */
typedef struct epi_wait_for {
    bool active;
    bool entered; /* instead of `slot`: the peer is at call `value` or later */
    bool begun;   /* looked at once; `seen` and `since_ns` are set */
    int slot;
    int missing; /* ranks not seen yet */
    uint64_t value;
    const bool *from;  /* [num_ranks] which ranks; NULL: all. Masked ones are never waited for. */
    int64_t *cost;     /* [num_ranks] of the caller's: ns waited for each are added; may be NULL */
    int64_t since_ns;  /* when the wait began; 0: not yet looked at, or nobody was missing */
    const char *phase; /* for traces */
} epi_wait_for;

#define EPI_SEEN_SMALL 64

struct epi_op {
    ep_buffer *buffer;
    const char *name;        /* for messages: "dispatch" */
    const epi_stage *stages; /* ends with a NULL run */
    void (*finish)(
        epi_op *op,
        ep_status status); /* publishes or undoes, and frees what the op holds but not the op */
    uint64_t epoch;
    int stage;
    bool *seen; /* [num_ranks] of the current wait */
    bool seen_small[EPI_SEEN_SMALL];
    int eager; /* > 0: a call completed by its hook; so many stages run at once, the rest there */
    bool announces;        /* peers wait for the end of this call: raise DONE */
    bool no_mail;          /* mail of a peer about this call ends it, see mail_of in op_wait.c */
    const int64_t *agreed; /* [EPI_NUM_AGREED] what this rank would have to mail; may be NULL */
    epi_wait_for wait;
    int aborted_by; /* rank whose abort ended the call; -1 */
    bool rejected;  /* failed before it began: status and message are set */
    ep_status status;
    bool sent;         /* peers can read or have got something: they may complete the call */
    bool crossed;      /* a peer makes a low-latency call here, this rank another call */
    bool failed_early; /* of a failure: the rank that failed first had sent nothing */
    char message[512];
    ep_event *previous;
    ep_event *event;
    epi_op *next;          /* in the buffer's queue */
    epi_op *older, *newer; /* among the buffer's calls that have not ended */
};

/* Leaves a condition that the driver waits for before the next stage. */
void epi_op_await(epi_op *op, int slot, uint64_t value, const bool *from);
void epi_op_await_entered(epi_op *op, uint64_t epoch);
/* Until call `epoch` has ended on every rank. EP_ERR_STATE when it would wait for a hook that only
   this very thread can run. */
ep_status epi_op_await_done(epi_op *op, uint64_t epoch);

/*
 * Takes a call, whose object it owns from now on: runs it now, or with `event`
 * queues it. Returns its status, or EP_OK once *event completes it.
 */
ep_status epi_op_submit(epi_op *op, ep_event **event);

/* Submits a call whose arguments are bad, the rank's part of the collective. The thread's last
   error is the reason. Returns `status`. */
ep_status epi_op_reject(ep_buffer *buffer, const char *name, ep_status status);
/* Whether the queue holds nothing but such calls, which the worker soon ends. The caller holds the
   lock. */
bool epi_op_refusals_only(const ep_buffer *buffer);

/* Between calls: goes on counting from `epoch`, as every rank then does, and tells the others. */
void epi_op_align(ep_buffer *buffer, uint64_t epoch);

/* Runs queued calls until none is left. */
void epi_op_drain(ep_buffer *buffer);

/* Whether `source` gave up call `epoch`. */
bool epi_op_gave_up(const ep_buffer *buffer, int source, uint64_t epoch);

/* EP_ERR_ABORTED where an unmasked rank has given this call up: what was read of it in place may
   have been overwritten meanwhile. */
ep_status epi_op_check_given_up(epi_op *op);

/* The error of a call that `source` gave up. */
ep_status epi_op_aborted(epi_op *op, int source);

void *epi_worker_main(void *buffer);

#endif
