/* SPDX-License-Identifier: MIT */
/* A buffer from inside. */
#ifndef EPI_EP_BUFFER_H
#define EPI_EP_BUFFER_H

#include "base/error.h"
#include "entrepot/ep.h"
#include "ep/group.h"
#include "ep/op.h"
#include "ep/pool.h"
#include "ep/team.h"

#include <pthread.h>

struct ep_buffer {
    ep_group *group;
    ep_buffer *next_of_group;
    ep_buffer_config config;
    int rank, num_ranks;
    epi_window *window;
    epi_pool pool;        /* under pool_lock */
    epi_pool sparse_pool; /* address space past it, backed piece by piece; under pool_lock */
    pthread_mutex_t pool_lock;
    size_t mailbox_bytes, mailbox_offset;

    pthread_mutex_t lock; /* guards the queue and the epoch */
    pthread_cond_t work, done;
    epi_op *head, *tail;     /* calls not completed, in order */
    epi_op *oldest, *newest; /* likewise with those that hooks complete */
    bool running;            /* some thread runs the head */
    bool stop;
    uint64_t epoch;
    uint64_t first_valid; /* handles of calls before this one are of another set of ranks */
    bool has_worker;
    pthread_t worker;
    epi_team *team;        /* NULL: no helpers */
    struct epi_ll *ll;     /* low-latency memory of the last shape; NULL: none yet */
    struct epi_ll *ll_old; /* memory of earlier ones that peers may still read; under pool_lock */
    size_t sparse_bytes;   /* backed in sparse_pool; under pool_lock */
    _Atomic uint64_t ll_live[2]; /* calls whose results are alive; 0: none */
    ep_trace_fn trace;           /* NULL: not traced */
    void *trace_context;
    _Atomic int64_t *wait_ns; /* [R] time spent waiting for each rank, all calls together */
    _Atomic int num_objects;  /* events, handles and results alive */
    const struct epi_backend_ops *backend; /* of an accelerator; NULL on the CPU */
    void *device;                          /* the backend's part */
};

/* Bytes at the head of a window that hold no rows; max_experts 0 is the default. */
size_t epi_control_area_bytes(int num_ranks, int64_t max_experts);

/* Mail that `source` wrote to `owner` about call `epoch`, as seen from this rank. */
epi_mailbox *epi_buffer_mailbox(const ep_buffer *buffer, int owner, int source, uint64_t epoch);

/* What `source` tells `owner` of the calls it gave up, as seen from this rank. */
epi_aborts *epi_buffer_aborts(const ep_buffer *buffer, int owner, int source);

/* Where `source` tells `owner` why it gave call `epoch` up, if that is what it says. */
epi_abort *epi_buffer_abort(const ep_buffer *buffer, int owner, int source, uint64_t epoch);

/* The call's number that `source` is certainly at, or past. */
uint64_t epi_buffer_progress(const ep_buffer *buffer, int source);

/* Whether [memory, memory + bytes) lies in this rank's window; then *offset is where. */
bool epi_buffer_contains(const ep_buffer *buffer, const void *memory, size_t bytes, size_t *offset);

/* Takes rank `rank` in again, whose side of this is ep_buffer_create. Collective. */
ep_status epi_buffer_admit(ep_buffer *buffer, int rank);

/* After a failure or a change of ranks: goes on at `epoch`, as every rank does. */
void epi_buffer_align(ep_buffer *buffer, uint64_t epoch);

/* EP_ERR_STATE for a handle from before a rank was taken in again. */
ep_status epi_buffer_check_handle(const char *call, const ep_buffer *buffer, uint64_t id);

/* Whether a window whose control area takes `control` bytes can be as the caller wants it. On
   accelerators their module asks. */
static inline ep_status epi_buffer_check_window(const ep_buffer_config *config, size_t control)
{
    size_t most = config->window_max_bytes, wanted = config->window_bytes;
    size_t least = wanted < SIZE_MAX - control ? control + wanted : SIZE_MAX;
    if (most < least)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_buffer_create: window_max_bytes is %zu; it must be at least %zu, the "
                        "control area and window_bytes",
                        most, least);
    if (most > SIZE_MAX / 4)
        return epi_fail(EP_ERR_ARGUMENT,
                        "ep_buffer_create: window_max_bytes is %zu; it must be below 2^62", most);
    return EP_OK;
}

ep_status epi_buffer_take(ep_buffer *buffer, size_t bytes, size_t *offset);
void epi_buffer_give(ep_buffer *buffer, size_t offset);

#endif
