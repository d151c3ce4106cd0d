/* SPDX-License-Identifier: MIT */
/* entrepot run: starts local ranks of a program. */
#include "child.h"
#include "commands.h"
#include "exit.h"
#include "job.h"
#include "json.h"
#include "options.h"

#include <stdio.h>
#include <stdlib.h>

static bool print_json(const job_rank *ranks, int num_ranks, const char *id, int code)
{
    json j;
    json_start(&j, stdout);
    json_open_object(&j, NULL);
    json_text(&j, "job", id);
    json_integer(&j, "ranks", num_ranks);
    json_integer(&j, "exit_code", code);
    json_open_array(&j, "results");
    for (int r = 0; r < num_ranks; r++) {
        json_open_object(&j, NULL);
        json_integer(&j, "rank", r);
        if (ranks[r].code < 0)
            json_null(&j, "exit_code"); /* never started */
        else
            json_integer(&j, "exit_code", ranks[r].code);
        json_integer(&j, "signal", ranks[r].signal);
        json_close_object(&j);
    }
    json_close_array(&j);
    json_close_object(&j);
    return json_finish(&j);
}

int cmd_run(int argc, char **argv)
{
    int64_t num_ranks = 0;
    bool given = false, as_json = false;
    job_config config = {.name = "entrepot run", .grace_seconds = 5};
    const option table[] = {
        {"ranks", "R", OPTION_KIND_INTEGER, &num_ranks, 1, 1024, 0, 0, NULL, "ranks to start",
         &given, 'n'},
        OPTION_SWITCH("prefix", &config.prefix, "begin each line of output with [RANK]"),
        OPTION_SWITCH("keep-going", &config.keep_going,
                      "let the others run on when a rank has failed"),
        OPTION_REAL("grace", "SECONDS", &config.grace_seconds, 0, 86400,
                    "time the others get to end by themselves after that, default 5"),
        OPTION_SWITCH("json", &as_json,
                      "one JSON object on standard output; what ranks print goes to stderr"),
    };
    const options_spec spec = {
        "entrepot run",
        "-n R [options] -- PROGRAM ARGS",
        "Starts R ranks of PROGRAM on this machine, with EP_RANK, EP_NUM_RANKS and EP_JOB in\n"
        "their environment, where the library finds its rank. Rank 0 reads standard input.\n"
        "Signals are passed on. Exits with the code of the rank that failed first (128 + N when\n"
        "signal N ended it), 0 when none did, 3 when PROGRAM could not be started.",
        table,
        sizeof table / sizeof table[0],
        true};
    int code;
    int first = options_parse(&spec, argc, argv, &code);
    if (first < 0)
        return code;
    if (!given)
        return options_misuse(&spec, "-n R is missing: the number of ranks, 1..1024");
    if (first == argc)
        return options_misuse(&spec, "PROGRAM is missing");
    config.num_ranks = (int)num_ranks;
    config.program = argv + first;
    config.stdout_to_stderr = as_json;

    char id[JOB_ID_SIZE] = "";
    job_rank *ranks = calloc((size_t)num_ranks, sizeof *ranks);
    if (!ranks) {
        fprintf(stderr, "entrepot run: out of memory\n");
        return EXIT_RUNTIME;
    }
    code = job_run(&config, ranks, id);
    if (code < 0)
        code = EXIT_RUNTIME;
    if (as_json && !print_json(ranks, config.num_ranks, id, code))
        code = EXIT_RUNTIME;
    free(ranks);
    return code;
}
