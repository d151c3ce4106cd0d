/* SPDX-License-Identifier: MIT */
/* The example pipeline_mlp: gradients as in a sequential run, over threads and processes. */
#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define EXAMPLE EP_BINARY_DIR "/bin/example_pipeline_mlp"

/* Runs the command; every method must be reported, and as exact, but for those left out. */
static void assert_trains(const char *command, int methods)
{
    char line[256];
    int exact = 0, left_out = 0;
    FILE *pipe = popen(command, "r");
    assert_non_null(pipe);
    while (fgets(line, sizeof line, pipe)) {
        exact += strstr(line, "equal bit for bit") != NULL;
        left_out += strstr(line, "left out") != NULL;
    }
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_int_equal(exact, methods);
    assert_int_equal(left_out, 6 - methods);
}

static void threads_train_as_one(void **state)
{
    (void)state;
    assert_trains("'" EXAMPLE "' 1", 5);
    assert_trains("'" EXAMPLE "' 2", 6);
    assert_trains("'" EXAMPLE "' 3", 5);
    assert_trains("'" EXAMPLE "' 4", 6);
}

static void processes_train_as_one(void **state)
{
    (void)state;
    assert_trains("'" EP_COMMAND "' run -n 4 -- '" EXAMPLE "'", 6);
}

int main(void)
{
    if (access(EXAMPLE, X_OK) != 0 || access(EP_COMMAND, X_OK) != 0) {
        printf("skipped: built without the examples\n");
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(threads_train_as_one),
        cmocka_unit_test(processes_train_as_one),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
