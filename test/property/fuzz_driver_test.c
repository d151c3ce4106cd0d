/* SPDX-License-Identifier: MIT */
/* The fuzz driver finds a planted bug, keeps the input that shows it, and repeats it. */
#include "support/fuzz.h"
#include "support/test.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static int planted(const uint8_t *data, size_t size)
{
    return size >= 2 && memcmp(data, "no", 2) != 0 && memchr(data, '!', size) != NULL;
}

static const char *const seeds[] = {"name=value", "no!", NULL};
static const char *const words[] = {"!", NULL};
static const struct fuzz_target target = {"planted", planted, seeds, words, 64, NULL};

static int status_of(pid_t child)
{
    int status = 0;
    assert_int_equal(waitpid(child, &status, 0), child);
    return status;
}

static void finds_and_repeats_a_bug(void **state)
{
    (void)state;
    char name[] = "fuzz", path[64];
    char *search[] = {name, NULL}, *repeat[] = {name, path, NULL};
    pid_t child = fork();
    if (child == 0) {
        if (!freopen("/dev/null", "w", stderr))
            _exit(9);
        _exit(fuzz_run(&target, 1, search));
    }
    assert_int_equal(WTERMSIG(status_of(child)), SIGABRT);
    snprintf(path, sizeof path, "/tmp/ep-fuzz-planted-%d", (int)child);
    assert_int_equal(access(path, R_OK), 0);
    child = fork();
    if (child == 0)
        _exit(fuzz_run(&target, 2, repeat));
    assert_int_equal(WEXITSTATUS(status_of(child)), 1);
    unlink(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(finds_and_repeats_a_bug)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
