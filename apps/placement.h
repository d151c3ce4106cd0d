/* SPDX-License-Identifier: MIT */
/*
 * Placements of experts as `entrepot plan eplb --json` writes them: an object
 * whose "phy2log" has for each layer the expert in each slot. With a placement
 * the router's experts are replaced by slots, ranks owning equal blocks of slots.
 */
#ifndef APPS_PLACEMENT_H
#define APPS_PLACEMENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PLACEMENT_MESSAGE_MAX 600

typedef struct placement {
    int64_t experts;   /* the router's, E */
    int64_t slots;     /* P */
    int32_t max_count; /* replicas of the expert that has most */
    int32_t *log2phy;  /* [E][max_count] */
    int32_t *logcnt;   /* [E] */
} placement;

/* Takes one layer (counted from 0) from the text of a plan. `ranks` must divide the slots. On
   failure returns false, leaves `p` empty and says in `message` what was found where. */
bool placement_parse(const char *text, int64_t layer, int64_t experts, int64_t ranks, placement *p,
                     char message[PLACEMENT_MESSAGE_MAX]);

/* The same from a file. */
bool placement_load(const char *path, int64_t layer, int64_t experts, int64_t ranks, placement *p,
                    char message[PLACEMENT_MESSAGE_MAX]);

void placement_free(placement *p);

/* Replaces the experts in ids [tokens, topk] of one of `ranks` ranks by slots: each token goes to
   the replica whose rank has the fewest tokens so far. A function of its arguments. */
bool placement_route(const placement *p, int64_t ranks, int64_t tokens, int topk, int32_t *ids);

#endif
