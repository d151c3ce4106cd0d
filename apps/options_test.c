/* SPDX-License-Identifier: MIT */
/* The option parser: forms, kinds, ranges and where options end. Messages are in test/cli. */
#include "options.h"

#include "support/test.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

static struct {
    int64_t number;
    double real;
    const char *text;
    int choice;
    bool on, given;
} got;

static const char *const choices[] = {"first", "second", NULL};

/* Parses words parted by blanks; returns what options_parse returns. */
static int parse(const char *line, int *exit_code)
{
    static char words[256];
    char *argv[32] = {"test"};
    int argc = 1;
    const option table[] = {
        {"number", "N", OPTION_KIND_INTEGER, &got.number, -5, 100, 0, 0, NULL, "", &got.given, 'n'},
        OPTION_REAL("real", "X", &got.real, 0, 1, ""),
        OPTION_TEXT("text", "TEXT", &got.text, ""),
        OPTION_CHOICE("choice", "NAME", &got.choice, choices, ""),
        OPTION_SWITCH("on", &got.on, ""),
    };
    const options_spec spec = {"test", "", "", table, 5, true};
    memset(&got, 0, sizeof got);
    snprintf(words, sizeof words, "%s", line);
    for (char *word = strtok(words, " "); word; word = strtok(NULL, " "))
        argv[argc++] = word;
    return options_parse(&spec, argc, argv, exit_code);
}

static void every_form_and_kind(void **state)
{
    (void)state;
    int code;
    assert_int_equal(parse("--number 7 --real=0.5 --text t --choice second --on rest", &code), 9);
    assert_int_equal(code, 0);
    assert_int_equal(got.number, 7);
    assert_true(got.real == 0.5);
    assert_string_equal(got.text, "t");
    assert_int_equal(got.choice, 1);
    assert_true(got.on && got.given);
    assert_int_equal(parse("-n -5", &code), 3);
    assert_int_equal(got.number, -5);
    assert_int_equal(parse("", &code), 1);
    assert_false(got.given);
}

static void options_end_at_words_and_dashes(void **state)
{
    (void)state;
    int code;
    assert_int_equal(parse("word --on", &code), 1);
    assert_false(got.on);
    assert_int_equal(parse("--on -- --number", &code), 3);
    assert_true(got.on);
    assert_int_equal(parse("-", &code), 1);
}

static void later_options_win(void **state)
{
    (void)state;
    int code;
    parse("--number 1 --number=2", &code);
    assert_int_equal(got.number, 2);
}

static void bad_values_change_nothing(void **state)
{
    (void)state;
    static const char *const bad[] = {"--number 101", "--number -6",    "--number 1.0", "--number=",
                                      "--number x",   "--real 1.01",    "--real x",     "--text=",
                                      "--choice fir", "--choice third", "--on=1",       "--o",
                                      "-o",           "--number",       "-n",           "-nn 1"};
    if (!freopen("/dev/null", "w", stderr))
        skip();
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        int code;
        assert_int_equal(parse(bad[i], &code), -1);
        assert_int_equal(code, 2);
        assert_int_equal(got.number, 0);
        assert_true(got.real == 0);
        assert_int_equal(got.choice, 0);
        assert_false(got.on || got.given);
    }
}

static void numbers_are_strict(void **state)
{
    (void)state;
    int64_t n;
    double x;
    assert_true(parse_integer("-9223372036854775808", INT64_MIN, INT64_MAX, &n) && n == INT64_MIN);
    assert_false(parse_integer("9223372036854775808", INT64_MIN, INT64_MAX, &n));
    assert_false(parse_integer(" 1", 0, 9, &n));
    assert_false(parse_integer("1 ", 0, 9, &n));
    assert_false(parse_integer("-", -9, 9, &n));
    assert_true(parse_real("1e-3", 0, 1, &x) && x == 1e-3);
    assert_false(parse_real(" 1", 0, 9, &x));
    assert_false(parse_real("nan", 0, 9, &x));
    assert_false(parse_real("1e999", 0, 1e300, &x));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_form_and_kind),
        cmocka_unit_test(options_end_at_words_and_dashes),
        cmocka_unit_test(later_options_win),
        cmocka_unit_test(numbers_are_strict),
        cmocka_unit_test(bad_values_change_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
