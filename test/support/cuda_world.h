/* SPDX-License-Identifier: MIT */
/*
 * Random sequences of calls over the fake GPU: what a rank has alive, what a call
 * is to come to, and what must hold. Ranks draw from `common` alike, and from `own`
 * where they may differ.
 */
#ifndef EP_TEST_CUDA_WORLD_H
#define EP_TEST_CUDA_WORLD_H

#include "entrepot/low_latency.h"

#include "support/cuda.h"
#include "support/fake_gpu.h"
#include "support/random.h"

#define WORLD_TOKENS 64
#define WORLD_HIDDEN 256
#define WORLD_RESULTS 5
#define WORLD_EXTRAS 6
#define WORLD_LL 3
#define WORLD_EVENTS 8
#define WORLD_ALLOCS 6
#define WORLD_PIECES 256
#define WORLD_SHAPES 4

struct piece {
    const uint8_t *at;
    size_t bytes;
};

/* What became of a result, the same on all ranks but for those that got none. */
enum stage { FREE, WAITING, GOOD, DOOMED }; /* DOOMED: no call uses it, to be released some time */

/* Of a dispatch with a handle: what it delivered, and what stays with the handle. */
struct result {
    enum stage stage;
    ep_recv recv;
    ep_handle *handle;
    struct piece tables[4];
    bool by_expert, taken; /* since a call was to deliver it */
};

struct ll_result {
    enum stage stage;
    ep_ll_recv recv;
    int slot; /* of the shape in use that it occupies; -1: none */
    bool taken;
};

struct event {
    ep_event *event;
    ep_status end; /* what it comes to */
    bool room;     /* or to EP_ERR_CAPACITY */
    bool common;   /* all ranks end it in the same step */
    bool hooked;   /* its hook has yet to run, which goes as `hook` says */
    struct fake_outcome hook;
    enum stage *stage;     /* of what the call delivers; NULL: nothing */
    bool dispatches;       /* in normal mode */
    const ep_recv *result; /* of which; NULL: may be gone */
    struct ll_result *ll;
};

/* A low-latency shape that has memory: areas, then what its two slots show. */
struct shape {
    int kind; /* -1: there is none */
    uint64_t calls;
    bool captured;
    struct piece areas, slot[2][6];
};

struct world {
    struct cuda_rank c;
    struct rng common, own;
    ep_tensor weights, outside; /* outputs that peers don't reach yet */
    struct result results[WORLD_RESULTS];
    ep_recv extras[WORLD_EXTRAS]; /* of cached dispatches and backwards */
    struct ll_result ll[WORLD_LL];
    struct event events[WORLD_EVENTS];
    struct piece allocs[WORLD_ALLOCS];
    struct piece held[32];
    struct shape shape, kept[WORLD_SHAPES];
    int num_held, num_kept;
    bool captures;     /* graphs may be captured */
    bool verify;       /* mode: then combines need room, so that windows must never be full */
    bool stays;        /* what they use, or a call that nobody knows to be dead */
    ep_status pending; /* what the next call reports of one before */
    int64_t rows;      /* that the last dispatch by counts receives here */
    bool verdict, met; /* of the last dispatch that was asked; it got memory that is held */
    uint32_t handle;   /* what the last kernel was told; 0: nothing */
};

enum fate {
    WELL,
    TIMES_OUT,
    BAD_ARGUMENT,
    BAD_SMS,
    REFUSED,
    NOT_LAUNCHED,
    DIES,
    HOOK_NOT_LAUNCHED
};

/* One call of all ranks. */
struct call {
    ep_call kind;
    ep_combine_wire wire;                    /* of a low-latency combine */
    bool event, hook, counts, known, halves; /* known: a dispatch whose rows are known before */
    bool state;                              /* refused by all for the state they are in */
    bool sets_up, changes;                   /* a shape, with none or another before */
    const ep_recv *recv;                     /* of a dispatch: where its result comes */
    enum fate fate;
    int victim;
    bool early;       /* some rank refuses before it could take part in setting up */
    ep_status mine;   /* this rank's refusal; EP_OK: none */
    ep_status others; /* the first other rank's */
    int refuser;      /* which; -1: none */
    ep_status end;    /* of this rank's kernel */
    struct fake_outcome outcome;
};

int world_open(ep_group *group, uint64_t seed, struct world *w);
/* Everything has been released and ranks are in step: nothing of it is left. */
int world_close(struct world *w);

/* Draws the fate, and finds who refuses. */
int call_plan(struct world *w, struct call *call);
/* Once nothing about it changes any more: scripts its kernels. */
void call_script(struct world *w, struct call *call);
/* What the call returned must be what was scripted; `event` is what it gave, or NULL. */
int call_check(struct world *w, struct call *call, ep_status got, ep_event *event,
               enum stage *stage, struct ll_result *ll);

/* Arguments by the call's fate: x is one that no call takes, num_sms is out of range, or this rank
   says that it can't call. */
bool is_victim(const struct world *w, const struct call *call, enum fate fate);
ep_tensor x_of(const struct world *w, const struct call *call);
int32_t sms_of(const struct world *w, const struct call *call);
int refuse(struct world *w, struct call *call);

/* Finishes an event in some way. */
int event_end(struct world *w, struct event *event);
int events_end(struct world *w, bool common);
bool hooks_wait(const struct world *w);

/* Handles and tables of results that have come since. */
void results_note(struct world *w);
void result_drop(struct world *w, struct result *result);
void ll_drop(struct world *w, struct ll_result *ll);
/* Notes what the last low-latency kernel was told of its shape. */
void shape_note(struct world *w, int kind);
void shape_forget(struct world *w);

/* A step of all ranks each: dispatch and combine, a result is released or retired, a dispatch and
   its combine are captured by a graph. */
int step_ll_dispatch(struct world *w);
int step_ll_combine(struct world *w);
int step_ll_release(struct world *w);
int step_capture(struct world *w);

struct piece piece_of(const ep_tensor *tensor);
/* Nothing of what is alive overlaps, and ranks count alike. */
int world_check(struct world *w);
size_t world_used(const struct world *w);
/* Whether memory lies in what a failed call's peers may still write. */
bool world_held(const struct world *w, struct piece piece);

#endif
