/* SPDX-License-Identifier: MIT */
/* Groups on every transport: creation, barrier, all-gather, errors that name ranks. */
#include "support/ranks.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

static const char *const transports[] = {"threads", "shm",
                                         "fault(threads):delay_us=200,reorder=1,repeat=30",
                                         "fault(shm):delay_us=200,reorder=1,repeat=30"};

static int gather_all_sizes(ep_group *group, void *arg)
{
    (void)arg;
    static const size_t sizes[] = {0, 1, 8, 4080, 4081, 70000, 1 << 20, 3};
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group);
    uint8_t *send = malloc(1 << 20), *recv = malloc((size_t)ranks << 20);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t bytes = sizes[i];
        memset(send, 16 * (int)i + rank, bytes);
        TEST_OK(ep_group_allgather(group, send, recv, bytes));
        for (int peer = 0; peer < ranks; peer++)
            for (size_t b = 0; b < bytes; b++)
                TEST_CHECK(recv[(size_t)peer * bytes + b] == (uint8_t)(16 * (int)i + peer));
    }
    free(send);
    free(recv);
    return 0;
}

static int many_barriers(ep_group *group, void *arg)
{
    (void)arg;
    for (int i = 0; i < 500; i++)
        TEST_OK(ep_group_barrier(group));
    return 0;
}

static void all_gathers(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof transports / sizeof *transports; i++)
        for (int ranks = 1; ranks <= 4; ranks++)
            assert_int_equal(test_run_groups(transports[i], ranks, gather_all_sizes, NULL), 0);
}

static void barriers(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof transports / sizeof *transports; i++)
        assert_int_equal(test_run_groups(transports[i], 8, many_barriers, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_gathers),
        cmocka_unit_test(barriers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
