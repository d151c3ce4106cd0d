/* SPDX-License-Identifier: MIT */
/* Available memory read from made-up files. */
#include "transport/available.h"

#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define MIB (UINT64_C(1) << 20)

static char root[64];

/* Writes a file under the root, making its folders. */
static void put(const char *path, const char *text)
{
    char full[256];
    snprintf(full, sizeof full, "%s%s", root, path);
    for (char *slash = strchr(full + strlen(root) + 1, '/'); slash;
         slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(full, 0700);
        *slash = '/';
    }
    FILE *file = fopen(full, "w");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static uint64_t available(void)
{
    char proc[80], cgroup[80];
    snprintf(proc, sizeof proc, "%s/proc", root);
    snprintf(cgroup, sizeof cgroup, "%s/cg", root);
    return epi_memory_available(proc, cgroup);
}

static int begin(void **state)
{
    (void)state;
    strcpy(root, "/tmp/ep-available-XXXXXX");
    return mkdtemp(root) == NULL;
}

static int end(void **state)
{
    (void)state;
    char command[80];
    snprintf(command, sizeof command, "rm -r %s", root);
    return system(command) != 0;
}

static void knows_nothing(void **state)
{
    (void)state;
    assert_true(available() == UINT64_MAX);
}

static void takes_the_machine(void **state)
{
    (void)state;
    put("/proc/meminfo", "MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable:    2048 kB\n");
    assert_true(available() == 2 * MIB);
    put("/proc/self/cgroup", "9:pids:/x\n0::/\n");
    assert_true(available() == 2 * MIB); /* groups without limits */
}

static void takes_the_tightest_group(void **state)
{
    (void)state;
    put("/proc/meminfo", "MemAvailable: 1048576 kB\n");
    put("/proc/self/cgroup", "0::/a/b\n");
    put("/cg/a/b/memory.max", "max\n");
    put("/cg/a/b/memory.current", "5\n");
    assert_true(available() == 1024 * MIB);
    put("/cg/a/memory.max", "10485760\n");
    put("/cg/a/memory.current", "4194304\n");
    assert_true(available() == 6 * MIB);
    put("/cg/a/memory.stat", "anon 1\ninactive_file 1048576\nactive_file 7\n");
    assert_true(available() == 7 * MIB);
    put("/cg/a/b/memory.max", "1048576\n");
    put("/cg/a/b/memory.current", "2097152\n"); /* above its limit, as may be for a while */
    assert_true(available() == 0);
}

static void knows_the_first_version(void **state)
{
    (void)state;
    put("/proc/meminfo", "MemAvailable: 1048576 kB\n");
    put("/proc/self/cgroup", "7:cpu,memory:/of/the/host\n3:cpuset:/\n0::/\n");
    put("/cg/memory/memory.limit_in_bytes", "8388608\n"); /* only the top is mounted here */
    put("/cg/memory/memory.usage_in_bytes", "6291456\n");
    put("/cg/memory/memory.stat", "cache 9\ntotal_inactive_file 1048576\n");
    assert_true(available() == 3 * MIB);
    put("/cg/memory/memory.limit_in_bytes", "9223372036854771712\n"); /* how it says none */
    assert_true(available() == 1024 * MIB);
}

static void bears_garbage(void **state)
{
    (void)state;
    put("/proc/meminfo", "MemAvailable: kB\n");
    put("/proc/self/cgroup", "\n:\n::\n0:\n0::\n0::x\nmemory\n1:memory:/\n");
    put("/cg/memory/memory.limit_in_bytes", "\n");
    available();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(knows_nothing, begin, end),
        cmocka_unit_test_setup_teardown(takes_the_machine, begin, end),
        cmocka_unit_test_setup_teardown(takes_the_tightest_group, begin, end),
        cmocka_unit_test_setup_teardown(knows_the_first_version, begin, end),
        cmocka_unit_test_setup_teardown(bears_garbage, begin, end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
