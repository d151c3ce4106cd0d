/* SPDX-License-Identifier: MIT */
/* `entrepot plan pipeline` as scripts see it: output, exit codes, the drawing. */
#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char output[65536];

/* Runs the command with its standard error dropped; returns the exit code. */
static int run(const char *arguments)
{
    char line[1024];
    snprintf(line, sizeof line, "'%s' plan pipeline %s 2>/dev/null", EP_COMMAND, arguments);
    FILE *pipe = popen(line, "r");
    assert_non_null(pipe);
    size_t length = fread(output, 1, sizeof output - 1, pipe);
    output[length] = '\0';
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static void orders_are_printed(void **state)
{
    (void)state;
    assert_int_equal(run("--schedule dualpipe --ranks 2 --chunks 4"), 0);
    assert_string_equal(output, "0: F0.0 F1.0 F0.1 B1.0 (F1.1+B0.0) B1.1 I0.1 W0.1\n"
                                "1: F0.0 F1.0 F0.1 B1.0 (F1.1+B0.0) B1.1 I0.1 W0.1\n");
    assert_int_equal(run("--schedule 1f1b --ranks 2 --chunks 1 --json"), 0);
    assert_string_equal(output, "{\"schedule\": \"1f1b\", \"ranks\": 2, \"chunks\": 1, "
                                "\"stages\": 2, \"orders\": [\"F0.0 B0.0\", \"F0.0 B0.0\"]}\n");
}

static void simulation_is_json(void **state)
{
    (void)state;
    assert_int_equal(run("--schedule dualpipe --ranks 8 --chunks 20 --simulate --f 1 --b 2 --w 1 "
                         "--fb 3"),
                     0);
    assert_string_equal(output, "{\"schedule\": \"dualpipe\", \"ranks\": 8, \"chunks\": 20, "
                                "\"stages\": 8, \"makespan\": 66, \"bubble\": [6, 6, 6, 6, 6, 6, "
                                "6, 6], \"peak_activations\": [9, 9, 9, 9, 9, 9, 9, 9]}\n");
    /* F then comm, F, B, comm, B with rank 1 twice as slow. */
    assert_int_equal(run("--schedule 1f1b --ranks 2 --chunks 1 --simulate --f 1,2 --b 2,4 "
                         "--comm 0.5"),
                     0);
    assert_non_null(strstr(output, "\"makespan\": 10, \"bubble\": [7, 4]"));
}

static void choice_obeys_the_bound(void **state)
{
    (void)state;
    assert_int_equal(run("--choose --ranks 8 --chunks 24 --json"), 0);
    assert_non_null(strstr(output, "\"choice\": \"zbv\""));
    assert_int_equal(run("--choose --ranks 8 --chunks 24 --fb 2.5 --memory 9 --json"), 0);
    assert_non_null(strstr(output, "\"choice\": \"dualpipe\""));
    assert_int_equal(run("--choose --ranks 8 --chunks 24 --memory 7 --json"), 1);
    assert_non_null(strstr(output, "\"choice\": null"));
}

static void drawing_shows_every_operation(void **state)
{
    (void)state;
    char path[] = "/tmp/ep-pipeline-XXXXXX", arguments[128];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    snprintf(arguments, sizeof arguments, "--schedule zb1p --ranks 2 --chunks 3 --svg %s", path);
    assert_int_equal(run(arguments), 0);
    ssize_t length = read(fd, output, sizeof output - 1);
    assert_true(length > 0);
    output[length] = '\0';
    close(fd);
    unlink(path);
    /* Both ranks: 3 each of F, I and W, plus a swatch of each in the legend. */
    static const char *const fills[] = {"fill='#f7b267'", "fill='#a5d3dc'", "fill='#b9b3e3'"};
    for (int i = 0; i < 3; i++) {
        int found = 0;
        for (const char *at = output; (at = strstr(at, fills[i])); at++)
            found++;
        assert_int_equal(found, 7);
    }
    assert_non_null(strstr(output, "</svg>"));
}

static void bad_usage_is_2_and_a_bad_path_is_3(void **state)
{
    (void)state;
    static const char *const bad[] = {
        "",
        "--schedule dualpipe --ranks 7 --chunks 24",
        "--schedule gpipe --ranks 2 --chunks 2",
        "--schedule 1f1b --ranks 2",
        "--schedule 1f1b --ranks 0 --chunks 1",
        "--schedule 1f1b --ranks 2 --chunks 2 --memory 3",
        "--schedule 1f1b --ranks 2 --chunks 2 --f 2",
        "--schedule 1f1b --ranks 2 --chunks 2 --simulate --f 1,2,3",
        "--schedule 1f1b --ranks 2 --chunks 2 --simulate --f 1,",
        "--schedule 1f1b --ranks 2 --chunks 2 --simulate --w 3",
        "--schedule 1f1b --ranks 2 --chunks 2 --choose",
        "--choose --ranks 2 --chunks 2 --simulate",
        "--schedule 1f1b --ranks 2 --chunks 2 --frobnicate",
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(run(bad[i]), 2);
        assert_string_equal(output, "");
    }
    assert_int_equal(run("--schedule 1f1b --ranks 2 --chunks 2 --svg /nonexistent/x.svg"), 3);
    assert_int_equal(run("--help"), 0);
}

int main(void)
{
    if (access(EP_COMMAND, X_OK) != 0) {
        print_message("skipped: built without the command\n");
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(orders_are_printed),
        cmocka_unit_test(simulation_is_json),
        cmocka_unit_test(choice_obeys_the_bound),
        cmocka_unit_test(drawing_shows_every_operation),
        cmocka_unit_test(bad_usage_is_2_and_a_bad_path_is_3),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
