/* SPDX-License-Identifier: MIT */
/* `entrepot plan eplb` as scripts see it: output, exit codes, messages, the drawing. */
#include "support/random.h"
#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static char output[1 << 18], folder[] = "/tmp/ep-eplb-XXXXXX";

/* Two layers of four experts. */
static const char load_text[] = "{\"logical_count\": [[8, 1, 1, 2], [1, 1, 9, 1]]}\n";

static void write_file(const char *name, const void *text, size_t size)
{
    char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(text, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

static int set_up(void **state)
{
    (void)state;
    if (!mkdtemp(folder))
        return -1;
    write_file("load.json", load_text, sizeof load_text - 1);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    char line[128];
    snprintf(line, sizeof line, "rm -r '%s'", folder);
    return system(line);
}

/* Runs the command in the folder; `stream` says what is kept: "2>/dev/null" or "2>&1 >/dev/null".
 */
static int run_keeping(const char *stream, const char *arguments)
{
    char line[1024];
    snprintf(line, sizeof line, "cd '%s' && '%s' plan eplb %s %s", folder, EP_COMMAND, arguments,
             stream);
    FILE *pipe = popen(line, "r");
    assert_non_null(pipe);
    size_t length = fread(output, 1, sizeof output - 1, pipe);
    output[length] = '\0';
    int status = pclose(pipe);
    assert_true(WIFEXITED(status));
    return WEXITSTATUS(status);
}

static int run(const char *arguments)
{
    return run_keeping("2>/dev/null", arguments);
}

/* Exit code 2 and this on standard error. */
static void misused(const char *arguments, const char *message)
{
    assert_int_equal(run_keeping("2>&1 >/dev/null", arguments), 2);
    if (!strstr(output, message))
        fail_msg("%s: %s is not in: %s", arguments, message, output);
}

static void prints_the_plan(void **state)
{
    (void)state;
    static const char plan[] =
        "{\"policy\": \"reference\", \"layers\": 1, \"experts\": 4, \"replicas\": 6, "
        "\"groups\": 1, \"nodes\": 1, \"gpus\": 2, \"windows\": 1, "
        "\"balancedness_before\": 0.6, \"balancedness\": 0.857142857, \"moves\": 4, "
        "\"duplicates\": 1, \"duplicates_unavoidable\": 0, "
        "\"phy2log\": [[2, 2, 3, 2, 0, 1]], \"logcnt\": [[1, 1, 3, 1]], "
        "\"log2phy\": [[[4, -1, -1], [5, -1, -1], [0, 3, 1], [2, -1, -1]]]}\n";
    assert_int_equal(run("--load load.json --replicas 6 --gpus 2 --layers 1:2 --json"), 0);
    assert_string_equal(output, plan);
    assert_int_equal(run("--load load.json --replicas 6 --gpus 2 --layers 1: --groups 2 --nodes 2"),
                     0);
    assert_non_null(strstr(output, "\"phy2log\": [[1, 0, 0, 2, 2, 3]]"));
    /* The summary goes to standard error, and not with --json. */
    assert_int_equal(run_keeping("2>&1 >/dev/null", "--load load.json --replicas 6 --gpus 2"), 0);
    assert_string_equal(output, "reference: balancedness 0.6333 before, 0.9023 after; 7 replicas "
                                "to fetch, 2 duplicates on one GPU\n");
    assert_int_equal(
        run_keeping("2>&1 >/dev/null", "--load load.json --replicas 6 --gpus 2 --json"), 0);
    assert_string_equal(output, "");
}

static void follows_a_current_placement(void **state)
{
    (void)state;
    static const char now[] = "{\"phy2log\": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]]}";
    write_file("now.json", now, sizeof now - 1);
    assert_int_equal(run("--load load.json --replicas 6 --gpus 2 --policy incremental "
                         "--current now.json --max-moves 1 --json"),
                     0);
    assert_non_null(strstr(output, "\"moves\": 1,"));
    assert_non_null(strstr(output, "\"phy2log\": [[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 2, 1]]"));
    assert_non_null(strstr(output, "\"move_list\": [{\"layer\": 1, \"slot\": 4, \"expert\": 2, "
                                   "\"source\": 2}]"));
    misused("--load load.json --replicas 6 --gpus 2 --policy incremental --max-moves 1",
            "--policy incremental needs --current");
    misused("--load load.json --replicas 6 --gpus 2 --policy incremental --current now.json",
            "--policy incremental needs --max-moves");
    misused("--load load.json --replicas 6 --gpus 2 --max-moves 1",
            "--max-moves goes with --policy incremental");
    misused("--load load.json --layers :1 --replicas 6 --gpus 2 --current now.json",
            "now.json: expected 1 layers of 6 slots, found 2 of 6");
    static const char bad[] = "{\"phy2log\":\n [[0, 1, 2, 4, 0, 1], [0, 1, 2, 3, 0, 1]]}";
    write_file("bad.json", bad, sizeof bad - 1);
    misused("--load load.json --replicas 6 --gpus 2 --current bad.json",
            "bad.json: line 2, column 13: expected a whole number in 0..3, found 4");
}

static void takes_several_windows(void **state)
{
    (void)state;
    static const char other[] = "{\"logical_count\": [[1, 8, 2, 1], [9, 1, 1, 1]]}";
    write_file("other.json", other, sizeof other - 1);
    assert_int_equal(run("--load load.json --load other.json --replicas 6 --gpus 2 "
                         "--policy windows --json"),
                     0);
    assert_non_null(strstr(output, "\"windows\": 2"));
    assert_non_null(strstr(output, "\"duplicates\": 0"));
    static const char narrow[] = "{\"logical_count\": [[1, 8], [9, 1]]}";
    write_file("narrow.json", narrow, sizeof narrow - 1);
    misused("--load load.json --load narrow.json --replicas 6 --gpus 2",
            "narrow.json: expected 2 layers of 4 experts as in the first file, found 2 of 2");
}

static void names_what_is_wrong(void **state)
{
    (void)state;
    misused("--replicas 6 --gpus 2", "--load is missing");
    misused("--load load.json --gpus 2", "--replicas is missing");
    misused("--load load.json --replicas 6", "--gpus is missing");
    misused("--load load.json --replicas 6 --gpus 0", "--gpus is '0'; it can be an integer in 1..");
    misused("--load load.json --replicas 6 --gpus 2 --policy best",
            "--policy is 'best'; it can be reference, refine, unique, windows or incremental");
    misused("--load load.json --replicas 6 --gpus 4",
            "gpus is 4, which does not divide replicas, 6");
    misused("--load load.json --replicas 3 --gpus 3", "replicas is 3, allowed: 4..");
    misused("--load load.json --replicas 6 --gpus 2 --layers 1:1",
            "--layers is '1:1'; it can be A:B with 0 <= A < B <= 2, the rows of the file");
    misused("--load load.json --replicas 6 --gpus 2 --layers 3", "--layers is '3'");
    misused("--load missing.json --replicas 6 --gpus 2", "missing.json: No such file or directory");
    misused("--load . --replicas 6 --gpus 2", ".: Is a directory");
    assert_int_equal(run("--load load.json --replicas 6 --gpus 2 --svg no/such/folder.svg"), 3);
    assert_int_equal(run("--help"), 0);
    assert_non_null(strstr(output, "--max-moves N"));
}

/* Every mutation of the file is either a plan or an error that names its place. */
static void names_the_place_in_mutated_files(void **state)
{
    (void)state;
    static const char splices[] = "{}[]\",:-.e0919 \n";
    struct rng rng;
    rng_seed(&rng, rng_env_seed(6));
    for (int round = 0; round < 60; round++) {
        char text[128];
        size_t size = sizeof load_text - 1, at = (size_t)rng_below(&rng, size);
        memcpy(text, load_text, size);
        switch (rng_below(&rng, 3)) {
        case 0:
            text[at] = splices[rng_below(&rng, sizeof splices - 1)];
            break;
        case 1:
            text[at] = (char)rng_below(&rng, 256);
            break;
        default:
            size = at;
        }
        write_file("mutated.json", text, size);
        int code =
            run_keeping("2>&1 >/dev/null", "--load mutated.json --replicas 6 --gpus 2 --json");
        if (code == 0)
            assert_string_equal(output, "");
        else if (code != 2 || !strstr(output, "mutated.json: line ") ||
                 !strstr(output, ": expected "))
            fail_msg("round %d: exit code %d, %s", round, code, output);
    }
}

static void draws_both_placements(void **state)
{
    (void)state;
    assert_int_equal(run("--load load.json --replicas 6 --gpus 2 --svg plan.svg --json"), 0);
    char line[128];
    snprintf(line, sizeof line, "cat '%s/plan.svg'", folder);
    FILE *pipe = popen(line, "r");
    assert_non_null(pipe);
    output[fread(output, 1, sizeof output - 1, pipe)] = '\0';
    assert_int_equal(pclose(pipe), 0);
    assert_non_null(strstr(output, "4 experts in 6 slots on 2 GPUs"));
    assert_non_null(strstr(output, "balancedness 0.6333"));
    assert_non_null(strstr(output, "balancedness 0.9023"));
    /* Loads of layer 1 before: 2 and 10 of a mean of 6. */
    assert_non_null(strstr(output, ">0.33</text>"));
    assert_non_null(strstr(output, ">1.67</text>"));
    assert_non_null(strstr(output, "</svg>"));
}

int main(void)
{
    if (access(EP_COMMAND, X_OK) != 0) {
        print_message("skipped: built without the command\n");
        return 0;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(prints_the_plan),
        cmocka_unit_test(follows_a_current_placement),
        cmocka_unit_test(takes_several_windows),
        cmocka_unit_test(names_what_is_wrong),
        cmocka_unit_test(names_the_place_in_mutated_files),
        cmocka_unit_test(draws_both_placements),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
