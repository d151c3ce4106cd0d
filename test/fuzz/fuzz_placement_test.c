/* SPDX-License-Identifier: MIT */
/* Any bytes as a placement: either its tables are whole and in range, or a message says why not. */
#include "placement.h"

#include "support/fuzz.h"

#include <stdlib.h>
#include <string.h>

enum { EXPERTS = 4, RANKS = 2 };

static void check_tables(const placement *p)
{
    int64_t slots = 0;
    for (int e = 0; e < EXPERTS; e++) {
        if (p->logcnt[e] < 1 || p->logcnt[e] > p->max_count)
            abort();
        slots += p->logcnt[e];
        for (int i = 0; i < p->logcnt[e]; i++) {
            int32_t slot = p->log2phy[e * p->max_count + i];
            if (slot < 0 || slot >= p->slots)
                abort();
        }
    }
    if (slots != p->slots)
        abort();
}

static int one_input(const uint8_t *data, size_t size)
{
    char *text = malloc(size + 1), message[PLACEMENT_MESSAGE_MAX];
    placement p;
    if (!text)
        return 0;
    memcpy(text, data, size);
    text[size] = 0;
    for (int64_t layer = 0; layer < 2; layer++) {
        if (placement_parse(text, layer, EXPERTS, RANKS, &p, message))
            check_tables(&p);
        else if (!message[0])
            abort();
        placement_free(&p);
    }
    free(text);
    return 0;
}

static const char *const seeds[] = {"{\"phy2log\": [[0, 1, 2, 3], [3, 2, 1, 0, 0, 0]]}",
                                    "{\"x\": 1, \"phy2log\":[[0,1,2,3,0,1,2,3]]}", NULL};
static const char *const words[] = {"\"phy2log\"",          "[", "]", ",", ":", "-1", "4",
                                    "99999999999999999999", NULL};
static const struct fuzz_target target = {"placement", one_input, seeds, words, 4096, NULL};

FUZZ_MAIN(target)
