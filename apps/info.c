/* SPDX-License-Identifier: MIT */
/* entrepot info: what this build and this machine have. */
#include "commands.h"
#include "exit.h"
#include "json.h"
#include "options.h"

#include "entrepot/status.h"

#include <stdio.h>
#include <unistd.h>

int cmd_info(int argc, char **argv)
{
    bool as_json = false;
    const option table[] = {OPTION_SWITCH("json", &as_json, "one JSON object on standard output")};
    const options_spec spec = {
        "entrepot info", "[--json]", "Shows what this build and machine have.", table, 1, false};
    int code;
    if (options_parse(&spec, argc, argv, &code) < 0)
        return code;
    if (!as_json) {
        printf("version  %s\ncores    %ld\n", ep_version(), sysconf(_SC_NPROCESSORS_ONLN));
        return EXIT_OK;
    }
    json j;
    json_start(&j, stdout);
    json_open_object(&j, NULL);
    json_text(&j, "version", ep_version());
    json_integer(&j, "cores", sysconf(_SC_NPROCESSORS_ONLN));
    json_close_object(&j);
    return json_finish(&j) ? EXIT_OK : EXIT_RUNTIME;
}
