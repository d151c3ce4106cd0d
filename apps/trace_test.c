/* SPDX-License-Identifier: MIT */
/* Traces: what is read, and where and how each kind of malformed line is reported. */
#include "trace.h"

#include "support/test.h"

#include <stdio.h>
#include <string.h>

static bool parse(const char *text, int topk, int64_t num_experts, trace *t, char *message)
{
    return trace_parse(text, strlen(text), topk, num_experts, t, message);
}

static void tokens_of_several_lines_follow_each_other(void **state)
{
    (void)state;
    trace t;
    char message[TRACE_MESSAGE_MAX];
    assert_true(parse("3\t1\t0\t2\t\t0.5\t.25\t1e-1\t0\n-1\t3\t\t0\t-2.5\n", 2, 4, &t, message));
    const int32_t ids[] = {3, 1, 0, 2, -1, 3};
    const float weights[] = {0.5f, 0.25f, 0.1f, 0, 0, -2.5f};
    assert_int_equal(t.num_tokens, 3);
    assert_memory_equal(t.ids, ids, sizeof ids);
    assert_memory_equal(t.weights, weights, sizeof weights);
    trace_free(&t);
}

static void the_last_line_needs_no_newline(void **state)
{
    (void)state;
    trace t;
    char message[TRACE_MESSAGE_MAX];
    assert_true(parse("0\t\t1", 1, 1, &t, message));
    assert_int_equal(t.num_tokens, 1);
    trace_free(&t);
}

static void malformed_lines_are_named(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } cases[] = {
        {"", "line 1, column 1: the trace is empty; it needs at least one token"},
        {"\n", "line 1, column 1: '' is not an expert id in -1..3"},
        {"0\t1\t\t1\t1\n\n", "line 2, column 1: '' is not an expert id in -1..3"},
        {"0\tx\t\t1\t1\n", "line 1, column 2: 'x' is not an expert id in -1..3"},
        {"0\t4\t\t1\t1\n", "line 1, column 2: '4' is not an expert id in -1..3"},
        {"0\t 1\t\t1\t1\n", "line 1, column 2: ' 1' is not an expert id in -1..3"},
        {"0\t1.0\t\t1\t1\n", "line 1, column 2: '1.0' is not an expert id in -1..3"},
        {"0\t1\n", "line 1, column 2: the line ends after an expert id; an empty column and as "
                   "many weights must follow"},
        {"0\t1\t\n", "line 1, column 3: '' is not an expert id in -1..3"},
        {"0\t1\t2\t\t1\t1\t1\n",
         "line 1, column 4: 3 expert ids before it are no multiple of top-k 2"},
        {"0\t1\t\t1\tnan\n", "line 1, column 5: 'nan' is not a weight (a finite decimal number)"},
        {"0\t1\t\t1\t1e99\n", "line 1, column 5: '1e99' is not a weight (a finite decimal number)"},
        {"0\t1\t\t1\t0x1\n", "line 1, column 5: '0x1' is not a weight (a finite decimal number)"},
        {"0\t1\t\t1\t1\r\n", "line 1, column 5: '1\r' is not a weight (a finite decimal number)"},
        {"0\t1\t\t1\n", "line 1, column 4: the line ends after 1 weights; it has 2 expert ids"},
        {"0\t1\t\t1\t1\t1\n",
         "line 1, column 5: the line goes on after 2 weights; it has 2 expert ids"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        trace t;
        char message[TRACE_MESSAGE_MAX];
        assert_false(parse(cases[i].text, 2, 4, &t, message));
        assert_string_equal(message, cases[i].message);
        assert_null(t.ids);
    }
}

static void zero_bytes_hide_nothing(void **state)
{
    (void)state;
    static const char text[] = "0\0001\t\t1\n";
    trace t;
    char message[TRACE_MESSAGE_MAX];
    assert_false(trace_parse(text, sizeof text - 1, 1, 4, &t, message));
    assert_string_equal(message, "line 1, column 1: '0?1' is not an expert id in -1..3");
}

static void a_missing_file_is_named(void **state)
{
    (void)state;
    trace t;
    char message[TRACE_MESSAGE_MAX];
    assert_false(trace_load("/nonexistent", 1, 1, &t, message));
    assert_string_equal(message, "No such file or directory");
}

/* Both corpora of the shared data, where they lie beside the checkout. */
static void real_traces_are_read(void **state)
{
    (void)state;
    static const char *const corpora[] = {"law", "translation"};
    for (int c = 0; c < 2; c++) {
        int64_t tokens = -1;
        for (int layer = 1; layer <= 26; layer++) {
            char path[512], message[TRACE_MESSAGE_MAX];
            snprintf(path, sizeof path, EP_TEST_DATA "/routing/%s/layer_%02d.tsv", corpora[c],
                     layer);
            FILE *file = fopen(path, "r");
            if (!file)
                skip();
            fclose(file);
            trace t;
            assert_true(trace_load(path, 6, 64, &t, message));
            if (tokens < 0)
                tokens = t.num_tokens;
            assert_true(t.num_tokens > 1000);
            assert_int_equal(t.num_tokens, tokens); /* the same text in every layer */
            trace_free(&t);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tokens_of_several_lines_follow_each_other),
        cmocka_unit_test(the_last_line_needs_no_newline),
        cmocka_unit_test(malformed_lines_are_named),
        cmocka_unit_test(zero_bytes_hide_nothing),
        cmocka_unit_test(a_missing_file_is_named),
        cmocka_unit_test(real_traces_are_read),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
