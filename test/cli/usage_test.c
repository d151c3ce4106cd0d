/* SPDX-License-Identifier: MIT */
/* Bad usage of every command: exit code 2, nothing on stdout, and the exact message. */
#include "support/command.h"
#include "support/test.h"

#include <stdio.h>
#include <string.h>

static const struct {
    const char *line, *message;
} cases[] = {
    {"entrepot nosuch", "entrepot: unknown command 'nosuch' (see entrepot --help)\n"},
    {"entrepot --nosuch", "entrepot: unknown command '--nosuch' (see entrepot --help)\n"},
    {"entrepot bench", "entrepot bench: a word is missing; it is followed by one of: ep\n"},
    {"entrepot bench nosuch",
     "entrepot bench: unknown word 'nosuch'; it is followed by one of: ep\n"},
    /* the parser, on one command for all */
    {"entrepot info --nosuch",
     "entrepot info: unknown option '--nosuch' (see entrepot info --help)\n"},
    {"entrepot info -x", "entrepot info: unknown option '-x' (see entrepot info --help)\n"},
    {"entrepot info word", "entrepot info: unexpected word 'word' (see entrepot info --help)\n"},
    {"entrepot info --json=yes",
     "entrepot info: --json takes no value, but 'yes' was given (see entrepot info --help)\n"},
    {"entrepot demo --ranks",
     "entrepot demo: --ranks needs a value: an integer in 1..64 (see entrepot demo --help)\n"},
    {"entrepot demo --ranks=",
     "entrepot demo: --ranks is ''; it can be an integer in 1..64 (see entrepot demo --help)\n"},
    {"entrepot demo --ranks 0",
     "entrepot demo: --ranks is '0'; it can be an integer in 1..64 (see entrepot demo --help)\n"},
    {"entrepot demo --ranks 65",
     "entrepot demo: --ranks is '65'; it can be an integer in 1..64 (see entrepot demo --help)\n"},
    {"entrepot demo --ranks 2x",
     "entrepot demo: --ranks is '2x'; it can be an integer in 1..64 (see entrepot demo --help)\n"},
    {"entrepot demo --ranks 1e1",
     "entrepot demo: --ranks is '1e1'; it can be an integer in 1..64 (see entrepot demo --help)\n"},
    {"entrepot demo --ranks +2",
     "entrepot demo: --ranks is '+2'; it can be an integer in 1..64 (see entrepot demo --help)\n"},
    {"entrepot demo --ranks 99999999999999999999",
     "entrepot demo: --ranks is '99999999999999999999'; it can be an integer in 1..64 (see "
     "entrepot "
     "demo --help)\n"},
    {"entrepot demo --tokens 0", "entrepot demo: --tokens is '0'; it can be an integer in 1..4096 "
                                 "(see entrepot demo --help)\n"},
    {"entrepot demo --backend gpu",
     "entrepot demo: --backend is 'gpu'; it can be cpu or cuda (see entrepot demo --help)\n"},
    {"entrepot demo --mps",
     "entrepot demo: --mps is given without --backend cuda (see entrepot demo --help)\n"},
    {"entrepot bench ep --mps",
     "entrepot bench ep: --mps is given without --backend cuda (see entrepot bench ep --help)\n"},
    {"entrepot run -n 2 --grace -1 -- true",
     "entrepot run: --grace is '-1'; it can be a number in 0..86400 (see entrepot run --help)\n"},
    {"entrepot run -n 2 --grace nan -- true",
     "entrepot run: --grace is 'nan'; it can be a number in 0..86400 (see entrepot run --help)\n"},
    {"entrepot run -- true",
     "entrepot run: -n R is missing: the number of ranks, 1..1024 (see entrepot run --help)\n"},
    {"entrepot run -n 2", "entrepot run: PROGRAM is missing (see entrepot run --help)\n"},
    {"entrepot run -n 1025 -- true", "entrepot run: --ranks is '1025'; it can be an integer in "
                                     "1..1024 (see entrepot run --help)\n"},
    {"entrepot bench ep --mode fast", "entrepot bench ep: --mode is 'fast'; it can be normal or ll "
                                      "(see entrepot bench ep --help)\n"},
    {"entrepot bench ep --wire fp9",
     "entrepot bench ep: --wire is 'fp9'; it can be bf16 or fp8 (see entrepot bench ep --help)\n"},
    {"entrepot bench ep --ranks-as fibres", "entrepot bench ep: --ranks-as is 'fibres'; it can be "
                                            "processes or threads (see entrepot bench "
                                            "ep --help)\n"},
    {"entrepot bench ep --baseline nccl",
     "entrepot bench ep: --baseline is 'nccl'; it can be none or mpi (see entrepot bench ep "
     "--help)\n"},
    {"entrepot bench ep --hidden 12",
     "entrepot bench ep: --hidden is '12'; it can be a multiple of "
     "8 (see entrepot bench ep --help)\n"},
    {"entrepot bench ep --ranks 3",
     "entrepot bench ep: --experts is '256'; it can be a multiple of "
     "--ranks (see entrepot bench ep --help)\n"},
    {"entrepot bench ep --ranks 1 --experts 4",
     "entrepot bench ep: --topk is '8'; it can be at most --experts (see entrepot bench ep "
     "--help)\n"},
    {"entrepot bench ep --iters 0",
     "entrepot bench ep: --iters is '0'; it can be an integer in 1..1000000 (see entrepot bench ep "
     "--help)\n"},
    {"entrepot bench ep --sms 4",
     "entrepot bench ep: --sms is given without --backend cuda (see entrepot bench ep --help)\n"},
    {"entrepot bench ep --backend cuda --threads 2",
     "entrepot bench ep: --threads is given with --backend cuda, which uses none (see entrepot "
     "bench ep --help)\n"},
    {"entrepot bench ep --plan-layer 1",
     "entrepot bench ep: --plan-layer is given without --plan (see entrepot bench ep --help)\n"},
    {"entrepot bench ep --backend cuda --iters 1366",
     "entrepot bench ep: --iters is '1366'; it can be at most 1365 with --backend cuda (see "
     "entrepot bench ep --help)\n"},
    {"entrepot bench ep --backend cuda --warmup 1366",
     "entrepot bench ep: --warmup is '1366'; it can be at most 1365 with --backend cuda (see "
     "entrepot bench ep --help)\n"},
    {"entrepot bench ep --threads 257",
     "entrepot bench ep: --threads is '257'; it can be an integer in 0..256 (see entrepot bench ep "
     "--help)\n"},
    {"entrepot bench ep --seed -1",
     "entrepot bench ep: --seed is '-1'; it can be an integer in 0..9223372036854775807 (see "
     "entrepot bench ep --help)\n"},
    {"entrepot bench ep --trace /nonexistent",
     "entrepot bench ep: --trace /nonexistent: No such file or directory\n"},
    {"entrepot bench ep --trace /dev/null", "entrepot bench ep: --trace /dev/null: line 1, column "
                                            "1: the trace is empty; it needs at least one token\n"},
};

static void bad_usage_is_named(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        command_result r = command_line(cases[i].line);
        assert_string_equal(r.err, cases[i].message);
        assert_string_equal(r.out, "");
        assert_int_equal(r.code, 2);
        command_free(&r);
    }
}

static void help_goes_to_stdout(void **state)
{
    (void)state;
    static const char *const commands[] = {"",     " info",     " demo",
                                           " run", " bench ep", " plan pipeline"};
    for (size_t i = 0; i < sizeof commands / sizeof commands[0]; i++) {
        char line[64], usage[64];
        snprintf(line, sizeof line, "entrepot%s --help", commands[i]);
        snprintf(usage, sizeof usage, "Usage: entrepot%s ", commands[i]);
        command_result r = command_line(line);
        assert_int_equal(r.code, 0);
        assert_int_equal(strncmp(r.out, usage, strlen(usage)), 0);
        assert_string_equal(r.err, "");
        command_free(&r);
    }
}

static void no_command_prints_usage_to_stderr(void **state)
{
    (void)state;
    command_result r = command_line("entrepot");
    assert_int_equal(r.code, 2);
    assert_string_equal(r.out, "");
    assert_int_equal(strncmp(r.err, "Usage: entrepot COMMAND", 23), 0);
    command_free(&r);
}

static void a_full_disk_is_a_run_time_failure(void **state)
{
    (void)state;
    const char *const argv[] = {"sh", "-c", EP_COMMAND " info --json > /dev/full", NULL};
    command_result r = command_run(argv);
    assert_int_equal(r.code, 3);
    command_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bad_usage_is_named),
        cmocka_unit_test(help_goes_to_stdout),
        cmocka_unit_test(no_command_prints_usage_to_stderr),
        cmocka_unit_test(a_full_disk_is_a_run_time_failure),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
