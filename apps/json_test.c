/* SPDX-License-Identifier: MIT */
/* The JSON writer: the very text, and that the tests' JSON reader tells good from bad. */
#include "json.h"

#include "support/command.h"
#include "support/test.h"

#include <math.h>
#include <stdlib.h>

static void everything_in_one_object(void **state)
{
    (void)state;
    char *text = NULL;
    size_t size = 0;
    json j;
    FILE *out = open_memstream(&text, &size);
    json_start(&j, out);
    json_open_object(&j, NULL);
    json_text(&j, "text", "a\"\\\n\x01\xc3\xa4");
    json_text(&j, "none", NULL);
    json_integer(&j, "integer", INT64_MIN);
    json_real(&j, "real", 0.1);
    json_real(&j, "nan", NAN);
    json_real(&j, "infinity", -INFINITY);
    json_open_array(&j, "array");
    json_bool(&j, NULL, true);
    json_open_array(&j, NULL);
    json_close_array(&j);
    json_open_object(&j, NULL);
    json_close_object(&j);
    json_close_array(&j);
    json_bool(&j, "last", false);
    json_close_object(&j);
    assert_true(json_finish(&j));
    fclose(out);
    assert_string_equal(text, "{\"text\": \"a\\\"\\\\\\u000a\\u0001\xc3\xa4\", \"none\": null, "
                              "\"integer\": -9223372036854775808, \"real\": 0.1, \"nan\": null, "
                              "\"infinity\": null, \"array\": [true, [], {}], \"last\": false}\n");
    assert_true(json_is_one_value(text));
    free(text);
}

static void a_failed_write_is_seen(void **state)
{
    (void)state;
    json j;
    FILE *out = fopen("/dev/full", "w");
    if (!out)
        skip();
    json_start(&j, out);
    json_null(&j, NULL);
    assert_false(json_finish(&j));
    fclose(out);
}

static void the_reader_tells_good_from_bad(void **state)
{
    (void)state;
    static const char *const bad[] = {"",       "{}",      "{}\n\n",    "{}{}\n",     "{,}\n",
                                      "[1,]\n", "[1 2]\n", "{\"a\"}\n", "{\"a\":}\n", "nan\n",
                                      "[01]\n", "[.5]\n",  "\"\n\"\n",  "[\"\\x\"]\n"};
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_false(json_is_one_value(bad[i]));
    assert_true(json_is_one_value("{\"a\": [1, -2.5e3, \"\\n\", {}], \"b\": null}\n"));
    assert_true(json_number("{\"aa\": 1, \"a\": 2}\n", "a") == 2);
    assert_true(isnan(json_number("{\"aa\": 1}\n", "a")));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(everything_in_one_object),
        cmocka_unit_test(a_failed_write_is_seen),
        cmocka_unit_test(the_reader_tells_good_from_bad),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
