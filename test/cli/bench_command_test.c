/* SPDX-License-Identifier: MIT */
/* ctest-timeout: 300 */
/* `entrepot bench ep` as scripts see it: keys, checks, traces, timelines, the baseline. */
#include "support/command.h"
#include "support/test.h"

#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static command_result bench(const char *options)
{
    char line[1024];
    snprintf(line, sizeof line, "entrepot bench ep --iters 2 --warmup 1 --check --json %s",
             options);
    return command_line(line);
}

static void the_keys_are_stable(void **state)
{
    (void)state;
    static const char *const numbers[] = {
        "ranks",      "tokens",    "hidden",      "topk",           "experts",
        "iters",      "seed",      "recv_tokens", "bytes_received", "dispatch_us",
        "combine_us", "layout_us", "dispatch",    "combine",        "combine_ordinary_us"};
    command_result r = bench("--ranks 2 --tokens 5 --hidden 64 --topk 2 --experts 4");
    assert_string_equal(r.err, "");
    assert_int_equal(r.code, 0);
    assert_true(json_is_one_value(r.out));
    for (size_t i = 0; i < sizeof numbers / sizeof numbers[0]; i++)
        assert_false(isnan(json_number(r.out, numbers[i])));
    assert_non_null(strstr(r.out, "\"mode\": \"normal\""));
    assert_non_null(strstr(r.out, "\"backend\": \"cpu\""));
    assert_non_null(strstr(r.out, "\"wire\": \"bf16\""));
    assert_non_null(strstr(r.out, "\"copy_limit_us\": {"));
    assert_non_null(strstr(r.out, "\"check\": \"ok\""));
    assert_true(json_number(r.out, "bytes_received") == 128 * json_number(r.out, "recv_tokens"));
    command_free(&r);
}

static void low_latency_adds_hooks(void **state)
{
    (void)state;
    command_result r = bench("--mode ll --ranks 2 --tokens 5 --hidden 64 --topk 2 --experts 4");
    assert_string_equal(r.err, "");
    assert_int_equal(r.code, 0);
    assert_non_null(strstr(r.out, "\"mode\": \"ll\""));
    assert_true(json_number(r.out, "recv_tokens") == 2 * 5 * 2); /* a row per token and expert */
    assert_true(json_number(r.out, "hook_send_us") > 0);
    assert_true(json_number(r.out, "hook_recv_us") > 0);
    assert_true(json_number(r.out, "round_trip_us") > 0);
    command_free(&r);
}

static void every_kind_of_run_passes_its_check(void **state)
{
    (void)state;
    static const char *const runs[] = {
        "--ranks 1 --tokens 3 --hidden 8 --topk 1 --experts 1",
        "--ranks 3 --tokens 7 --hidden 136 --topk 9 --experts 9",
        "--ranks 4 --tokens 33 --hidden 1000 --experts 64 --wire fp8",
        "--ranks 4 --tokens 33 --hidden 264 --experts 64 --wire fp8 --ranks-as threads",
        "--ranks 5 --tokens 20 --hidden 512 --experts 20 --ranks-as threads --threads 2",
        "--ranks 2 --tokens 40 --hidden 256 --threads 1",
        "--ranks 2 --tokens 0 --hidden 64",
        "--ranks 16 --tokens 9 --hidden 128 --seed 7",
        "--mode ll --ranks 1 --tokens 1 --hidden 8 --topk 1 --experts 1",
        "--mode ll --ranks 3 --tokens 7 --hidden 136 --topk 9 --experts 9 --wire fp8",
        "--mode ll --ranks 4 --tokens 16 --hidden 512 --wire fp8 --ranks-as threads",
        "--mode ll --ranks 2 --tokens 0 --hidden 64",
        "--mode ll --ranks 8 --tokens 12 --hidden 256 --threads 1",
    };
    for (size_t i = 0; i < sizeof runs / sizeof runs[0]; i++) {
        command_result r = bench(runs[i]);
        assert_string_equal(r.err, "");
        assert_int_equal(r.code, 0);
        assert_true(json_is_one_value(r.out));
        assert_non_null(strstr(r.out, "\"check\": \"ok\""));
        command_free(&r);
    }
}

static void the_seed_decides_the_routing(void **state)
{
    (void)state;
    const char *shape = "--ranks 4 --tokens 50 --hidden 8 --topk 2 --experts 32";
    char other[128];
    snprintf(other, sizeof other, "%s --seed 2", shape);
    command_result a = bench(shape), b = bench(shape), c = bench(other);
    double rows = json_number(a.out, "recv_tokens");
    assert_true(rows == json_number(b.out, "recv_tokens"));
    assert_true(rows != json_number(c.out, "recv_tokens"));
    command_free(&a);
    command_free(&b);
    command_free(&c);
}

static void a_trace_gives_the_routing(void **state)
{
    (void)state;
    char path[] = "/tmp/ep-bench-test-XXXXXX", options[256];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    FILE *file = fdopen(fd, "w");
    /* Three tokens for four on each of two ranks: it wraps around. Experts 0..1 are rank 0's. */
    fprintf(file, "0\t1\t0\t2\t\t.5\t.5\t.5\t.5\n-1\t-1\t\t0\t0\n");
    fclose(file);
    snprintf(options, sizeof options,
             "--ranks 2 --tokens 4 --hidden 64 --topk 2 --experts 4 --trace %s", path);
    command_result r = bench(options);
    assert_string_equal(r.err, "");
    assert_int_equal(r.code, 0);
    /* tokens 0 1 2 0 | 1 2 0 1 go to 1 2 0 1 | 2 0 1 2 ranks */
    assert_int_equal((int)json_number(r.out, "recv_tokens"), 9);
    command_free(&r);
    snprintf(options, sizeof options,
             "--ranks 2 --tokens 4 --hidden 64 --topk 2 --experts 2 --trace %s", path);
    r = bench(options);
    assert_int_equal(r.code, 2);
    assert_non_null(strstr(r.err, ": line 1, column 4: '2' is not an expert id in -1..1\n"));
    command_free(&r);
    unlink(path);
}

/* Two hot experts, both on rank 0 of two; the plan gives each a replica on either rank. */
static void a_plan_spreads_the_load(void **state)
{
    (void)state;
    char trace_path[] = "/tmp/ep-bench-test-XXXXXX", plan_path[] = "/tmp/ep-bench-plan-XXXXXX";
    char options[512];
    int trace_fd = mkstemp(trace_path), plan_fd = mkstemp(plan_path);
    assert_true(trace_fd >= 0 && plan_fd >= 0);
    assert_true(dprintf(trace_fd, "0\t\t1\n1\t\t1\n") > 0);
    assert_true(dprintf(plan_fd, "{\"phy2log\": [[3, 3, 3, 3, 3, 3], [0, 1, 2, 0, 1, 3]]}") > 0);
    close(trace_fd);
    close(plan_fd);
    snprintf(options, sizeof options,
             "--ranks 2 --tokens 20 --hidden 64 --topk 1 --experts 4 --trace %s --plan %s "
             "--plan-layer 1",
             trace_path, plan_path);
    command_result r = bench(options);
    assert_string_equal(r.err, "");
    assert_int_equal(r.code, 0);
    assert_true(json_is_one_value(r.out));
    assert_non_null(strstr(r.out, "\"check\": \"ok\""));
    const char *without = strstr(r.out, "\"without_plan\"");
    assert_non_null(without);
    assert_int_equal((int)json_number(r.out, "most_recv_tokens"), 20);
    assert_int_equal((int)json_number(r.out, "most_pairs"), 20);
    assert_int_equal((int)json_number(without, "most_recv_tokens"), 40);
    assert_int_equal((int)json_number(without, "most_pairs"), 40);
    command_free(&r);
    r = bench("--ranks 2 --experts 4 --topk 1 --plan /dev/null");
    assert_int_equal(r.code, 2);
    assert_string_equal(r.err, "entrepot bench ep: --plan /dev/null: line 1, column 1: "
                               "expected '{', found the end of the file\n");
    command_free(&r);
    unlink(trace_path);
    unlink(plan_path);
}

static void real_traces_pass(void **state)
{
    (void)state;
    static const char *const files[] = {"law/layer_01.tsv", "translation/layer_26.tsv"};
    for (int i = 0; i < 2; i++) {
        char path[512], options[640];
        snprintf(path, sizeof path, EP_TEST_DATA "/routing/%s", files[i]);
        if (access(path, R_OK))
            skip();
        snprintf(options, sizeof options,
                 "--ranks 8 --tokens 100 --hidden 64 --topk 6 --experts 64 --trace %s", path);
        command_result r = bench(options);
        assert_int_equal(r.code, 0);
        assert_non_null(strstr(r.out, "\"check\": \"ok\""));
        command_free(&r);
    }
}

static void the_timeline_is_a_chrome_trace(void **state)
{
    (void)state;
    char path[] = "/tmp/ep-bench-test-XXXXXX", options[256], text[65536];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    snprintf(options, sizeof options, "--ranks 2 --tokens 4 --hidden 64 --trace-out %s", path);
    command_result r = bench(options);
    assert_int_equal(r.code, 0);
    command_free(&r);
    ssize_t n = read(fd, text, sizeof text - 1);
    assert_true(n > 0);
    text[n] = 0;
    assert_true(json_is_one_value(text));
    int spans = 0;
    for (const char *p = text; (p = strstr(p, "\"ph\": \"X\"")); p++)
        spans++;
    assert_int_equal(spans, 2 * 2 * 5); /* ranks, iterations, phases */
    assert_true(json_number(text, "dur") >= 0);
    close(fd);
    unlink(path);
    r = bench("--ranks 1 --tokens 4 --hidden 64 --trace-out /nonexistent/file");
    assert_int_equal(r.code, 3);
    assert_string_equal(r.out, "");
    assert_string_equal(r.err, "entrepot bench ep: --trace-out /nonexistent/file: No such file or "
                               "directory\n");
    command_free(&r);
}

static void the_baseline_runs_or_says_why_not(void **state)
{
    (void)state;
    command_result info = command_line("entrepot info --json");
    bool present = strstr(info.out, "\"mpi_baseline\": true") != NULL;
    command_result r = bench("--ranks 2 --tokens 16 --hidden 64 --baseline mpi");
    if (present) {
        assert_int_equal(r.code, 0);
        assert_true(json_is_one_value(r.out));
        assert_true(json_number(r.out, "baseline_dispatch_us") > 0);
        assert_true(json_number(r.out, "baseline_combine_us") > 0);
        assert_true(json_number(r.out, "speedup_dispatch") > 0);
    } else {
        assert_int_equal(r.code, 3);
        assert_string_equal(r.out, "");
        assert_non_null(strstr(r.err, "MPI"));
    }
    command_free(&r);
    command_free(&info);
}

/* The first child of a process; waits for it to have one. */
static int first_child(pid_t pid)
{
    char path[64];
    int child = 0;
    snprintf(path, sizeof path, "/proc/%d/task/%d/children", (int)pid, (int)pid);
    for (int tries = 0; tries < 1000 && child == 0; tries++) {
        FILE *file = fopen(path, "r");
        if (!file || fscanf(file, "%d", &child) != 1)
            child = 0;
        if (file)
            fclose(file);
        usleep(10000);
    }
    return child;
}

static void a_killed_rank_is_named(void **state)
{
    (void)state;
    FILE *err = tmpfile();
    char text[1024];
    int status = 0;
    assert_non_null(err);
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        dup2(fileno(err), STDERR_FILENO);
        alarm(100);
        execl(EP_COMMAND, "entrepot", "bench", "ep", "--ranks", "3", "--experts", "9", "--hidden",
              "64", "--tokens", "64", "--iters", "1000000", "--json", (char *)NULL);
        _exit(127);
    }
    int child = first_child(pid);
    assert_true(child > 0);
    usleep(300000); /* anywhere: while the group is made, or in the middle of a call */
    assert_int_equal(kill(child, SIGKILL), 0);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 3);
    rewind(err);
    text[fread(text, 1, sizeof text - 1, err)] = 0;
    fclose(err);
    assert_string_equal(text, "entrepot bench ep: rank 0: ended by signal 9 (Killed) "
                              "(EP_ERR_SYSTEM)\n");
}

static void plain_output_is_a_table(void **state)
{
    (void)state;
    command_result r =
        command_line("entrepot bench ep --iters 1 --warmup 0 --ranks 2 --tokens 4 --hidden 64");
    assert_int_equal(r.code, 0);
    assert_string_equal(r.err, "");
    assert_non_null(strstr(r.out, "normal mode on cpu: 2 ranks as processes"));
    assert_non_null(strstr(r.out, "check: skipped"));
    command_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_keys_are_stable),
        cmocka_unit_test(low_latency_adds_hooks),
        cmocka_unit_test(every_kind_of_run_passes_its_check),
        cmocka_unit_test(the_seed_decides_the_routing),
        cmocka_unit_test(a_trace_gives_the_routing),
        cmocka_unit_test(a_plan_spreads_the_load),
        cmocka_unit_test(real_traces_pass),
        cmocka_unit_test(the_timeline_is_a_chrome_trace),
        cmocka_unit_test(the_baseline_runs_or_says_why_not),
        cmocka_unit_test(a_killed_rank_is_named),
        cmocka_unit_test(plain_output_is_a_table),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
