/* SPDX-License-Identifier: MIT */
/* Placements: what is read, how malformed ones are reported, and where tokens go. */
#include "placement.h"

#include "support/test.h"

#include <string.h>

static const char plan[] =
    "{\"balancedness\": 0.5, \"phy2log\": [[0, 1, 2, 3, 0, 1], [3,0,\n1, 2,0 ,0]], "
    "\"log2phy\": []}\n";

static void a_layer_is_read(void **state)
{
    (void)state;
    static const int32_t log2phy[] = {1, 4, 5, 2, -1, -1, 3, -1, -1, 0, -1, -1};
    static const int32_t logcnt[] = {3, 1, 1, 1};
    placement p;
    char message[PLACEMENT_MESSAGE_MAX];
    assert_true(placement_parse(plan, 1, 4, 2, &p, message));
    assert_int_equal(p.slots, 6);
    assert_int_equal(p.max_count, 3);
    assert_memory_equal(p.log2phy, log2phy, sizeof log2phy);
    assert_memory_equal(p.logcnt, logcnt, sizeof logcnt);
    placement_free(&p);
}

static void tokens_go_to_replicas(void **state)
{
    (void)state;
    placement p;
    char message[PLACEMENT_MESSAGE_MAX];
    int32_t ids[8][2];
    int used[6] = {0};
    assert_true(placement_parse(plan, 1, 4, 2, &p, message));
    for (int t = 0; t < 8; t++)
        ids[t][0] = 0, ids[t][1] = -1;
    assert_true(placement_route(&p, 2, 8, 2, ids[0]));
    for (int t = 0; t < 8; t++) {
        assert_int_equal(ids[t][1], -1);
        assert_true(ids[t][0] == 1 || ids[t][0] == 4 || ids[t][0] == 5);
        used[ids[t][0]]++;
    }
    assert_int_equal(used[1], 4); /* slots 0..2 are rank 0's, 3..5 rank 1's */
    placement_free(&p);
}

static void malformed_plans_are_named(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        int64_t layer;
        const char *message;
    } cases[] = {
        {"", 0, "line 1, column 1: expected '{', found the end of the file"},
        {"{\"a\": 3}", 0,
         "line 1, column 8: expected a member \"phy2log\" before the end of the object"},
        {"{\"phy2log\": [3]}", 0,
         "line 1, column 14: expected '[' before a row of numbers, found '3'"},
        {"{\"phy2log\": [[0, 1]]}", 1, "\"phy2log\" has 1 layers; there is no layer 1"},
        {"{\"phy2log\": [[0, 2]]}", 0,
         "line 1, column 18: expected a whole number in 0..1, found 2"},
        {"{\"phy2log\": [[0, 1, 1]]}", 0,
         "layer 0 has 3 slots; it can have 2..1048576, a multiple of the 2 ranks"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        placement p;
        char message[PLACEMENT_MESSAGE_MAX];
        assert_false(placement_parse(cases[i].text, cases[i].layer, 2, 2, &p, message));
        assert_string_equal(message, cases[i].message);
        assert_null(p.log2phy);
    }
    placement p;
    char message[PLACEMENT_MESSAGE_MAX];
    assert_false(placement_parse("{\"phy2log\": [[0, 0]]}", 0, 2, 2, &p, message));
    assert_non_null(strstr(message, "expert 1")); /* has no slot; the library's words */
    assert_false(placement_load("/nonexistent", 0, 2, 2, &p, message));
    assert_string_equal(message, "No such file or directory");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(a_layer_is_read),
        cmocka_unit_test(tokens_go_to_replicas),
        cmocka_unit_test(malformed_plans_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
