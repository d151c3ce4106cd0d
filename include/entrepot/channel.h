/* SPDX-License-Identifier: MIT */
/*
 * Channels: messages from one rank to another, in order, with bounded room.
 *
 * A channel gives every rank a number of lanes. A lane is a queue into its rank
 * that one other rank fills, always the same one: which rank fills which lane is
 * the callers' agreement. Each lane holds `slots` messages; a send waits for room
 * in the receiver's window, never for the receiver to ask.
 *
 * Pipeline schedules run over this (<entrepot/pipeline.h>).
 */
#ifndef ENTREPOT_CHANNEL_H
#define ENTREPOT_CHANNEL_H

#include "entrepot/group.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct ep_channel ep_channel;

typedef struct ep_channel_config {
    size_t size;        /**< sizeof(ep_channel_config) */
    int32_t lanes;      /**< into each rank, 1..4096 */
    int32_t slots;      /**< messages a lane holds, 1..65536 */
    int64_t slot_bytes; /**< longest message, 1..2^40; rounded up to 64 */
} ep_channel_config;

#define EP_CHANNEL_CONFIG_INIT             \
    {                                      \
        sizeof(ep_channel_config), 1, 1, 1 \
    }

/**
 * Creates a channel; collective, with the same configuration on every rank. Each
 * rank's window takes about lanes * slots * slot_bytes.
 *
 * @param channel  set on success, NULL on failure. Free with ep_channel_destroy().
 * @return EP_ERR_ARGUMENT, EP_ERR_MISMATCH (ranks disagree), EP_ERR_MEMORY,
 *         EP_ERR_TIMEOUT, EP_ERR_RANK_DEAD.
 * A channel may be used by one thread of each rank at a time.
 */
EP_API ep_status ep_channel_create(ep_group *group, const ep_channel_config *config,
                                   ep_channel **channel);

/** Frees a channel; local, waits for nobody. NULL is allowed. */
EP_API void ep_channel_destroy(ep_channel *channel);

/**
 * Copies `bytes` (0..slot_bytes) bytes into `lane` of rank `to`, after what was
 * sent there before. Waits while the lane is full; `data` is free on return.
 *
 * @return EP_ERR_ARGUMENT; EP_ERR_STATE when `to` is masked; EP_ERR_TIMEOUT or
 *         EP_ERR_RANK_DEAD, which name `to`; EP_ERR_ABORTED, which names the rank
 *         that gave the channel up. After any of them nothing was sent.
 */
EP_API ep_status ep_channel_send(ep_channel *channel, int32_t to, int32_t lane, const void *data,
                                 size_t bytes);

/**
 * Waits for the next message in this rank's `lane` and copies it to `data`.
 *
 * @param from   the rank that fills the lane; this rank itself is allowed
 * @param bytes  length expected
 * @return EP_ERR_ARGUMENT; EP_ERR_STATE when `from` is masked; EP_ERR_TIMEOUT or
 *         EP_ERR_RANK_DEAD, which name `from`; EP_ERR_ABORTED, which names the
 *         rank that gave the channel up;
 *         EP_ERR_MISMATCH when the message is of another rank or length, and it
 *         then stays in the lane.
 */
EP_API ep_status ep_channel_recv(ep_channel *channel, int32_t from, int32_t lane, void *data,
                                 size_t bytes);

/**
 * Gives the channel up for all ranks: waits on it, here and there, end at once.
 * Messages that have come can still be received, and there may be room to send;
 * a call that would have to wait returns EP_ERR_ABORTED and names this rank and
 * `why`, or EP_ERR_RANK_DEAD and the rank that has ended where that is `why`.
 * Local; what is given up stays so, and only the first call of a rank counts.
 *
 * @param why  any status but EP_OK
 * @return EP_ERR_ARGUMENT
 */
EP_API ep_status ep_channel_give_up(ep_channel *channel, ep_status why);

#ifdef __cplusplus
}
#endif
#endif
