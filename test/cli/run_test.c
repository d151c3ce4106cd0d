/* SPDX-License-Identifier: MIT */
/* entrepot run: environment, exit codes, prefixes, signals, and that nothing outlives it. */
#include "support/command.h"
#include "support/test.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static command_result run_shell(const char *options, const char *script)
{
    char line[256];
    const char *argv[16];
    int argc = 0;
    argv[argc++] = EP_COMMAND;
    argv[argc++] = "run";
    snprintf(line, sizeof line, "%s", options);
    for (char *word = strtok(line, " "); word && argc < 11; word = strtok(NULL, " "))
        argv[argc++] = word;
    argv[argc++] = "--";
    argv[argc++] = "sh";
    argv[argc++] = "-c";
    argv[argc++] = script;
    argv[argc] = NULL;
    return command_run(argv);
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void ranks_find_themselves(void **state)
{
    (void)state;
    command_result r =
        run_shell("-n 3", "[ ${#EP_JOB} = 32 ] && echo $EP_RANK/$EP_NUM_RANKS/$EP_JOB");
    assert_int_equal(r.code, 0);
    assert_string_equal(r.err, "");
    assert_int_equal(strlen(r.out), 3 * 37);
    const char *job = strchr(r.out, '/') + 3;
    for (int rank = 0; rank < 3; rank++) {
        char expected[40];
        snprintf(expected, sizeof expected, "%d/3/%.32s\n", rank, job);
        assert_non_null(strstr(r.out, expected));
    }
    command_result again = run_shell("-n 1", "echo $EP_JOB");
    assert_int_not_equal(strncmp(again.out, job, 32), 0);
    command_free(&again);
    command_free(&r);
}

static void lines_get_prefixes(void **state)
{
    (void)state;
    command_result r = run_shell("-n 2 --prefix", "echo a; echo b >&2; printf end");
    assert_int_equal(r.code, 0);
    for (int rank = 0; rank < 2; rank++) {
        static const char *const lines[] = {"a", "end"};
        char expected[16];
        for (int i = 0; i < 2; i++) {
            snprintf(expected, sizeof expected, "[%d] %s\n", rank, lines[i]);
            assert_non_null(strstr(r.out, expected));
        }
        snprintf(expected, sizeof expected, "[%d] b\n", rank);
        assert_non_null(strstr(r.err, expected));
    }
    assert_int_equal(strlen(r.out), 2 * strlen("[0] a\n[0] end\n"));
    command_free(&r);
}

static void long_lines_are_cut_and_nothing_is_lost(void **state)
{
    (void)state;
    command_result r =
        run_shell("-n 1 --prefix", "head -c 100000 /dev/zero | tr '\\0' x; echo; echo y");
    assert_int_equal(r.code, 0);
    size_t letters = 0;
    for (const char *c = r.out; *c; c++)
        letters += *c == 'x';
    assert_int_equal(letters, 100000);
    assert_non_null(strstr(r.out, "\n[0] y\n"));
    command_free(&r);
}

static void rank_0_reads_standard_input(void **state)
{
    (void)state;
    const char *const argv[] = {"sh", "-c", "echo word | " EP_COMMAND " run -n 2 --prefix -- cat",
                                NULL};
    command_result r = command_run(argv);
    assert_int_equal(r.code, 0);
    assert_string_equal(r.out, "[0] word\n");
    command_free(&r);
}

static void the_first_failure_decides(void **state)
{
    (void)state;
    command_result r = run_shell(
        "-n 3 --keep-going", "case $EP_RANK in 0) sleep 0.6; exit 7;; 1) sleep 0.2; exit 9;; esac");
    assert_int_equal(r.code, 9);
    assert_string_equal(r.err, "entrepot run: rank 1 exited with code 9\n"
                               "entrepot run: rank 0 exited with code 7\n");
    command_free(&r);
}

static void a_signal_is_named(void **state)
{
    (void)state;
    command_result r = run_shell("-n 2", "[ $EP_RANK = 1 ] && kill -SEGV $$; exit 0");
    assert_int_equal(r.code, 128 + SIGSEGV);
    assert_string_equal(r.err,
                        "entrepot run: rank 1 was ended by signal 11 (Segmentation fault)\n");
    command_free(&r);
}

static void the_others_are_ended_after_the_grace(void **state)
{
    (void)state;
    double start = seconds();
    command_result r = run_shell("-n 3 --grace 0.3", "[ $EP_RANK = 1 ] && exit 5; exec sleep 50");
    assert_int_equal(r.code, 5);
    assert_string_equal(r.err, "entrepot run: rank 1 exited with code 5\n");
    assert_true(seconds() - start > 0.25 && seconds() - start < 20);
    command_free(&r);
}

static void those_that_ignore_the_request_are_killed(void **state)
{
    (void)state;
    command_result r = run_shell(
        "-n 2 --grace 0.1", "[ $EP_RANK = 1 ] && { sleep 0.3; exit 5; }; trap '' TERM; sleep 50");
    assert_int_equal(r.code, 5);
    command_free(&r);
}

static void a_program_that_is_not_there_is_named(void **state)
{
    (void)state;
    command_result r = command_line("entrepot run -n 4 -- /nonexistent/program");
    assert_int_equal(r.code, 3);
    assert_string_equal(r.err,
                        "entrepot run: rank 0: /nonexistent/program: No such file or directory\n");
    command_free(&r);
}

static void json_keeps_stdout_to_itself(void **state)
{
    (void)state;
    command_result r = run_shell("-n 2 --json --grace 9", "echo word; exit $EP_RANK");
    assert_int_equal(r.code, 1);
    assert_true(json_is_one_value(r.out));
    assert_int_equal((int)json_number(r.out, "exit_code"), 1);
    assert_int_equal((int)json_number(r.out, "ranks"), 2);
    assert_null(strstr(r.out, "word"));
    assert_non_null(strstr(r.err, "word\n"));
    command_free(&r);
}

/* ------------------------------------------------------- nothing outlives it */

/* Starts a job whose ranks write their process ids to `path`, and waits for `count` of them. */
static pid_t start_job(const char *path, const char *script, int count, pid_t *pids)
{
    char command[512];
    snprintf(command, sizeof command, "echo $$ >> %s; %s", path, script);
    pid_t job = fork();
    assert_true(job >= 0);
    if (job == 0) {
        execl(EP_COMMAND, "entrepot", "run", "-n", "2", "--grace", "0.2", "--", "sh", "-c", command,
              (char *)NULL);
        _exit(127);
    }
    for (int tries = 0; tries < 2000; tries++) {
        FILE *file = fopen(path, "r");
        int found = 0;
        while (file && found < count && fscanf(file, "%d", &pids[found]) == 1)
            found++;
        if (file)
            fclose(file);
        if (found == count)
            return job;
        usleep(10000);
    }
    fail_msg("ranks did not start");
    return -1;
}

/* Whether the process ends within ten seconds. A zombie that nobody reaps has ended. */
static bool ends(pid_t pid)
{
    for (int tries = 0; tries < 1000; tries++) {
        char path[64], state = 0;
        if (kill(pid, 0) && errno == ESRCH)
            return true;
        snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
        FILE *file = fopen(path, "r");
        if (!file)
            return true;
        if (fscanf(file, "%*d (%*[^)]) %c", &state) != 1)
            state = 0;
        fclose(file);
        if (state == 'Z')
            return true;
        usleep(10000);
    }
    return false;
}

static void check_ends(const char *script, int signal, int count, int expected_code)
{
    char path[] = "/tmp/ep-run-test-XXXXXX";
    pid_t pids[4];
    int fd = mkstemp(path), status = 0;
    assert_true(fd >= 0);
    close(fd);
    pid_t job = start_job(path, script, count, pids);
    assert_int_equal(kill(job, signal), 0);
    assert_int_equal(waitpid(job, &status, 0), job);
    for (int i = 0; i < count; i++)
        assert_true(ends(pids[i]));
    assert_int_equal(WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status),
                     expected_code);
    unlink(path);
}

static void ranks_die_with_a_killed_run(void **state)
{
    (void)state;
    check_ends("exec sleep 60", SIGKILL, 2, 128 + SIGKILL);
}

static void signals_are_passed_on(void **state)
{
    (void)state;
    check_ends("exec sleep 60", SIGTERM, 2, 128 + SIGTERM);
    check_ends("trap 'exit 0' USR1; while :; do sleep 0.05; done", SIGUSR1, 2, 0);
}

static void ranks_that_ignore_signals_are_killed(void **state)
{
    (void)state;
    check_ends("trap '' TERM; while :; do sleep 0.05; done", SIGTERM, 2, 128 + SIGKILL);
}

static void what_ranks_leave_behind_is_ended(void **state)
{
    (void)state;
    char path[] = "/tmp/ep-run-test-XXXXXX", script[128];
    int fd = mkstemp(path), pid = 0;
    assert_true(fd >= 0);
    close(fd);
    snprintf(script, sizeof script, "sleep 60 & echo $! > %s", path);
    command_result r = run_shell("-n 1", script);
    assert_int_equal(r.code, 0);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    assert_int_equal(fscanf(file, "%d", &pid), 1);
    fclose(file);
    assert_true(ends(pid));
    unlink(path);
    command_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(ranks_find_themselves),
        cmocka_unit_test(lines_get_prefixes),
        cmocka_unit_test(long_lines_are_cut_and_nothing_is_lost),
        cmocka_unit_test(rank_0_reads_standard_input),
        cmocka_unit_test(the_first_failure_decides),
        cmocka_unit_test(a_signal_is_named),
        cmocka_unit_test(the_others_are_ended_after_the_grace),
        cmocka_unit_test(those_that_ignore_the_request_are_killed),
        cmocka_unit_test(a_program_that_is_not_there_is_named),
        cmocka_unit_test(json_keeps_stdout_to_itself),
        cmocka_unit_test(ranks_die_with_a_killed_run),
        cmocka_unit_test(signals_are_passed_on),
        cmocka_unit_test(ranks_that_ignore_signals_are_killed),
        cmocka_unit_test(what_ranks_leave_behind_is_ended),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
