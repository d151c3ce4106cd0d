/* SPDX-License-Identifier: MIT */
#include "ep/wait.h"

#include "base/clock.h"
#include "base/error.h"
#include "ep/rank_list.h"

#define SLICE_NS (50 * EPI_NS_PER_MS)      /* between looks whether late ranks still run */
#define SPIN_ALONE_NS (50 * EPI_NS_PER_US) /* a core for each rank: a sleep costs more */
/* The rank waited for may need this very core. Yielding it first, sched_yield() for up to 200 us,
   took barriers of 64 ranks on two quiet cores to a fifth, but doubled the time of dispatch where
   other programs had work: they get a whole slice, from which a wake-up would have taken the core
   back. */
#define SPIN_SHARED_NS (2 * EPI_NS_PER_US)

typedef struct wait_state {
    ep_group *group;
    epi_window *window;
    epi_ready_fn ready;
    epi_late_fn late;
    void *context;
} wait_state;

static inline void relax_cpu(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static bool is_late(const ep_group *group, epi_late_fn late, void *context, int rank)
{
    return !group->masked[rank] && late(context, rank);
}

static bool nobody_late(const wait_state *wait)
{
    for (int rank = 0; rank < wait->group->num_ranks; rank++)
        if (is_late(wait->group, wait->late, wait->context, rank))
            return false;
    return true;
}

static bool is_ready(const wait_state *wait)
{
    return wait->ready != NULL ? wait->ready(wait->context) : nobody_late(wait);
}

static int64_t now_ns(const wait_state *wait)
{
    epi_transport *transport = wait->group->transport;
    return transport->ops->now_ns(transport);
}

static bool alive(const wait_state *wait, int rank)
{
    epi_transport *transport = wait->group->transport;
    return transport->ops->peer_alive(transport, rank);
}

static bool spin(const wait_state *wait)
{
    epi_transport *transport = wait->group->transport;
    bool alone = transport->ops->ranks_per_core(transport) <= 1;
    int64_t until = now_ns(wait) + (alone ? SPIN_ALONE_NS : SPIN_SHARED_NS);
    do {
        for (int i = 0; i < 16; i++) {
            if (is_ready(wait))
                return true;
            relax_cpu();
        }
    } while (now_ns(wait) < until);
    return false;
}

/* Notes whom a failed wait names; `dead` -1: all that are late. */
static void note_late(const wait_state *wait, int dead)
{
    ep_group *group = wait->group;
    for (int rank = 0; rank < group->num_ranks; rank++)
        atomic_store(&group->late[rank],
                     dead >= 0 ? rank == dead : is_late(group, wait->late, wait->context, rank));
}

/* A late rank that has certainly ended, or -1. Whether it is late is looked at once more after it
   was seen dead: its last notifications may have come in between. */
static int find_dead(const wait_state *wait)
{
    for (int rank = 0; rank < wait->group->num_ranks; rank++)
        if (is_late(wait->group, wait->late, wait->context, rank) && !alive(wait, rank) &&
            is_late(wait->group, wait->late, wait->context, rank))
            return rank;
    return -1;
}

/* Sleeps until something may have changed, for one slice at most; true when ready. */
static bool sleep_slice(const wait_state *wait, int64_t until)
{
    const epi_transport_ops *ops = wait->group->transport->ops;
    uint32_t ticket = ops->sleep_begin(wait->window);
    if (is_ready(wait)) {
        ops->sleep_cancel(wait->window);
        return true;
    }
    ops->sleep(wait->window, ticket, until - now_ns(wait));
    return is_ready(wait);
}

static ep_status fail_timeout(const wait_state *wait, const char *call, uint64_t epoch,
                              int64_t timeout_ms)
{
    char ranks[128];
    note_late(wait, -1);
    epi_late_list(wait->group, wait->late, wait->context, ranks, sizeof ranks);
    return epi_fail(EP_ERR_TIMEOUT, "%s (call %llu): no word from %s within %lld ms", call,
                    (unsigned long long)epoch, ranks, (long long)timeout_ms);
}

ep_status epi_wait(ep_group *group, epi_window *window, const char *call, uint64_t epoch,
                   epi_ready_fn ready, epi_late_fn late, void *context, int64_t timeout_ms)
{
    const wait_state wait = {group, window, ready, late, context};
    if (!alive(&wait, group->rank)) {
        note_late(&wait, group->rank);
        return epi_fail(EP_ERR_RANK_DEAD, "%s (call %llu): rank %d, this one, has ended", call,
                        (unsigned long long)epoch, group->rank);
    }
    if (timeout_ms == 0)
        timeout_ms = group->timeout_ms;
    int64_t deadline = now_ns(&wait) + timeout_ms * EPI_NS_PER_MS;
    if (spin(&wait))
        return EP_OK;
    for (int64_t look = 0;;) {
        int64_t now = now_ns(&wait);
        if (now >= look) {
            int dead = find_dead(&wait);
            if (dead >= 0) {
                note_late(&wait, dead);
                return epi_fail(EP_ERR_RANK_DEAD, "%s (call %llu): rank %d has ended", call,
                                (unsigned long long)epoch, dead);
            }
            look = now + SLICE_NS;
        }
        if (now >= deadline)
            return is_ready(&wait) ? EP_OK : fail_timeout(&wait, call, epoch, timeout_ms);
        if (sleep_slice(&wait, look < deadline ? look : deadline))
            return EP_OK;
    }
}

typedef struct unmasked {
    const ep_group *group;
    epi_late_fn late;
    void *context;
} unmasked;

static bool unmasked_late(void *context, int rank)
{
    const unmasked *self = context;
    return is_late(self->group, self->late, self->context, rank);
}

int epi_late_list(const ep_group *group, epi_late_fn late, void *context, char *text, size_t bytes)
{
    unmasked filter = {group, late, context};
    return epi_rank_list(group->num_ranks, unmasked_late, &filter, text, bytes);
}
