/* SPDX-License-Identifier: MIT */
/* Errors that kernels report. */
#include "ep/cuda/internal.h"

#include <stdio.h>

static const char *const field_names[EPC_AGREED] = {
    [EPC_F_OP] = "the call (1 dispatch, 2 combine, 3 cached dispatch)",
    [EPC_F_HIDDEN] = "hidden",
    [EPC_F_DTYPE] = "dtype (ep_dtype)",
    [EPC_F_WIRE] = "wire (ep_dtype)",
    [EPC_F_TOPK] = "topk",
    [EPC_F_ID_BYTES] = "topk_idx (bytes of an id)",
    [EPC_F_EXPERTS] = "num_experts",
    [EPC_F_TABLE] = "expert_rank (checksum)",
    [EPC_F_WEIGHTS] = "topk_weights given",
    [EPC_F_SCALE] = "scale (ep_scale)",
    [EPC_F_LAYOUT] = "layout (ep_row_layout)",
    [EPC_F_ALIGNMENT] = "expert_alignment",
    [EPC_F_HANDLE] = "handle (number of the call that made it)",
    [EPC_F_MASK] = "masked ranks (checksum)",
};

/* For ep_group_query_late. */
static void note_late(const epc_flight *flight, uint64_t late)
{
    ep_group *group = flight->owner->buffer->group;
    flight->owner->lost |= late;
    for (int r = 0; r < flight->owner->num_ranks; r++)
        atomic_store(&group->late[r], late >> r & 1);
}

static ep_status timeout_error(const epc_flight *flight, const epc_report *report)
{
    char late[EPI_ERROR_MAX] = "";
    size_t used = 0;
    for (int r = 0; r < flight->owner->num_ranks && used < sizeof late - 16; r++)
        if (report->late >> r & 1)
            used += (size_t)snprintf(late + used, sizeof late - used, "%s%d", used ? ", " : "", r);
    return epi_fail(EP_ERR_TIMEOUT, "%s (call %u): no word from rank%s %s within %lld ms",
                    flight->call, flight->serial, report->late & (report->late - 1) ? "s" : "",
                    late, (long long)flight->owner->buffer->group->timeout_ms);
}

static int64_t wide(uint32_t low, uint32_t high)
{
    return (int64_t)((uint64_t)high << 32 | low);
}

ep_status epc_kernel_error(const epc_flight *flight)
{
    const epc_report *report = flight->report;
    const uint32_t *d = report->detail;
    switch (report->fail) {
    case EPC_OK:
        return EP_OK;
    case EPC_FAIL_TIMEOUT:
        note_late(flight, report->late);
        return timeout_error(flight, report);
    case EPC_FAIL_ABORTED:
        note_late(flight, 0);
        return epc_gave_up_error(flight, d[0]);
    case EPC_FAIL_MISMATCH:
        return epi_fail(EP_ERR_MISMATCH, "%s: %s differs: %u on rank %u, %u on rank %u",
                        flight->call, d[0] < EPC_AGREED ? field_names[d[0]] : "wire (1 LogFMT-10)",
                        d[3], d[1], d[4], d[2]);
    case EPC_FAIL_CAPACITY:
        if (d[3] && d[3] != EPC_CANT_WAIT)
            return epi_fail(EP_ERR_CAPACITY,
                            "%s: rank %u receives %u rows; its num_worst_tokens is %u",
                            flight->call, d[0], d[1], d[3]);
        return epi_fail(
            EP_ERR_CAPACITY,
            "%s: rank %u has no room for its %u rows of %lld bytes in all; this call can't wait "
            "for "
            "its window to grow: release results there, or create the buffer with a larger "
            "window_bytes",
            flight->call, d[0], d[4], (long long)wide(d[1], d[2]));
    case EPC_FAIL_ID:
        if (d[4] == 0)
            return epi_fail(EP_ERR_ARGUMENT, "%s: topk_idx[%u][%u] is %lld; in dispatch it was not",
                            flight->call, d[0], d[1], (long long)wide(d[2], d[3]));
        return epi_fail(EP_ERR_ARGUMENT, "%s: topk_idx[%u][%u] is %lld; it must be -1..%u",
                        flight->call, d[0], d[1], (long long)wide(d[2], d[3]), d[4] - 1);
    case EPC_FAIL_DUPLICATE:
        return epi_fail(EP_ERR_CORRUPT,
                        "%s: topk_idx[%u] names expert %u twice, the second time at place %u",
                        flight->call, d[0], d[2], d[1]);
    case EPC_FAIL_OVERFLOW:
        return epi_fail(EP_ERR_CAPACITY,
                        "%s: expert %u on rank %u receives %u rows; max_expert_rows is %u",
                        flight->call, d[0], d[1], d[2], d[3]);
    case EPC_FAIL_REFUSED:
        return epi_fail(EP_ERR_ABORTED, "%s: refused by this rank", flight->call);
    default:
        return epc_corrupt_error(flight->call, d);
    }
}
