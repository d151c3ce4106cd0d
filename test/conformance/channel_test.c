/* SPDX-License-Identifier: MIT */
/* Channels on every transport: order, room, bounded waits that name the late rank. */
#include "entrepot/channel.h"

#include "support/random.h"
#include "support/ranks.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

/* The last two deliver notifications late, out of order and more than once. */
static const char *const transports[] = {"threads", "shm",
                                         "fault(threads):delay_us=200,reorder=1,repeat=30",
                                         "fault(shm):delay_us=200,reorder=1,repeat=30"};
enum { TRANSPORTS = sizeof transports / sizeof *transports };

static int make(ep_group *group, int lanes, int slots, int64_t bytes, ep_channel **channel)
{
    const ep_channel_config config = {sizeof config, lanes, slots, bytes};
    return ep_channel_create(group, &config, channel);
}

/* Lane l of every rank is filled by the rank l + 1 behind it, itself included. */
static int all_lanes_in_order(ep_group *group, void *arg)
{
    enum { MESSAGES = 300 };
    int slots = *(const int *)arg, rank = ep_group_rank(group), ranks = ep_group_num_ranks(group);
    ep_channel *channel;
    uint64_t data[9], expected;
    struct rng rng;
    rng_seed(&rng, 7); /* the same on every rank: nobody waits in a circle */
    TEST_OK(make(group, ranks, slots, sizeof data, &channel));
    for (int i = 0; i < MESSAGES; i++) {
        size_t bytes = 8 * (size_t)rng_below(&rng, 10);
        for (int lane = 0; lane < ranks; lane++) {
            for (size_t k = 0; k < 9; k++)
                data[k] = (uint64_t)i * 1000 + (uint64_t)rank * 100 + k;
            TEST_OK(ep_channel_send(channel, (rank + lane + 1) % ranks, lane, data, bytes));
        }
        for (int lane = 0; lane < ranks; lane++) {
            int from = (rank - lane - 1 + ranks) % ranks;
            memset(data, 0xff, sizeof data);
            TEST_OK(ep_channel_recv(channel, from, lane, data, bytes));
            for (size_t k = 0; k < 9; k++) {
                expected = (uint64_t)i * 1000 + (uint64_t)from * 100 + k;
                TEST_CHECK(data[k] == (k < bytes / 8 ? expected : UINT64_MAX));
            }
        }
    }
    ep_channel_destroy(channel);
    return 0;
}

static void messages_keep_their_order(void **state)
{
    (void)state;
    for (int t = 0; t < TRANSPORTS; t++)
        for (int ranks = 1; ranks <= 4; ranks++)
            for (int slots = 1; slots <= 3; slots += 2)
                assert_int_equal(test_run_groups(transports[t], ranks, all_lanes_in_order, &slots),
                                 0);
}

/* Rank 0 sends as fast as room allows, rank 1 takes slowly; both directions at once. */
static int sender_waits_for_room(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group);
    ep_channel *channel;
    char big[5000];
    TEST_OK(make(group, 2, 2, sizeof big, &channel));
    for (int i = 0; i < 200; i++) {
        if (rank == 0) {
            memset(big, i, sizeof big);
            TEST_OK(ep_channel_send(channel, 1, 1, big, sizeof big));
        } else {
            TEST_OK(ep_channel_recv(channel, 0, 1, big, sizeof big));
            for (size_t k = 0; k < sizeof big; k++)
                TEST_CHECK(big[k] == (char)i);
        }
    }
    ep_channel_destroy(channel);
    return 0;
}

static void full_lanes_wait(void **state)
{
    (void)state;
    for (int t = 0; t < TRANSPORTS; t++)
        assert_int_equal(test_run_groups(transports[t], 2, sender_waits_for_room, NULL), 0);
}

static int late_ranks_are_named(ep_group *group, void *arg)
{
    (void)arg;
    ep_channel *channel;
    int data = 5;
    TEST_OK(make(group, 1, 1, sizeof data, &channel));
    if (ep_group_rank(group) == 1) {
        TEST_OK(ep_group_set_timeout_ms(group, 60));
        TEST_CHECK(ep_channel_recv(channel, 2, 0, &data, sizeof data) == EP_ERR_TIMEOUT);
        TEST_CHECK(strcmp(ep_last_error(), "receive (call 1): no word from rank 2 within 60 ms") ==
                   0);
        TEST_OK(ep_channel_send(channel, 0, 0, &data, sizeof data));
        TEST_CHECK(ep_channel_send(channel, 0, 0, &data, sizeof data) == EP_ERR_TIMEOUT);
        TEST_CHECK(strcmp(ep_last_error(), "send (call 2): no word from rank 0 within 60 ms") == 0);
        TEST_OK(ep_group_set_timeout_ms(group, 30000));
    }
    TEST_OK(ep_group_barrier(group));
    /* A wait that failed took nothing: the lane goes on where it was. */
    if (ep_group_rank(group) == 0)
        TEST_OK(ep_channel_recv(channel, 1, 0, &data, sizeof data));
    if (ep_group_rank(group) == 2)
        TEST_OK(ep_channel_send(channel, 1, 0, &data, sizeof data));
    if (ep_group_rank(group) == 1) {
        TEST_OK(ep_channel_recv(channel, 2, 0, &data, sizeof data));
        TEST_OK(ep_channel_send(channel, 0, 0, &data, sizeof data));
    }
    TEST_CHECK(data == 5);
    ep_channel_destroy(channel);
    return 0;
}

static void waits_are_bounded(void **state)
{
    (void)state;
    for (int t = 0; t < TRANSPORTS; t++)
        assert_int_equal(test_run_groups(transports[t], 3, late_ranks_are_named, NULL), 0);
}

/* Rank 1 gives up while the others wait, one for a message and one for room. */
static int one_gives_up(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group), data = 7;
    ep_channel *channel;
    TEST_OK(make(group, 2, 1, sizeof data, &channel));
    if (rank == 1) {
        TEST_OK(ep_channel_send(channel, 0, 0, &data, sizeof data));
        TEST_OK(ep_channel_give_up(channel, EP_ERR_FORMAT));
        TEST_OK(ep_channel_give_up(channel, EP_ERR_MEMORY)); /* the first stands */
    } else if (rank == 0) {
        data = 0;
        TEST_OK(ep_channel_recv(channel, 1, 0, &data, sizeof data));
        TEST_CHECK(data == 7);
        TEST_CHECK(ep_channel_recv(channel, 2, 1, &data, sizeof data) == EP_ERR_ABORTED);
    } else {
        TEST_OK(ep_channel_send(channel, 1, 1, &data, sizeof data));
        TEST_CHECK(ep_channel_send(channel, 1, 1, &data, sizeof data) == EP_ERR_ABORTED);
        TEST_CHECK(ep_channel_give_up(channel, EP_OK) == EP_ERR_ARGUMENT);
        TEST_OK(ep_channel_give_up(channel, EP_ERR_ABORTED)); /* passes rank 1's on */
    }
    if (rank != 1)
        TEST_CHECK(strstr(ep_last_error(), rank ? "why is EP_OK" : "rank 1 gave the channel up: "));
    TEST_OK(ep_group_barrier(group));
    if (rank == 1) { /* its own waits end too */
        TEST_CHECK(ep_channel_recv(channel, 2, 0, &data, sizeof data) == EP_ERR_ABORTED);
        TEST_CHECK(strstr(ep_last_error(), ep_status_string(EP_ERR_FORMAT)));
    }
    ep_channel_destroy(channel);
    return 0;
}

static void given_up_channels_end_waits(void **state)
{
    (void)state;
    for (int t = 0; t < TRANSPORTS; t++)
        assert_int_equal(test_run_groups(transports[t], 3, one_gives_up, NULL), 0);
}

static int bad_arguments(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group);
    ep_channel *channel;
    int64_t data = 0;
    TEST_CHECK(make(group, 0, 1, 8, &channel) == EP_ERR_ARGUMENT);
    TEST_CHECK(make(group, 1, 0, 8, &channel) == EP_ERR_ARGUMENT);
    TEST_CHECK(make(group, 1, 1, 0, &channel) == EP_ERR_ARGUMENT);
    TEST_CHECK(make(group, 1 + rank, 1, 8, &channel) == EP_ERR_MISMATCH && channel == NULL);
    TEST_OK(make(group, 2, 1, 8, &channel));
    TEST_CHECK(ep_channel_send(NULL, 0, 0, &data, 8) == EP_ERR_ARGUMENT);
    TEST_CHECK(ep_channel_send(channel, 2, 0, &data, 8) == EP_ERR_ARGUMENT);
    TEST_CHECK(strcmp(ep_last_error(), "to is 2; it can be 0..1") == 0);
    TEST_CHECK(ep_channel_send(channel, 0, 2, &data, 8) == EP_ERR_ARGUMENT);
    TEST_CHECK(ep_channel_send(channel, 0, 0, &data, 9) == EP_ERR_ARGUMENT);
    TEST_CHECK(ep_channel_send(channel, 0, 0, NULL, 8) == EP_ERR_ARGUMENT);
    TEST_CHECK(ep_channel_recv(channel, -1, 0, &data, 8) == EP_ERR_ARGUMENT);
    /* Messages of the wrong length or sender are reported, not swallowed. */
    TEST_OK(ep_channel_send(channel, 1 - rank, 0, &data, 4));
    TEST_CHECK(ep_channel_recv(channel, 1 - rank, 0, &data, 8) == EP_ERR_MISMATCH);
    TEST_CHECK(ep_channel_recv(channel, rank, 0, &data, 4) == EP_ERR_MISMATCH);
    TEST_OK(ep_channel_recv(channel, 1 - rank, 0, &data, 4));
    ep_channel_destroy(channel);
    ep_channel_destroy(NULL);
    return 0;
}

static void arguments_are_named(void **state)
{
    (void)state;
    for (int t = 0; t < TRANSPORTS; t++)
        assert_int_equal(test_run_groups(transports[t], 2, bad_arguments, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(messages_keep_their_order), cmocka_unit_test(full_lanes_wait),
        cmocka_unit_test(waits_are_bounded),         cmocka_unit_test(given_up_channels_end_waits),
        cmocka_unit_test(arguments_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
