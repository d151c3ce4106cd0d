/* SPDX-License-Identifier: MIT */
#include "support/trace.h"

#include "support/tensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Ids of one line: up to the empty column, behind which the gate weights stand. */
static int64_t read_line(char *line, int64_t *ids, int64_t most)
{
    char *weights = strstr(line, "\t\t");
    int64_t count = 0;
    if (weights)
        *weights = 0;
    for (char *word = strtok(line, "\t"); word && count < most; word = strtok(NULL, "\t"))
        ids[count++] = strtoll(word, NULL, 10);
    return count / TRACE_TOPK * TRACE_TOPK;
}

int64_t *trace_read(const char *corpus, int layer, int64_t num_tokens)
{
    char path[512], *line = NULL;
    size_t capacity = 0;
    int64_t have = 0, want = num_tokens * TRACE_TOPK;
    snprintf(path, sizeof path, "%s/routing/%s/layer_%02d.tsv", EP_TEST_DATA, corpus, layer);
    FILE *file = fopen(path, "r");
    if (!file)
        return NULL;
    int64_t *ids = test_zeros(want, sizeof *ids);
    while (have < want && getline(&line, &capacity, file) > 0)
        have += read_line(line, ids + have, want - have);
    fclose(file);
    free(line);
    for (int64_t i = have; have > 0 && i < want; i++)
        ids[i] = ids[i - have];
    return ids;
}
