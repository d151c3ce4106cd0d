/* SPDX-License-Identifier: MIT */
/* One rank of the demo: what it has, and its experts. */
#ifndef APPS_DEMO_STATE_H
#define APPS_DEMO_STATE_H

#include "demo.h"
#include "demo_memory.h"

#define DEMO_TRY(call)              \
    do {                            \
        ep_status status_ = (call); \
        if (status_ != EP_OK)       \
            return status_;         \
    } while (0)

/* Tensors of calls: in host memory, and their mirrors. */
typedef struct demo_tensors {
    uint16_t *x, *out;
    int32_t *ids;
    float *weights;
} demo_tensors;

typedef struct demo_state {
    rank_self *self;
    const demo_context *c;
    demo_memory memory;
    ep_buffer *buffer;
    ep_recv recv, view; /* what came, and as the host reads it */
    int64_t tokens, num_rows;
    demo_tensors host, seen;
    uint16_t *y;      /* expert outputs, in the window; set by the first dispatch */
    uint16_t *y_host; /* the same for the host */
    demo_traditional *old;
    uint16_t *old_out;
    uint16_t *old_rows, *old_seen; /* mirrors of what the traditional path received, and gave */
    float e4m3[256];               /* value of each code */
} demo_state;

ep_status demo_no_memory(demo_state *d);

/* The host's view of what came, and its end. */
ep_status demo_recv_view(demo_state *d);
void demo_recv_view_end(demo_state *d);

/* All experts of this rank on the rows received; outputs go to the window. They run on the host,
   wherever rows are; copying these there and back counts. Making up weights is not timed: a model
   has them. Leaves the view open. */
ep_status demo_run_experts(demo_state *d, int wire);

#endif
