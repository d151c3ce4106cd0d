/* SPDX-License-Identifier: MIT */
/* ctest-timeout: 300 */
/* ctest-label: notsan */
/* `entrepot demo` and `entrepot info` as scripts see them. */
#include "support/command.h"
#include "support/test.h"

#include <stdio.h>
#include <string.h>

static void the_demo_checks_itself(void **state)
{
    (void)state;
    command_result r = command_line("entrepot demo --ranks 3 --tokens 4 --json");
    assert_string_equal(r.err, "");
    assert_int_equal(r.code, 0);
    assert_true(json_is_one_value(r.out));
    assert_non_null(strstr(r.out, "\"check\": \"ok\""));
    assert_non_null(strstr(r.out, "\"backend\": \"cpu\""));
    assert_int_equal((int)json_number(r.out, "gpus"), 0);
    assert_int_equal((int)json_number(r.out, "experts"), 258); /* a multiple of the ranks */
    assert_int_equal((int)json_number(r.out, "pairs"), 3 * 4 * 8);
    assert_true(json_number(r.out, "rows") <= 3 * 3 * 4);
    assert_true(json_number(r.out, "rows_kept_local") <= 3 * 4);
    assert_true(json_number(r.out, "rows_not_sent_twice") ==
                json_number(r.out, "pairs") - json_number(r.out, "rows"));
    command_free(&r);
}

static void the_demo_prints_tables(void **state)
{
    (void)state;
    static const char *const parts[] = {
        "T2 dispatch: router", "T2 dispatch: FP8 rows", "T3 expert", "T4 combine", "rank   1",
        "bit for bit"};
    command_result r = command_line("entrepot demo --ranks 2 --tokens 2");
    assert_int_equal(r.code, 0);
    assert_string_equal(r.err, "");
    for (size_t i = 0; i < sizeof parts / sizeof parts[0]; i++)
        assert_non_null(strstr(r.out, parts[i]));
    command_free(&r);
}

static void without_a_module_the_demo_says_what_to_do(void **state)
{
    (void)state;
    static const char *const commands[] = {"demo", "bench ep"};
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        char line[128], start[64];
        snprintf(line, sizeof line, "env EP_CUDA_MODULE=/nonexistent %s %s --backend cuda --mps",
                 EP_COMMAND, commands[i]);
        snprintf(start, sizeof start,
                 "entrepot %s: --backend cuda: no GPU can be used: ", commands[i]);
        command_result r = command_line(line);
        assert_int_equal(r.code, 3);
        assert_string_equal(r.out, "");
        assert_int_equal(strncmp(r.err, start, strlen(start)), 0);
        assert_non_null(strstr(r.err, "/nonexistent: cannot open"));
        assert_non_null(strstr(r.err, "; build the module where nvcc is"));
        command_free(&r);
    }
}

/* A crash where GPUs are looked for is not silence. */
static void a_broken_module_is_told_of(void **state)
{
    (void)state;
    static const char *const cases[][2] = {
        {"abort", "looking for one was ended by signal 6 ("},
        {"exit", "looking for one ended with code 7 and no reason; "},
        {"fail", "no GPU can be used: the driver is out of sorts; "},
        {"zero", "looking for one ended with code 0 and no reason; "},
        {"version", "/lib/libbroken_module.so is of version 9.9, the library of "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char line[512];
        snprintf(line, sizeof line,
                 "env EP_CUDA_MODULE=%s/lib/libbroken_module.so BROKEN_MODULE=%s %s demo "
                 "--backend cuda",
                 EP_BINARY_DIR, cases[i][0], EP_COMMAND);
        command_result r = command_line(line);
        assert_int_equal(r.code, 3);
        assert_string_equal(r.out, "");
        assert_non_null(strstr(r.err, cases[i][1]));
        assert_non_null(strstr(r.err, ", or run with --backend cpu\n"));
        command_free(&r);
    }
}

static void the_demo_runs_on_gpus(void **state)
{
    (void)state;
    command_result r = command_line("entrepot info --json");
    bool works = strstr(r.out, "\"cuda\": {\"works\": true") != NULL;
    command_free(&r);
    if (!works)
        skip();
    r = command_line("entrepot demo --backend cuda --mps --ranks 3 --tokens 4 --json");
    assert_string_equal(r.err, "");
    assert_int_equal(r.code, 0);
    assert_non_null(strstr(r.out, "\"check\": \"ok\""));
    assert_non_null(strstr(r.out, "\"backend\": \"cuda\""));
    assert_true(json_number(r.out, "gpus") >= 1);
    assert_int_equal((int)json_number(r.out, "pairs"), 3 * 4 * 8);
    command_free(&r);
}

static void info_lists_what_there_is(void **state)
{
    (void)state;
    command_result r = command_line("entrepot info --json");
    assert_int_equal(r.code, 0);
    assert_string_equal(r.err, "");
    assert_true(json_is_one_value(r.out));
    assert_non_null(strstr(r.out, "\"version\": \"0."));
    assert_non_null(strstr(r.out, "{\"name\": \"shm\", \"works\": true"));
    assert_non_null(strstr(r.out, "{\"name\": \"threads\", \"works\": true"));
    assert_non_null(strstr(r.out, "\"mpi_baseline\": "));
    assert_true(json_number(r.out, "cores") >= 1);
    command_free(&r);
    r = command_line("entrepot info");
    assert_int_equal(r.code, 0);
    assert_non_null(strstr(r.out, "shm"));
    command_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_demo_checks_itself),
        cmocka_unit_test(the_demo_prints_tables),
        cmocka_unit_test(without_a_module_the_demo_says_what_to_do),
        cmocka_unit_test(a_broken_module_is_told_of),
        cmocka_unit_test(the_demo_runs_on_gpus),
        cmocka_unit_test(info_lists_what_there_is),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
