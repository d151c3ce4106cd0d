/* SPDX-License-Identifier: MIT */
/* Verify mode: the faults that tests asked for, and what it found in words. */
#include "ep/cuda/internal.h"

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
