/* SPDX-License-Identifier: MIT */
/*
 * The transport plug-in point: windows that peers can reach, and notifications.
 *
 * Protocol code above (src/ep) relies on exactly this, on every transport:
 *
 *  - A window is memory of one rank that all ranks of the group can load from
 *    and store to, at peer[r]. Only the committed head of it may be touched.
 *  - notify(dst, slot, value) raises the word (source, slot) in dst's window to
 *    `value` if it is lower. Everything this rank wrote to any window before it
 *    is visible to whoever sees the raised word (release/acquire, system scope).
 *    Because a word only grows, a late, repeated or reordered notification of an
 *    earlier call can neither undo nor fake a later one: values carry the epoch.
 *  - Waiting is an event count: sleep_begin() before the last look at the
 *    slots, then sleep(), or sleep_cancel() if the look succeeded.
 */
#ifndef EPI_TRANSPORT_OPS_H
#define EPI_TRANSPORT_OPS_H

#include "entrepot/group.h"

#include <stdatomic.h>
#include <stdbool.h>

/* Words each source has in each window. What they mean is the protocol's matter (src/ep). */
#define EPI_NUM_SLOTS 16

typedef struct epi_transport epi_transport;
typedef struct epi_window epi_window;
typedef struct epi_bootstrap epi_bootstrap;

/*
 * The head of every window. Each source's words fill whole cache lines that
 * only that source writes.
 */
typedef struct epi_control {
    _Alignas(64) _Atomic uint32_t doorbell; /* raised to wake sleepers; the futex word */
    _Alignas(
        64) _Atomic uint32_t sleeping; /* 1: a thread is asleep or about to; who wakes clears it */
    struct {
        _Alignas(64) _Atomic uint64_t slot[EPI_NUM_SLOTS];
    } source[];
} epi_control;

static inline size_t epi_control_bytes(int num_ranks)
{
    return sizeof(epi_control) + (size_t)num_ranks * EPI_NUM_SLOTS * sizeof(uint64_t);
}

struct epi_window {
    epi_transport *transport;
    uint8_t *base;    /* this rank's window; starts with epi_control */
    uint8_t **peer;   /* [num_ranks] every rank's window as seen here; peer[rank] == base.
                         NULL for a rank that was masked when the window was made. */
    size_t reserve;   /* bytes of address space, the same on every rank */
    size_t committed; /* bytes backed by memory here */
};

/* Memory of a peer outside any window, to be read into ours. */
typedef struct epi_remote_read {
    uint64_t remote; /* address in the peer's address space */
    void *local;
    size_t bytes;
} epi_remote_read;

typedef struct epi_transport_ops {
    const char *name;

    void (*destroy)(epi_transport *transport);

    /* Collective. Contents start as zero. `committed` <= `reserve`; both are rounded up to pages.
     */
    ep_status (*window_create)(epi_transport *transport, size_t reserve, size_t committed,
                               epi_window **window);
    /* Local: peers may still run; they lose nothing but their view of dead memory. */
    void (*window_destroy)(epi_window *window);
    /* Local: backs the first `bytes` of this rank's window. Peers may touch them once told.
       Fails with EP_ERR_MEMORY rather than letting a later store fault. Never shrinks. */
    ep_status (*window_commit)(epi_window *window, size_t bytes);

    /* A rank that had left comes back: it opens the transport and makes its windows as ever, over
       `bootstrap`, and the ranks that stayed take their part in that by these calls. Both may be
       NULL: never. EP_ERR_STATE when the rank's former process still runs. */
    ep_status (*admit)(epi_transport *transport, int rank, epi_bootstrap *bootstrap);
    ep_status (*window_admit)(epi_window *window, int rank, epi_bootstrap *bootstrap);

    /* Local: backs or drops whole pages of this rank's window past the committed head, where it is
       used sparsely. Dropped pages read as zero. Peers may touch backed ones once told. */
    ep_status (*window_back)(epi_window *window, size_t from, size_t to);
    void (*window_drop)(epi_window *window, size_t from, size_t to);

    /* Nothing happens when peer[dst] is NULL. */
    void (*notify)(epi_window *window, int dst, int slot, uint64_t value);

    /* Event count of this rank's own window; see above. sleep() returns after a notification, after
       timeout_ns, or early for no reason. */
    uint32_t (*sleep_begin)(epi_window *window);
    void (*sleep)(epi_window *window, uint32_t ticket, int64_t timeout_ns);
    void (*sleep_cancel)(epi_window *window);

    /* False once the peer's process (or thread) has certainly ended; of this rank itself, once
       kill_self has been called. */
    bool (*peer_alive)(epi_transport *transport, int rank);
    /* Ends this rank as a crash would: SIGKILL to a process; a thread is marked dead, and whatever
       it notifies from then on vanishes. For the fault transport. */
    void (*kill_self)(epi_transport *transport);

    /* Whether peer_read works between all ranks (agreed at creation). */
    bool (*can_peer_read)(epi_transport *transport);
    /* Reads memory of a peer that is in no window. */
    ep_status (*peer_read)(epi_transport *transport, int rank, const epi_remote_read *reads,
                           size_t count);
    /* Where such memory can be addressed directly, that address here; NULL where it can't. The op
       itself may be NULL: never. */
    const void *(*peer_pointer)(epi_transport *transport, int rank, uint64_t remote);

    /* Monotonic clock, ns; virtual where a simulation drives it. */
    int64_t (*now_ns)(epi_transport *transport);
    /* How many ranks run per core that this process may use, rounded up: tells waits how long
       to spin. */
    int (*ranks_per_core)(epi_transport *transport);
} epi_transport_ops;

/* Every transport's object starts with this. */
struct epi_transport {
    const epi_transport_ops *ops;
    int rank;
    int num_ranks;
};

#define EPI_BOOTSTRAP_MAX 512 /* bytes per rank in one all-gather of the bootstrap */

/*
 * Bootstrap as a transport sees it: an all-gather among the ranks of the group being made.
 * `scratch` is allocated before the first of them, so that no later step can fail on one rank alone
 * without the others hearing of it. Ranks that are masked give zeros.
 */
struct epi_bootstrap {
    ep_status (*allgather)(epi_bootstrap *bootstrap, const void *send, void *recv, size_t bytes);
    void (*close)(epi_bootstrap *bootstrap);
    int rank;
    int num_ranks;
    uint8_t *scratch; /* [num_ranks * EPI_BOOTSTRAP_MAX], 16-byte aligned */
    bool rejoining;   /* one rank comes back to a group that the others have kept */
};

/* All-gathers `bytes` (at most EPI_BOOTSTRAP_MAX); *all [num_ranks * bytes] lies in the scratch
   until the next gather. */
ep_status epi_gather(epi_bootstrap *bootstrap, const void *send, size_t bytes, const void **all);

/* Collective: EP_OK where every rank passes EP_OK. Otherwise every rank gets the status of the
   lowest rank that failed, and as last error that rank's, prefixed with "rank N: " on the others.
 */
ep_status epi_agree(epi_bootstrap *bootstrap, ep_status mine);

/* Opens a transport by its public name ("shm", "threads", "fault(NAME):..."); collective.
   The bootstrap must outlive the transport. */
ep_status epi_transport_open(const char *name, epi_bootstrap *bootstrap, epi_transport **transport);

static inline uint64_t epi_slot_load(const epi_window *window, int source, int slot)
{
    epi_control *control = (epi_control *)window->base;
    /* acquire: pairs with the release of the notify that raised the word */
    return atomic_load_explicit(&control->source[source].slot[slot], memory_order_acquire);
}

/* Raises a word to `value`; false: it is there already, or further. Wakes nobody. */
static inline bool epi_word_raise(epi_control *control, int source, int slot, uint64_t value)
{
    _Atomic uint64_t *word = &control->source[source].slot[slot];
    uint64_t seen = atomic_load_explicit(word, memory_order_relaxed);
    do {
        if (seen >= value)
            return false;
        /* release: pairs with epi_slot_load's acquire */
    } while (!atomic_compare_exchange_weak_explicit(word, &seen, value, memory_order_release,
                                                    memory_order_relaxed));
    return true;
}

/* As if `source` had raised the word of this rank's own window. */
static inline void epi_slot_raise(epi_window *window, int source, int slot, uint64_t value)
{
    epi_word_raise((epi_control *)window->base, source, slot, value);
}

#endif
