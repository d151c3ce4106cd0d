/* SPDX-License-Identifier: MIT */
#include "transport/threads/threads.h"

#include "base/clock.h"
#include "base/error.h"
#include "transport/cores.h"
#include "transport/eventcount.h"
#include "transport/pages.h"

#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

#define PRESENT UINT64_C(0x7468726561647321)

/* One rank's window. Every rank that sees it holds a reference, because a peer may still store to
   it after its owner has destroyed its own view. */
typedef struct shared_memory {
    _Atomic int references;
    size_t reserve;
    uint8_t *base;
    struct shared_memory *next; /* in the graveyard */
} shared_memory;

/* What the ranks of one transport have in common; made by rank 0, freed by the last to leave. */
typedef struct shared_state {
    _Atomic int references;
    shared_memory
        *_Atomic graveyard; /* windows of failed creations, which peers may have heard of */
    _Atomic bool dead[];    /* [num_ranks] */
} shared_state;

typedef struct threads_transport {
    epi_transport base;
    epi_bootstrap *bootstrap;
    shared_state *shared;
    int ranks_per_core;
    _Atomic bool ended; /* this rank; `dead` may by then speak of one that took its place */
} threads_transport;

typedef struct threads_window {
    epi_window base;
    shared_memory **memory; /* [num_ranks]; NULL where masked */
} threads_window;

static threads_transport *self(epi_transport *transport)
{
    return (threads_transport *)transport;
}

static void memory_release(shared_memory *memory)
{
    /* acq_rel: the last one sees everybody's stores before it unmaps */
    if (memory == NULL ||
        atomic_fetch_sub_explicit(&memory->references, 1, memory_order_acq_rel) != 1)
        return;
    epi_pages_unmap(memory->base, memory->reserve);
    free(memory);
}

static shared_memory *memory_create(size_t reserve)
{
    shared_memory *made = calloc(1, sizeof *made);
    if (made == NULL) {
        epi_fail(EP_ERR_MEMORY, "no memory for a window");
        return NULL;
    }
    atomic_init(&made->references, 1);
    made->reserve = reserve;
    if (epi_pages_map(-1, reserve, &made->base) == EP_OK)
        return made;
    free(made);
    return NULL;
}

static void bury(shared_state *shared, shared_memory *memory)
{
    memory->next = atomic_load(&shared->graveyard);
    while (!atomic_compare_exchange_weak(&shared->graveyard, &memory->next, memory))
        ;
}

static void shared_release(shared_state *shared)
{
    if (shared == NULL ||
        atomic_fetch_sub_explicit(&shared->references, 1, memory_order_acq_rel) != 1)
        return;
    for (shared_memory *buried = atomic_load(&shared->graveyard), *next; buried != NULL;
         buried = next) {
        next = buried->next;
        memory_release(buried);
    }
    free(shared);
}

static void threads_destroy(epi_transport *transport)
{
    shared_release(self(transport)->shared);
    free(transport);
}

static ep_status threads_back(epi_window *window, size_t from, size_t to)
{
    if (to > window->reserve || from > to)
        return epi_fail(EP_ERR_ARGUMENT, "window memory %zu..%zu; %zu bytes are reserved", from, to,
                        window->reserve);
    EPI_TRY(epi_pages_check_available(to - from));
    return epi_pages_populate(window->base, from, to);
}

static void threads_drop(epi_window *window, size_t from, size_t to)
{
    epi_pages_drop(window->base, from, to);
}

static ep_status threads_commit(epi_window *window, size_t bytes)
{
    size_t to = epi_pages_round(bytes);
    if (to > window->reserve)
        return epi_fail(EP_ERR_ARGUMENT, "window commit of %zu bytes; at most %zu are reserved",
                        bytes, window->reserve);
    if (to <= window->committed)
        return EP_OK;
    EPI_TRY(epi_pages_check_available(to - window->committed));
    EPI_TRY(epi_pages_populate(window->base, window->committed, to));
    window->committed = to;
    return EP_OK;
}

static threads_window *window_alloc(threads_transport *transport, size_t reserve)
{
    size_t ranks = (size_t)transport->base.num_ranks;
    threads_window *window = calloc(1, sizeof *window);
    if (window == NULL)
        return NULL;
    window->base.transport = &transport->base;
    window->base.reserve = reserve;
    window->base.peer = calloc(ranks, sizeof *window->base.peer);
    window->memory = calloc(ranks, sizeof *window->memory);
    if (window->base.peer != NULL && window->memory != NULL)
        return window;
    free(window->base.peer);
    free(window->memory);
    free(window);
    return NULL;
}

static void threads_window_destroy(epi_window *base)
{
    threads_window *window = (threads_window *)base;
    if (window == NULL)
        return;
    for (int rank = 0; rank < base->transport->num_ranks; rank++)
        memory_release(window->memory[rank]);
    free(window->memory);
    free(base->peer);
    free(window);
}

/* Everything this rank needs of its own; its memory is in window->memory[rank]. */
static ep_status window_prepare(threads_transport *transport, size_t reserve, size_t committed,
                                threads_window **prepared)
{
    threads_window *window = window_alloc(transport, reserve);
    if (window == NULL)
        return epi_fail(EP_ERR_MEMORY, "no memory for a window of %d ranks",
                        transport->base.num_ranks);
    *prepared = window;
    shared_memory *own = memory_create(reserve);
    if (own == NULL)
        return EP_ERR_MEMORY;
    window->memory[transport->base.rank] = own;
    window->base.base = own->base;
    return threads_commit(&window->base, committed);
}

typedef struct offer {
    uint64_t present; /* PRESENT, or 0 of a masked rank */
    shared_memory *memory;
} offer;

/* Takes a reference to every peer's window. Collective. */
static ep_status window_exchange(threads_transport *transport, threads_window *window)
{
    int rank = transport->base.rank;
    shared_memory *own = window->memory[rank];
    offer mine = {PRESENT, own};
    const void *all = NULL;
    ep_status status = epi_gather(transport->bootstrap, &mine, sizeof mine, &all);
    if (status != EP_OK) {
        /* A peer for whom the exchange succeeded may be about to use the address. */
        window->memory[rank] = NULL;
        bury(transport->shared, own);
        return status;
    }
    const offer *offers = all;
    for (int peer = 0; peer < transport->base.num_ranks; peer++) {
        if (offers[peer].present != PRESENT)
            continue;
        if (peer != rank) {
            window->memory[peer] = offers[peer].memory;
            atomic_fetch_add_explicit(&offers[peer].memory->references, 1, memory_order_relaxed);
        }
        window->base.peer[peer] = offers[peer].memory->base;
    }
    /* Nobody may drop the own reference before all have taken theirs. */
    status = epi_agree(transport->bootstrap, EP_OK);
    if (status != EP_OK) {
        atomic_fetch_add_explicit(&own->references, 1, memory_order_relaxed);
        bury(transport->shared, own);
    }
    return status;
}

static ep_status threads_window_create(epi_transport *base, size_t reserve, size_t committed,
                                       epi_window **created)
{
    threads_transport *transport = self(base);
    threads_window *window = NULL;
    ep_status status = window_prepare(transport, epi_pages_round(reserve), committed, &window);
    status = epi_agree(transport->bootstrap, status);
    if (status == EP_OK)
        status = window_exchange(transport, window);
    if (status != EP_OK) {
        threads_window_destroy((epi_window *)window);
        return status;
    }
    *created = &window->base;
    return EP_OK;
}

/* Round for round what creating the window does on the rank that comes back. */
static ep_status threads_window_admit(epi_window *base, int rank, epi_bootstrap *bootstrap)
{
    threads_window *window = (threads_window *)base;
    offer mine = {PRESENT, window->memory[base->transport->rank]};
    const void *all = NULL;
    EPI_TRY(epi_agree(bootstrap, EP_OK));
    EPI_TRY(epi_gather(bootstrap, &mine, sizeof mine, &all));
    shared_memory *theirs = ((const offer *)all)[rank].memory;
    atomic_fetch_add_explicit(&theirs->references, 1, memory_order_relaxed);
    memory_release(window->memory[rank]);
    window->memory[rank] = theirs;
    base->peer[rank] = theirs->base;
    return epi_agree(bootstrap, EP_OK);
}

static void threads_notify(epi_window *window, int dst, int slot, uint64_t value)
{
    epi_transport *transport = window->transport;
    if (window->peer[dst] == NULL ||
        atomic_load_explicit(&self(transport)->ended, memory_order_relaxed))
        return;
    epi_control_raise((epi_control *)window->peer[dst], transport->rank, slot, value,
                      EPI_FUTEX_PRIVATE);
}

static uint32_t threads_sleep_begin(epi_window *window)
{
    return epi_control_sleep_begin((epi_control *)window->base);
}

static void threads_sleep(epi_window *window, uint32_t ticket, int64_t timeout_ns)
{
    epi_control_sleep((epi_control *)window->base, ticket, timeout_ns, EPI_FUTEX_PRIVATE);
}

static void threads_sleep_cancel(epi_window *window)
{
    (void)window; /* the flag left behind costs one spurious wake at most */
}

static bool threads_peer_alive(epi_transport *transport, int rank)
{
    if (rank == transport->rank)
        return !atomic_load_explicit(&self(transport)->ended, memory_order_acquire);
    /* acquire: pairs with kill_self, so that what the rank notified before is seen */
    return !atomic_load_explicit(&self(transport)->shared->dead[rank], memory_order_acquire);
}

static void threads_kill_self(epi_transport *transport)
{
    atomic_store_explicit(&self(transport)->ended, true, memory_order_release);
    atomic_store_explicit(&self(transport)->shared->dead[transport->rank], true,
                          memory_order_release);
}

static bool threads_can_peer_read(epi_transport *transport)
{
    (void)transport;
    return true;
}

static const void *threads_peer_pointer(epi_transport *transport, int rank, uint64_t remote)
{
    (void)transport;
    (void)rank;
    return (const void *)(uintptr_t)remote;
}

static ep_status threads_peer_read(epi_transport *transport, int rank, const epi_remote_read *reads,
                                   size_t count)
{
    (void)transport;
    (void)rank;
    for (size_t i = 0; i < count; i++)
        memcpy(reads[i].local, (const void *)(uintptr_t)reads[i].remote, reads[i].bytes);
    return EP_OK;
}

static int64_t threads_now_ns(epi_transport *transport)
{
    (void)transport;
    return epi_clock_ns();
}

static int threads_ranks_per_core(epi_transport *transport)
{
    return self(transport)->ranks_per_core;
}

static shared_state *shared_create(int num_ranks)
{
    shared_state *shared = calloc(1, sizeof *shared + (size_t)num_ranks * sizeof shared->dead[0]);
    if (shared != NULL)
        atomic_init(&shared->references, num_ranks);
    return shared;
}

typedef struct introduction {
    int64_t pid;          /* 0 of a masked rank */
    shared_state *shared; /* of rank 0, or when a rank comes back of all others */
} introduction;

static ep_status check_one_process(const introduction *all, int num_ranks)
{
    for (int rank = 0; rank < num_ranks; rank++)
        if (all[rank].pid != 0 && all[rank].pid != getpid())
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "transport \"threads\" needs all ranks in one process: rank %d is in "
                            "process %lld, this one in %lld",
                            rank, (long long)all[rank].pid, (long long)getpid());
    return EP_OK;
}

/* Collective over `bootstrap`: everybody's introduction. The state of the first that has one is
   the one to use. */
static ep_status introduce(threads_transport *transport, epi_bootstrap *bootstrap,
                           shared_state *own, shared_state **shared)
{
    introduction mine = {getpid(), own};
    const void *gathered = NULL;
    EPI_TRY(epi_gather(bootstrap, &mine, sizeof mine, &gathered));
    const introduction *all = gathered;
    EPI_TRY(check_one_process(all, transport->base.num_ranks));
    for (int rank = 0; rank < transport->base.num_ranks && *shared == NULL; rank++)
        *shared = all[rank].shared;
    return *shared != NULL ? EP_OK
                           : epi_fail(EP_ERR_MEMORY, "no memory for what %d ranks share",
                                      transport->base.num_ranks);
}

/* All ranks get the state that rank 0 makes; one that comes back that of the others. */
static ep_status share_state(threads_transport *transport)
{
    epi_bootstrap *bootstrap = transport->bootstrap;
    shared_state *own = NULL;
    if (transport->base.rank == 0 && !bootstrap->rejoining)
        own = shared_create(transport->base.num_ranks);
    ep_status status = introduce(transport, bootstrap, own, &transport->shared);
    /* Where words were lost, rank 0 cannot know who has the address of its state, and leaves it. */
    if (status == EP_ERR_UNSUPPORTED)
        free(own);
    if (status == EP_OK && bootstrap->rejoining) {
        atomic_fetch_add_explicit(&transport->shared->references, 1, memory_order_relaxed);
        atomic_store(&transport->shared->dead[transport->base.rank], false);
    }
    return status;
}

/* Round for round what epi_threads_open does on the rank that comes back. */
static ep_status threads_admit(epi_transport *base, int rank, epi_bootstrap *bootstrap)
{
    threads_transport *transport = self(base);
    shared_state *shared = NULL;
    (void)rank;
    EPI_TRY(epi_agree(bootstrap, EP_OK));
    EPI_TRY(introduce(transport, bootstrap, transport->shared, &shared));
    return epi_ranks_per_core(bootstrap, &transport->ranks_per_core);
}

static const epi_transport_ops threads_ops = {
    .name = "threads",
    .destroy = threads_destroy,
    .window_create = threads_window_create,
    .window_destroy = threads_window_destroy,
    .window_commit = threads_commit,
    .admit = threads_admit,
    .window_admit = threads_window_admit,
    .window_back = threads_back,
    .window_drop = threads_drop,
    .notify = threads_notify,
    .sleep_begin = threads_sleep_begin,
    .sleep = threads_sleep,
    .sleep_cancel = threads_sleep_cancel,
    .peer_alive = threads_peer_alive,
    .kill_self = threads_kill_self,
    .can_peer_read = threads_can_peer_read,
    .peer_read = threads_peer_read,
    .peer_pointer = threads_peer_pointer,
    .now_ns = threads_now_ns,
    .ranks_per_core = threads_ranks_per_core,
};

ep_status epi_threads_open(epi_bootstrap *bootstrap, epi_transport **opened)
{
    threads_transport *transport = calloc(1, sizeof *transport);
    ep_status status = epi_agree(
        bootstrap,
        transport != NULL ? EP_OK : epi_fail(EP_ERR_MEMORY, "no memory for the transport"));
    if (status != EP_OK) {
        free(transport);
        return status;
    }
    transport->base = (epi_transport){&threads_ops, bootstrap->rank, bootstrap->num_ranks};
    transport->bootstrap = bootstrap;
    status = share_state(transport);
    if (status == EP_OK)
        status = epi_ranks_per_core(bootstrap, &transport->ranks_per_core);
    if (status != EP_OK) {
        threads_destroy(&transport->base);
        return status;
    }
    *opened = &transport->base;
    return EP_OK;
}
