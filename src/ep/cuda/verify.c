/* SPDX-License-Identifier: MIT */
/* Verify mode: faults that tests ask for, and what it found in words. */
#include "ep/cuda/internal.h"

#include <stdlib.h>
#include <string.h>

typedef struct fault {
    int64_t flip_rank, flip_at, flip_row;
} fault;

static const struct {
    const char *name;
    size_t offset;
    int64_t least;
} keys[] = {
    {"flip_rank=", offsetof(fault, flip_rank), 0},
    {"flip_at=", offsetof(fault, flip_at), 1},
    {"flip_row=", offsetof(fault, flip_row), 0},
};

/* One KEY=NUMBER; *text is left behind it. */
static ep_status read_key(const char **text, fault *out)
{
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        size_t length = strlen(keys[i].name);
        char *end;
        if (strncmp(*text, keys[i].name, length) != 0)
            continue;
        long long value = strtoll(*text + length, &end, 10);
        if (end == *text + length || value < keys[i].least || value > INT32_MAX)
            return epi_fail(EP_ERR_ARGUMENT, "EP_CUDA_FAULT: %s is %lld; it can be %lld..%d",
                            keys[i].name, value, (long long)keys[i].least, INT32_MAX);
        memcpy((char *)out + keys[i].offset, &(int64_t){value}, sizeof(int64_t));
        *text = end + (*end == ',');
        return EP_OK;
    }
    return epi_fail(EP_ERR_ARGUMENT,
                    "EP_CUDA_FAULT: \"%s\"; there are flip_rank=, flip_at= and flip_row=", *text);
}

ep_status epc_fault_read(epc_buffer *b)
{
    const char *text = getenv("EP_CUDA_FAULT");
    fault read = {-1, 0, 0};
    if (!text || !b->buffer->config.verify)
        return EP_OK;
    while (*text)
        EPI_TRY(read_key(&text, &read));
    if (read.flip_rank == b->rank) {
        b->flip_at = read.flip_at;
        b->flip_row = read.flip_row;
    }
    return EP_OK;
}

int64_t epc_flip_now(const epc_buffer *b)
{
    return b->flip_at && b->serial == b->flip_at ? b->flip_row + 1 : 0;
}

ep_status epc_corrupt_error(const char *call, const uint32_t *d)
{
    switch (d[2]) {
    case EPC_CORRUPT_ORDER:
        return epi_fail(EP_ERR_CORRUPT,
                        "%s: row %u from rank %u holds token %d after token %d; tokens of a source "
                        "must ascend",
                        call, d[0], d[1], (int)d[3], (int)d[4]);
    case EPC_CORRUPT_TOKEN:
        return epi_fail(EP_ERR_CORRUPT, "%s: token %u of rank %u does not match its checksum", call,
                        d[3], d[1]);
    case EPC_CORRUPT_OUTPUTS:
        return epi_fail(EP_ERR_CORRUPT,
                        "%s: row %u of rank %u, for token %u, does not match its checksum", call,
                        d[0], d[1], d[3]);
    case EPC_CORRUPT_SUM:
        return epi_fail(EP_ERR_CORRUPT, "%s: the sum of token %u differs from the reference", call,
                        d[3]);
    default:
        return epi_fail(EP_ERR_CORRUPT,
                        "%s: row %u from rank %d, token %d of its source, does not match its "
                        "checksum",
                        call, d[0], (int)d[1], (int)d[3]);
    }
}
