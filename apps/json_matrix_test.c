/* SPDX-License-Identifier: MIT */
#include "json_matrix.h"

#include "support/test.h"

#include <string.h>

static const json_matrix_spec spec = {"m", 0, 100, false};

static void reads_a_matrix_among_others(void **state)
{
    (void)state;
    static const char text[] = "{\"x\": [1, {\"m\": [[9]]}, \"m\"], \"m\": [[1, 2.5], [3e1, 0]],\n"
                               " \"y\": null}\n";
    static const double want[4] = {1, 2.5, 30, 0};
    char message[JSON_MATRIX_MESSAGE_MAX];
    json_matrix m;
    assert_true(json_matrix_parse(text, strlen(text), &spec, &m, message));
    assert_int_equal(m.rows, 2);
    assert_int_equal(m.columns, 2);
    assert_memory_equal(m.values, want, sizeof want);
    json_matrix_free(&m);
}

static void names_the_place(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"", "line 1, column 1: expected '{', found the end of the file"},
        {"[1]", "line 1, column 1: expected '{', found '['"},
        {"{}", "line 1, column 2: expected a member \"m\" before the end of the object"},
        {"{\"n\": 1}", "line 1, column 8: expected a member \"m\" before the end of the object"},
        {"{\"m\": 3}", "line 1, column 7: expected '[' before the rows, found '3'"},
        {"{\"m\": [3]}", "line 1, column 8: expected '[' before a row of numbers, found '3'"},
        {"{\"m\": []}", "line 1, column 8: expected '[' before a row of numbers, found ']'"},
        {"{\"m\": [[]]}", "line 1, column 9: expected a number in 0..100, found ']'"},
        {"{\"m\": [[1, -2]]}", "line 1, column 12: expected a number in 0..100, found -2"},
        {"{\"m\": [[1,\n  1e3]]}", "line 2, column 3: expected a number in 0..100, found 1e3"},
        {"{\"m\": [[1, \"2\"]]}", "line 1, column 12: expected a number in 0..100, found '\"'"},
        {"{\"m\": [[1, 2],\n[3]]}",
         "line 2, column 3: expected 2 numbers as in the rows before, found 1"},
        {"{\"m\": [[1] [2]]}", "line 1, column 12: expected ',' or ']', found '['"},
        {"{\"m\": [[1.]]}", "line 1, column 11: expected a digit, found ']'"},
        {"{\"m\": [[01]]}", "line 1, column 10: expected ',' or ']', found '1'"},
        {"{\"m\": [[1]]", "line 1, column 12: expected ',' or '}', found the end of the file"},
        {"{\"m\": [[1]]} x", "line 1, column 14: expected the end of the file, found 'x'"},
        {"{\"m\": [[1]], \"m\": [[1]]}",
         "line 1, column 19: expected one \"m\" only, found another"},
        {"{\"a\": \"\\q\"}",
         "line 1, column 9: expected one of \"\\/bfnrtu after a backslash, found 'q'"},
        {"{\"a\": nul}", "line 1, column 7: expected a value, found 'n'"},
        {"{\"a\": 1, }", "line 1, column 10: expected a name in quotes, found '}'"},
        {"{\"a\": \x01}", "line 1, column 7: expected a value, found the byte 0x01"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char message[JSON_MATRIX_MESSAGE_MAX];
        json_matrix m;
        assert_false(json_matrix_parse(cases[i].text, strlen(cases[i].text), &spec, &m, message));
        assert_string_equal(message, cases[i].message);
        assert_null(m.values);
    }
}

static void whole_numbers_only(void **state)
{
    (void)state;
    const json_matrix_spec whole = {"m", 0, 100, true};
    static const char text[] = "{\"m\": [[1, 2.5]]}";
    char message[JSON_MATRIX_MESSAGE_MAX];
    json_matrix m;
    assert_false(json_matrix_parse(text, strlen(text), &whole, &m, message));
    assert_string_equal(message, "line 1, column 12: expected a whole number in 0..100, found 2.5");
    assert_false(json_matrix_load("/no/such/file", &whole, &m, message));
    assert_string_equal(message, "No such file or directory");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(reads_a_matrix_among_others),
        cmocka_unit_test(names_the_place),
        cmocka_unit_test(whole_numbers_only),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
