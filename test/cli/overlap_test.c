/* SPDX-License-Identifier: MIT */
/* The example of overlapped micro-batches: its timeline and its trace file. */
#include "support/command.h"
#include "support/test.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if EP_HAVE_CJSON
#include <cjson/cJSON.h>

static void check_trace(const char *text)
{
    cJSON *trace = cJSON_Parse(text);
    assert_non_null(trace);
    int seen[2][2] = {{0, 0}, {0, 0}};
    const cJSON *event;
    cJSON_ArrayForEach(event, cJSON_GetObjectItem(trace, "traceEvents"))
    {
        if (strcmp(cJSON_GetObjectItem(event, "ph")->valuestring, "X") != 0)
            continue;
        int rank = cJSON_GetObjectItem(event, "pid")->valueint;
        int track = cJSON_GetObjectItem(event, "tid")->valueint;
        assert_in_range(rank, 0, 1);
        assert_in_range(track, 0, 1);
        assert_true(cJSON_GetObjectItem(event, "dur")->valuedouble > 0);
        seen[rank][track]++;
    }
    for (int i = 0; i < 4; i++)
        assert_true(seen[i / 2][i % 2] > 0);
    cJSON_Delete(trace);
}
#else
static void check_trace(const char *text)
{
    assert_non_null(strstr(text, "\"traceEvents\""));
}
#endif

static void two_batches_overlap(void **state)
{
    (void)state;
    static char text[1 << 20];
    char path[] = "/tmp/overlap_test_XXXXXX", line[512];
    int fd = mkstemp(path);
    assert_true(fd >= 0);
    close(fd);
    snprintf(line, sizeof line, "entrepot run -n 2 -- " EP_BINARY_DIR "/bin/example_overlap %s",
             path);
    command_result r = command_line(line);
    assert_string_equal(r.err, "");
    assert_int_equal(r.code, 0);
    assert_non_null(strstr(r.out, "attention"));
    assert_non_null(strstr(r.out, "expert"));
    assert_non_null(strstr(r.out, "ep_ll_dispatch: receive"));
    assert_non_null(strstr(r.out, "ep_ll_combine: receive"));
    command_free(&r);
    FILE *file = fopen(path, "r");
    assert_non_null(file);
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    unlink(path);
    check_trace(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(two_batches_overlap),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
