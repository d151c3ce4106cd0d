/* SPDX-License-Identifier: MIT */
/*
 * Groups: the ranks that exchange tokens, how they find each other and how
 * long they wait for each other.
 *
 * A rank is one participant: a process, or a thread of one process. Creating
 * and destroying a group, its barrier and everything made on it are collective:
 * every rank calls them in the same order.
 */
#ifndef ENTREPOT_GROUP_H
#define ENTREPOT_GROUP_H

#include "entrepot/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ep_group ep_group;

/** Ranks that are threads of this process find each other through one of these. */
typedef struct ep_thread_world ep_thread_world;

/**
 * All-gather that a caller brings as bootstrap: every rank passes `bytes` bytes
 * in `send` and gets those of all ranks in `recv` [num_ranks * bytes], in rank
 * order. Returns 0 on success. It is called only inside collective calls that
 * create groups and buffers, by the thread that makes them, never for tokens.
 */
typedef int (*ep_allgather_fn)(void *context, const void *send, void *recv, size_t bytes);

typedef struct ep_group_config {
    size_t size;               /**< sizeof(ep_group_config) */
    int32_t rank;              /**< this rank; -1: from the environment */
    int32_t num_ranks;         /**< ranks in the group, 1..65536; -1: from the environment */
    int32_t ranks_per_node;    /**< consecutive ranks that form a node; 0: all one node.
                                    num_ranks must be a multiple of it. */
    int64_t timeout_ms;        /**< longest wait for a peer, 1..86400000; 0: EP_TIMEOUT_MS of
                                    the environment, else 30000 */
    const char *transport;     /**< NULL: "shm", or "threads" when `world` is given. Wrapped for
                                    tests as "fault(NAME):KEY=VALUE,...", see docs/testing.md.
                                    NULL also looks at EP_TRANSPORT of the environment. */
    const char *name;          /**< tells apart groups that one job makes at the same time from
                                    the environment; NULL: "0". At most 63 of [A-Za-z0-9._-] */
    ep_allgather_fn allgather; /**< bootstrap of the caller's; rank and num_ranks must be given */
    void *allgather_context;   /**< passed to it; must outlive the group */
    ep_thread_world *world;    /**< ranks as threads: bootstrap through this world */
} ep_group_config;

#define EP_GROUP_CONFIG_INIT                                                \
    {                                                                       \
        sizeof(ep_group_config), -1, -1, 0, 0, NULL, NULL, NULL, NULL, NULL \
    }

/**
 * Creates a group; collective. Where `rank` or `num_ranks` is -1 both come from
 * the environment, in this order: `entrepot run` (EP_RANK, EP_NUM_RANKS,
 * EP_JOB), Open MPI, PMI (MPICH, Slurm), Slurm, torchrun. With none of these
 * present the group has one rank. Ranks must share one host.
 *
 * Peers reach this rank's windows through memory that has no name and is
 * visible to this user only; a crash at any moment leaves nothing behind.
 *
 * @param config  read during the call only (allgather_context excepted)
 * @param group   set on success; NULL on failure. Free with ep_group_destroy().
 * @return EP_ERR_ARGUMENT, EP_ERR_TIMEOUT (names ranks that did not come),
 *         EP_ERR_MISMATCH (ranks disagree), EP_ERR_SYSTEM, EP_ERR_MEMORY,
 *         EP_ERR_UNSUPPORTED (no such transport), EP_ERR_FORMAT (environment).
 * A group may be used by one thread of each rank at a time.
 */
EP_API ep_status ep_group_create(const ep_group_config *config, ep_group **group);

/**
 * Frees the group. Local: it waits for nobody, so survivors can destroy a group
 * whose other ranks are dead. Everything made on it must be destroyed before.
 * NULL is allowed.
 */
EP_API void ep_group_destroy(ep_group *group);

/* Of a NULL group these give -1, 0 or "". */
EP_API int32_t ep_group_rank(const ep_group *group);      /**< 0..num_ranks-1 */
EP_API int32_t ep_group_num_ranks(const ep_group *group); /**< at least 1 */
EP_API int32_t ep_group_node(const ep_group *group);      /**< rank / ranks per node */
EP_API int32_t ep_group_num_nodes(const ep_group *group);
EP_API const char *ep_group_transport(const ep_group *group); /**< e.g. "shm"; owned by the group */
EP_API int64_t ep_group_timeout_ms(const ep_group *group);
/** Changes the wait bound of later calls, 1..86400000 ms. */
EP_API ep_status ep_group_set_timeout_ms(ep_group *group, int64_t timeout_ms);

/** Waits until every rank has entered; EP_ERR_TIMEOUT or EP_ERR_RANK_DEAD name who is late. */
EP_API ep_status ep_group_barrier(ep_group *group);

/**
 * All-gather of `bytes` bytes (0..1 MiB) per rank over the group's transport;
 * `recv` holds num_ranks * bytes. Bounded like every wait.
 */
EP_API ep_status ep_group_allgather(ep_group *group, const void *send, void *recv, size_t bytes);

/** A world of `num_ranks` threads (1..1024), shared by the threads that will be its ranks. */
EP_API ep_status ep_thread_world_create(int32_t num_ranks, ep_thread_world **world);
/** Frees a world; every group made in it must have been destroyed. NULL is allowed. */
EP_API void ep_thread_world_destroy(ep_thread_world *world);

#ifdef __cplusplus
}
#endif
#endif
