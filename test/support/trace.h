/* SPDX-License-Identifier: MIT */
/* Real routing of a 64-expert, top-6 model, from the shared data where it is. */
#ifndef EP_TEST_TRACE_H
#define EP_TEST_TRACE_H

#include <stdint.h>

#define TRACE_TOPK 6
#define TRACE_EXPERTS 64

/* Ids [num_tokens, TRACE_TOPK] of the first tokens of a corpus ("law", "translation") at a layer,
   from its start again when it is shorter; NULL when there is no such file. Free with free(). */
int64_t *trace_read(const char *corpus, int layer, int64_t num_tokens);

#endif
