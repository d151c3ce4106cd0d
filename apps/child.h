/* SPDX-License-Identifier: MIT */
/* What a freshly forked rank does first, and how ranks of one job are told apart. */
#ifndef APPS_CHILD_H
#define APPS_CHILD_H

#include <stdbool.h>
#include <sys/types.h>

#define JOB_ID_SIZE 33 /* 128 random bits in hexadecimal, and the final zero */

/* A fresh random job id; false when the system gives no random bytes. */
bool job_id_create(char id[JOB_ID_SIZE]);

/* Called in the child: it is killed when the parent dies, also when that happened already. */
bool child_tie_to_parent(pid_t parent);

/* Called in the child: sets EP_RANK, EP_NUM_RANKS and EP_JOB, where the library finds its rank. */
bool child_set_rank(int rank, int num_ranks, const char *job);

#endif
