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
 * order. Returns 0 on success. It is called only inside ep_group_create(), by the
 * calling thread; what comes later goes over the group itself.
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
    void *allgather_context;   /**< passed to it */
    ep_thread_world *world;    /**< ranks as threads: bootstrap through this world */
    int32_t rejoin;            /**< 1: this rank was masked and comes back to a group that the
                                    others have kept, see ep_group_readmit() */
} ep_group_config;

#define EP_GROUP_CONFIG_INIT                                                   \
    {                                                                          \
        sizeof(ep_group_config), -1, -1, 0, 0, NULL, NULL, NULL, NULL, NULL, 0 \
    }

/**
 * Creates a group; collective. Where `rank` or `num_ranks` is -1 both come from
 * the environment, in this order: `entrepot run` (EP_RANK, EP_NUM_RANKS,
 * EP_JOB), Open MPI, PMI (MPICH, Slurm), Slurm, torchrun. With none of these
 * present the group has one rank. Ranks must share one host. Without callback and
 * world they meet under a name made of user, job and the group's name; EP_JOB, when
 * set, is the job whatever the launcher says.
 *
 * Peers reach this rank's windows through memory that has no name and is
 * visible to this user only; a crash at any moment leaves nothing behind.
 *
 * @param config  read during the call only
 * @param group   set on success; NULL on failure. Free with ep_group_destroy().
 * @return EP_ERR_ARGUMENT, EP_ERR_TIMEOUT (names ranks that did not come),
 *         EP_ERR_RANK_DEAD (a rank ended meanwhile), EP_ERR_MISMATCH (ranks
 *         disagree), EP_ERR_STATE (two ranks of one number), EP_ERR_SYSTEM,
 *         EP_ERR_MEMORY, EP_ERR_UNSUPPORTED (no such transport, several hosts),
 *         EP_ERR_FORMAT (environment).
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

/* ---------------------------------------------------------- ranks left out
 *
 * A rank that has ended, or that is too slow, can be masked: in both modes it
 * then contributes nothing and nobody waits for it, tokens for its experts go
 * nowhere, and its rows in collectives are zeros. All ranks that are not masked
 * must mask the same ones before their next call; ep_group_recover() sees to it:
 *
 *     status = ep_dispatch(...);
 *     if (status != EP_OK) {
 *         ep_group_query_late(group, late);       who was not heard from, as far as this rank knows
 *         for (r = 0; r < num_ranks; r++) if (late[r]) ep_group_mask(group, r, 1);
 *         ep_group_recover(group);                all that are left, and nobody else
 *         ... make the call again ...
 *     }
 *
 * These calls are refused with EP_ERR_STATE while a call of one of the group's
 * buffers is under way (hooks that have not run do not count).
 */

/** Masks a rank (not this one), or with `masked` 0 takes the mask away again. Local. */
EP_API ep_status ep_group_mask(ep_group *group, int32_t rank, int32_t masked);
/** Takes all masks away. Local; the ranks must call ep_group_recover() then, all of them. */
EP_API ep_status ep_group_clear_masks(ep_group *group);
/** masked[r] = 1 where rank r is masked, else 0; [num_ranks]. Local. */
EP_API ep_status ep_group_query_masks(const ep_group *group, uint8_t *masked);

/** late[r] = 1 for the ranks that the last EP_ERR_TIMEOUT or EP_ERR_RANK_DEAD on this group named,
    [num_ranks]. Local. */
EP_API ep_status ep_group_query_late(const ep_group *group, uint8_t *late);

/**
 * Brings the ranks that are left in step after a call that failed. Collective
 * among the ranks that are not masked, each of which may have a different view:
 * afterwards all mask whom any of them masked, and whoever has ended. Handles and
 * results from before can still be combined if every rank has one; on a device
 * low-latency ones end here, as do their calls whose hooks have yet to run.
 *
 * @return EP_ERR_TIMEOUT names ranks that did not call it: mask them, call again;
 *         EP_ERR_STATE when another rank has masked this one, or a call is under way
 */
EP_API ep_status ep_group_recover(ep_group *group);

/**
 * Takes a masked rank in again. Collective among the ranks that are not masked,
 * between calls, while that rank, in a new process or in the old one after it has
 * destroyed its group, calls ep_group_create() with config.rejoin = 1 and then
 * ep_buffer_create() once for each buffer that the others have, in the order they
 * were made and with the same configuration. The others keep their buffers,
 * windows and memory; handles and results from before can no longer be combined.
 * Buffers on devices cannot be kept: destroy them before, and make them anew,
 * together with the rank, after (EP_ERR_UNSUPPORTED while one is alive).
 *
 * The two sides find each other by EP_JOB or the launcher's job and by the group's
 * name, as in ep_group_create() from the environment, whatever bootstrap the group
 * was made by. Where neither is set, both must have been started by one process.
 *
 * @return EP_ERR_TIMEOUT when the rank does not come: it stays masked, the group is as before;
 *         EP_ERR_RANK_DEAD when it ends while it comes back: mask it, recover, call again;
 *         EP_ERR_STATE while it is not masked, its former process still runs, channels are alive,
 *         or a call is under way; EP_ERR_MISMATCH, EP_ERR_UNSUPPORTED (transport)
 */
EP_API ep_status ep_group_readmit(ep_group *group, int32_t rank);

/** A world of `num_ranks` threads (1..1024), shared by the threads that will be its ranks. */
EP_API ep_status ep_thread_world_create(int32_t num_ranks, ep_thread_world **world);
/** Frees a world; every group made in it must have been destroyed. NULL is allowed. */
EP_API void ep_thread_world_destroy(ep_thread_world *world);

#ifdef __cplusplus
}
#endif
#endif
