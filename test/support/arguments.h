/* SPDX-License-Identifier: MIT */
/*
 * Bad arguments: two ranks make the same calls; of each, one rank (the victim)
 * changes one argument. It must get this status and this very message, the other
 * the same message as EP_ERR_ABORTED soon, and nobody's outputs may be touched.
 */
#ifndef EP_TEST_ARGUMENTS_H
#define EP_TEST_ARGUMENTS_H

#include "entrepot/ep.h"

#include "support/on_device.h"
#include "support/tensors.h"

#include <stdbool.h>

enum { ARGS_RANKS = 2, ARGS_TOKENS = 3, ARGS_HIDDEN = 64, ARGS_TOPK = 2, ARGS_EXPERTS = 4 };

/* A rank's valid arguments, from which a case changes one. */
struct args_bench {
    ep_group *group;
    ep_buffer *buffer, *other; /* `other` only lends its handle */
    int rank, cases, failed;
    bool victim; /* of the case at hand */
    int64_t ids[ARGS_TOKENS * ARGS_TOPK];
    float weights[ARGS_TOKENS * ARGS_TOPK];
    uint16_t x[ARGS_TOKENS * ARGS_HIDDEN];
    uint16_t out[ARGS_TOKENS * ARGS_HIDDEN];
    float out_weights[ARGS_TOKENS * ARGS_TOPK];
    uint16_t *y; /* enough for every row */
    float *row_weights;
    ep_recv recv, expert_recv, other_recv; /* alive throughout: their handles serve */
    ep_dispatch_args dispatch;
    ep_combine_args combine, expert_combine;
    ep_dispatch_backward_args dispatch_backward;
    ep_combine_backward_args combine_backward, expert_backward;
};

/* Makes two ranks as threads or processes, sets their benches up, and runs `body`, which returns
   nothing: failures count in bench->failed. Returns how many ranks failed. */
int args_run(const char *transport, void (*body)(struct args_bench *));

/* Starts the next case: settles who is the victim. */
void args_next(struct args_bench *bench);

/* Ends a case: `call` is the text of the changed argument, for the report. */
void args_check(struct args_bench *bench, const char *change, ep_status status, ep_status want,
                const char *message);

/* A device that is not the buffer's, and what is said of a tensor there. */
#define ARGS_OTHER (test_device_wanted() ? ON_DEVICE_OTHER : EP_DEVICE_CUDA)
const char *args_other_text(const char *tensor);
/* The same of a device 5 further, where the buffer is on one; CPUs have no index. */
const char *args_index_text(const struct args_bench *bench, const char *tensor);

/* A call of each kind with poisoned outputs; the check that they stay so is counted too. */
ep_status args_dispatch(struct args_bench *bench, const ep_dispatch_args *args);
ep_status args_combine(struct args_bench *bench, const ep_combine_args *args);
ep_status args_dispatch_backward(struct args_bench *bench, const ep_dispatch_backward_args *args);
ep_status args_combine_backward(struct args_bench *bench, const ep_combine_backward_args *args);

/*
 * One case. `given` is the bench's member to start from, `change` an expression
 * that changes `a`, made on the victim only. The victim's status is `want`.
 */
#define BAD(kind, given, change, want, message)                            \
    do {                                                                   \
        args_next(bench);                                                  \
        ep_##kind##_args a = bench->given;                                 \
        if (bench->victim) {                                               \
            change;                                                        \
        }                                                                  \
        args_check(bench, #change, args_##kind(bench, &a), want, message); \
    } while (0)

/* Cases of a tensor on a wrong device, of both kinds; `tensor`: the call and its name. */
#define BAD_DEVICES(kind, given, member, tensor)                                                  \
    do {                                                                                          \
        BAD(kind, given, a.member.device = ARGS_OTHER, EP_ERR_ARGUMENT, args_other_text(tensor)); \
        if (test_device_wanted())                                                                 \
            BAD(kind, given, a.member.device_index = 5, EP_ERR_ARGUMENT,                          \
                args_index_text(bench, tensor));                                                  \
    } while (0)

/* Rank 1 changes an argument to another valid one: both get the same error. */
#define BOTH(kind, given, change, want, message)                           \
    do {                                                                   \
        args_next(bench);                                                  \
        bench->victim = true;                                              \
        ep_##kind##_args a = bench->given;                                 \
        if (bench->rank == 1) {                                            \
            change;                                                        \
        }                                                                  \
        args_check(bench, #change, args_##kind(bench, &a), want, message); \
    } while (0)

#endif
