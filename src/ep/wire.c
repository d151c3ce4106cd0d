/* SPDX-License-Identifier: MIT */
#include "ep/wire.h"

#include "base/error.h"

#include <stdbool.h>
#include <string.h>

static bool kind_fits(const epi_frame *frame, const epi_frame_expect *expect)
{
    return frame->kind == expect->kind ||
           (expect->kind == EPI_FRAME_RESULT && frame->kind == EPI_FRAME_FAIL);
}

static bool status_fits(const epi_frame *frame)
{
    bool is_error = frame->status >= EP_ERR_ARGUMENT && frame->status <= EP_ERR_FORMAT;
    return frame->kind == EPI_FRAME_FAIL ? is_error : frame->status == EP_OK;
}

ep_status epi_frame_parse(const void *data, size_t size, const epi_frame_expect *expect,
                          epi_frame *parsed)
{
    epi_frame frame;
    if (size < sizeof frame)
        return epi_fail(EP_ERR_FORMAT, "bootstrap frame of %zu bytes; it has %zu", size,
                        sizeof frame);
    memcpy(&frame, data, sizeof frame);
    if (frame.magic != EPI_WIRE_MAGIC)
        return epi_fail(EP_ERR_FORMAT, "bootstrap frame begins with %08x, not %08x", frame.magic,
                        EPI_WIRE_MAGIC);
    if (!kind_fits(&frame, expect) || !status_fits(&frame) || frame.reserved != 0)
        return epi_fail(EP_ERR_FORMAT, "bootstrap frame of kind %u, status %d; expected kind %u",
                        frame.kind, frame.status, expect->kind);
    uint32_t most = frame.kind == EPI_FRAME_FAIL ? EPI_WIRE_MESSAGE_MAX : expect->max_bytes;
    if (frame.bytes > most)
        return epi_fail(EP_ERR_FORMAT, "bootstrap frame with %u bytes; at most %u were expected",
                        frame.bytes, most);
    if (frame.kind != EPI_FRAME_FAIL && frame.round != expect->round)
        return epi_fail(EP_ERR_FORMAT, "bootstrap frame of round %u in round %u", frame.round,
                        expect->round);
    if (frame.rank < 0 || frame.rank >= frame.num_ranks ||
        (expect->rank >= 0 && frame.rank != expect->rank))
        return epi_fail(EP_ERR_FORMAT, "bootstrap frame of rank %d of %d", frame.rank,
                        frame.num_ranks);
    *parsed = frame;
    if (frame.kind != EPI_FRAME_FAIL && frame.num_ranks != expect->num_ranks)
        return epi_fail(EP_ERR_MISMATCH, "num_ranks is %d, but %d on rank %d", expect->num_ranks,
                        frame.num_ranks, frame.rank);
    return EP_OK;
}

ep_status epi_frame_fail(const epi_frame *frame, const void *payload)
{
    char message[EPI_WIRE_MESSAGE_MAX + 1];
    size_t length = frame->bytes < EPI_WIRE_MESSAGE_MAX ? frame->bytes : EPI_WIRE_MESSAGE_MAX;
    memcpy(message, payload, length);
    message[length] = '\0';
    return epi_fail((ep_status)frame->status, "%s", message);
}
