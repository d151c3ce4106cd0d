/* SPDX-License-Identifier: MIT */
/* Frames of the local bootstrap: each field is checked. */
#include "ep/wire.h"

#include "support/test.h"

#include <string.h>

static const epi_frame_expect hello = {EPI_FRAME_HELLO, -1, 4, 0, 0};
static const epi_frame_expect gather = {EPI_FRAME_GATHER, 2, 4, 7, 512};
static const epi_frame_expect result = {EPI_FRAME_RESULT, 0, 4, 7, 2048};

static epi_frame good_for(const epi_frame_expect *expect)
{
    return (epi_frame){.magic = EPI_WIRE_MAGIC,
                       .kind = expect->kind,
                       .rank = expect->rank >= 0 ? expect->rank : 3,
                       .num_ranks = expect->num_ranks,
                       .round = expect->round,
                       .bytes = expect->max_bytes,
                       .deadline_ns = 1};
}

static ep_status parse(const epi_frame *frame, const epi_frame_expect *expect)
{
    epi_frame parsed;
    return epi_frame_parse(frame, sizeof *frame, expect, &parsed);
}

static void takes_what_it_expects(void **state)
{
    (void)state;
    const epi_frame_expect *const all[] = {&hello, &gather, &result};
    for (int i = 0; i < 3; i++) {
        epi_frame frame = good_for(all[i]), parsed;
        assert_int_equal(epi_frame_parse(&frame, sizeof frame, all[i], &parsed), EP_OK);
        assert_memory_equal(&frame, &parsed, sizeof frame);
        for (int j = 0; j < 3; j++)
            assert_int_equal(parse(&frame, all[j]), i == j ? EP_OK : EP_ERR_FORMAT);
    }
}

#define EXPECT_BAD(change, message)                              \
    do {                                                         \
        epi_frame frame = good_for(&gather);                     \
        frame.change;                                            \
        assert_int_equal(parse(&frame, &gather), EP_ERR_FORMAT); \
        assert_string_equal(ep_last_error(), message);           \
    } while (0)

static void names_what_is_wrong(void **state)
{
    (void)state;
    EXPECT_BAD(magic = 1, "bootstrap frame begins with 00000001, not 31425045");
    EXPECT_BAD(kind = 9, "bootstrap frame of kind 9, status 0; expected kind 2");
    EXPECT_BAD(status = 3, "bootstrap frame of kind 2, status 3; expected kind 2");
    EXPECT_BAD(reserved = 1, "bootstrap frame of kind 2, status 0; expected kind 2");
    EXPECT_BAD(bytes = 513, "bootstrap frame with 513 bytes; at most 512 were expected");
    EXPECT_BAD(round = 6, "bootstrap frame of round 6 in round 7");
    EXPECT_BAD(rank = 3, "bootstrap frame of rank 3 of 4");
    EXPECT_BAD(rank = -1, "bootstrap frame of rank -1 of 4");
    epi_frame frame = good_for(&gather), parsed;
    for (size_t size = 0; size < sizeof frame; size++)
        assert_int_equal(epi_frame_parse(&frame, size, &gather, &parsed), EP_ERR_FORMAT);
}

static void tells_a_mismatch_from_garbage(void **state)
{
    (void)state;
    epi_frame frame = good_for(&hello), parsed;
    frame.num_ranks = 8;
    frame.rank = 7;
    assert_int_equal(epi_frame_parse(&frame, sizeof frame, &hello, &parsed), EP_ERR_MISMATCH);
    assert_string_equal(ep_last_error(), "num_ranks is 4, but 8 on rank 7");
    assert_int_equal(parsed.num_ranks, 8);
    frame.rank = 8;
    assert_int_equal(parse(&frame, &hello), EP_ERR_FORMAT);
}

static void passes_on_failures(void **state)
{
    (void)state;
    epi_frame frame = good_for(&result);
    frame.kind = EPI_FRAME_FAIL;
    frame.round = 3; /* whenever it was sent */
    frame.bytes = 4;
    assert_int_equal(parse(&frame, &result), EP_ERR_FORMAT); /* no error is no failure */
    frame.status = EP_ERR_TIMEOUT;
    assert_int_equal(parse(&frame, &result), EP_OK);
    assert_int_equal(parse(&frame, &gather), EP_ERR_FORMAT);
    assert_int_equal(epi_frame_fail(&frame, "lateX"), EP_ERR_TIMEOUT);
    assert_string_equal(ep_last_error(), "late");
    frame.status = EP_ERR_FORMAT + 1;
    assert_int_equal(parse(&frame, &result), EP_ERR_FORMAT);
    frame.status = EP_ERR_STATE;
    frame.bytes = EPI_WIRE_MESSAGE_MAX + 1;
    assert_int_equal(parse(&frame, &result), EP_ERR_FORMAT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(takes_what_it_expects),
        cmocka_unit_test(names_what_is_wrong),
        cmocka_unit_test(tells_a_mismatch_from_garbage),
        cmocka_unit_test(passes_on_failures),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
