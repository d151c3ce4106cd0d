/* SPDX-License-Identifier: MIT */
/*
 * Bytes of any content where the bootstrap expects frames: on the way to a rank,
 * which takes them over a real socket, and to the hub's checks.
 */
#include "ep/channel.h"
#include "ep/wire.h"

#include "support/fuzz.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define PAYLOAD_MAX 64

static void require(int condition)
{
    if (!condition)
        abort();
}

static void check_parse(const uint8_t *data, size_t size)
{
    for (uint32_t kind = EPI_FRAME_HELLO; kind <= EPI_FRAME_RESULT; kind++) {
        const epi_frame_expect expect = {kind, kind == EPI_FRAME_HELLO ? -1 : 1, 4, kind - 1,
                                         PAYLOAD_MAX};
        epi_frame frame;
        ep_status status = epi_frame_parse(data, size, &expect, &frame);
        require(status == EP_OK || status == EP_ERR_FORMAT || status == EP_ERR_MISMATCH);
        if (status != EP_OK)
            continue;
        require(size >= sizeof frame && frame.rank >= 0);
        require(frame.kind == EPI_FRAME_FAIL || (frame.num_ranks == 4 && frame.rank < 4));
        require(frame.bytes <= (frame.kind == EPI_FRAME_FAIL ? EPI_WIRE_MESSAGE_MAX : PAYLOAD_MAX));
    }
}

/* What a rank does with an answer of the hub. */
static void check_receive(const uint8_t *data, size_t size)
{
    const epi_frame_expect expect = {EPI_FRAME_RESULT, -1, 4, 2, PAYLOAD_MAX};
    int ends[2];
    epi_frame frame;
    uint8_t payload[EPI_WIRE_MESSAGE_MAX];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0)
        return;
    require(epi_send_all(ends[0], data, size, 0) == EPI_IO_DONE);
    close(ends[0]);
    epi_io io = epi_receive_all(ends[1], &frame, sizeof frame, 0);
    require(io == (size >= sizeof frame ? EPI_IO_DONE : EPI_IO_GONE));
    if (io == EPI_IO_DONE && epi_frame_parse(&frame, sizeof frame, &expect, &frame) == EP_OK) {
        io = epi_receive_all(ends[1], payload, frame.bytes, 0);
        if (io == EPI_IO_DONE && frame.kind == EPI_FRAME_FAIL)
            require(epi_frame_fail(&frame, payload) == (ep_status)frame.status);
    }
    close(ends[1]);
}

static int one_input(const uint8_t *data, size_t size)
{
    check_parse(data, size);
    check_receive(data, size);
    return 0;
}

static const char *const seeds[] = {NULL};
static const epi_frame hello = {EPI_WIRE_MAGIC, EPI_FRAME_HELLO, 1, 4, 0, 0, 0, 0, 1};
static const struct {
    epi_frame head;
    uint8_t payload[PAYLOAD_MAX];
} gather = {{EPI_WIRE_MAGIC, EPI_FRAME_GATHER, 1, 4, 1, PAYLOAD_MAX, 0, 0, 1}, {1}},
  result = {{EPI_WIRE_MAGIC, EPI_FRAME_RESULT, 1, 4, 2, PAYLOAD_MAX, 0, 0, 1}, {2}},
  fail = {{EPI_WIRE_MAGIC, EPI_FRAME_FAIL, 0, 4, 0, 10, EP_ERR_TIMEOUT, 0, 1}, "rank 3 late"};
static const struct fuzz_blob blobs[] = {
    {&hello, sizeof hello},
    {&gather, sizeof gather},
    {&result, sizeof result},
    {&fail, sizeof fail},
    {NULL, 0},
};
static const struct fuzz_target target = {"bootstrap", one_input, seeds, NULL, 512, blobs};
FUZZ_MAIN(target)
