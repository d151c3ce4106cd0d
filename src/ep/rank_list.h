/* SPDX-License-Identifier: MIT */
/* Ranks as messages name them. */
#ifndef EPI_EP_RANK_LIST_H
#define EPI_EP_RANK_LIST_H

#include <stdbool.h>
#include <stddef.h>

/* Writes the ranks of which `listed` is true as "rank 3", "ranks 3, 5" or, beyond eight of them,
   "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"; "no rank" when there is none. Returns how many. */
int epi_rank_list(int num_ranks, bool (*listed)(void *context, int rank), void *context, char *text,
                  size_t bytes);

#endif
