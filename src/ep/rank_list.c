/* SPDX-License-Identifier: MIT */
#include "ep/rank_list.h"

#include <stdio.h>

#define LISTED_MAX 8

int epi_rank_list(int num_ranks, bool (*listed)(void *context, int rank), void *context, char *text,
                  size_t bytes)
{
    char list[LISTED_MAX * 16] = "";
    size_t used = 0;
    int count = 0;
    for (int rank = 0; rank < num_ranks; rank++)
        if (listed(context, rank) && count++ < LISTED_MAX)
            used += (size_t)snprintf(list + used, sizeof list - used, "%s%d", used > 0 ? ", " : "",
                                     rank);
    if (count == 0)
        snprintf(text, bytes, "no rank");
    else if (count <= LISTED_MAX)
        snprintf(text, bytes, "rank%s %s", count > 1 ? "s" : "", list);
    else
        snprintf(text, bytes, "ranks %s and %d more", list, count - LISTED_MAX);
    return count;
}
