/* SPDX-License-Identifier: MIT */
/* Any bytes as a trace: either it is read in full and in range, or the message says where not. */
#include "trace.h"

#include "support/fuzz.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static int one_input(const uint8_t *data, size_t size)
{
    const int64_t num_experts = 64;
    trace t;
    char message[TRACE_MESSAGE_MAX];
    if (!trace_parse((const char *)data, size, 2, num_experts, &t, message)) {
        if (strncmp(message, "line ", 5) != 0 || t.ids || t.weights)
            abort();
        return 0;
    }
    for (int64_t i = 0; i < t.num_tokens * t.topk; i++) {
        if (t.ids[i] < -1 || t.ids[i] >= num_experts || !isfinite(t.weights[i]))
            abort();
    }
    trace_free(&t);
    return 0;
}

static const char *const seeds[] = {"1\t2\t\t0.5\t0.5\n", "1\t2\t3\t4\t\t1\t1\t1\t1\n5\t6\t\t1\t1",
                                    "-1\t63\t\t1e-3\t0\n", NULL};
static const char *const words[] = {"\t", "\n", "\t\t", "-1", "64", "1e39", "nan", "0x1p3", NULL};
static const struct fuzz_target target = {"trace", one_input, seeds, words, 4096, NULL};

FUZZ_MAIN(target)
