/* SPDX-License-Identifier: MIT */
/* The README's example, as its reader would run it. */
#include "support/command.h"
#include "support/test.h"

#include <stdio.h>
#include <string.h>

static void the_minimal_example_prints_what_it_says(void **state)
{
    (void)state;
    /* Token 1 goes to both ranks, token 0 once to rank 0 although two of its experts are there. */
    static const char *const lines[] = {
        "rank 0 received 4 rows; its tokens were 1 and 2 and are 10 and 40\n",
        "rank 1 received 2 rows; its tokens were 1 and 2 and are 10 and 40\n"};
    command_result r = command_line("entrepot run -n 2 -- " EP_BINARY_DIR "/bin/example_minimal");
    assert_string_equal(r.err, "");
    assert_int_equal(r.code, 0);
    for (int i = 0; i < 2; i++)
        assert_non_null(strstr(r.out, lines[i]));
    command_free(&r);
}

static char *read_file(const char *path)
{
    static char text[2][1 << 17];
    static int next;
    char *into = text[next++ & 1];
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    into[fread(into, 1, sizeof text[0] - 1, file)] = 0;
    fclose(file);
    return into;
}

static void the_readme_shows_this_very_program(void **state)
{
    (void)state;
    char *readme = read_file(EP_SOURCE_DIR "/README.md");
    char *program = strstr(read_file(EP_SOURCE_DIR "/examples/minimal.c"), "#include");
    char *shown = strstr(readme, "```c\n");
    assert_non_null(program);
    assert_non_null(shown);
    shown += strlen("```c\n");
    char *end = strstr(shown, "```");
    assert_non_null(end);
    *end = 0;
    assert_string_equal(shown, program);
}

static void a_wrong_number_of_ranks_is_explained(void **state)
{
    (void)state;
    command_result r = command_line("entrepot run -n 3 -- " EP_BINARY_DIR "/bin/example_minimal");
    assert_int_equal(r.code, 1);
    assert_non_null(strstr(r.err, "num_experts"));
    command_free(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_minimal_example_prints_what_it_says),
        cmocka_unit_test(the_readme_shows_this_very_program),
        cmocka_unit_test(a_wrong_number_of_ranks_is_explained),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
