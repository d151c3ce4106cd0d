/* SPDX-License-Identifier: MIT */
/* entrepot: finds the command and hands over. */
#include "commands.h"
#include "exit.h"

#include "entrepot/status.h"

#include <stdio.h>
#include <string.h>

typedef struct command {
    const char *name; /* one or two words */
    const char *summary;
    int (*run)(int argc, char **argv);
} command;

static const command commands[] = {
    {"info", "devices, CPU features, transports and versions", cmd_info},
    {"demo", "a mixture-of-experts layer over ranks on this machine, checked", cmd_demo},
    {"bench ep", "time dispatch and combine", cmd_bench_ep},
    {"plan eplb", "expert placement from expert loads: plan, judge, draw", cmd_plan_eplb},
    {"plan pipeline", "pipeline schedules: print, simulate, draw, choose", cmd_plan_pipeline},
    {"run", "start local ranks of a program", cmd_run},
};

#define NUM_COMMANDS (sizeof commands / sizeof commands[0])

static void print_usage(FILE *out)
{
    fprintf(out, "Usage: entrepot COMMAND [options]\n\n"
                 "Expert-parallel dispatch and combine for mixture-of-experts models.\n\n"
                 "Commands:\n");
    for (size_t i = 0; i < NUM_COMMANDS; i++)
        fprintf(out, "  %-14s %s\n", commands[i].name, commands[i].summary);
    fprintf(out,
            "\nEvery command takes --help and --json. Exit codes: 0 success, 1 a check failed,\n"
            "2 bad usage, 3 the run failed.\n");
}

/* How many words of argv the command's name takes: 0 when it is another command. */
static int match(const command *c, int argc, char **argv)
{
    size_t first = strcspn(c->name, " ");
    if (strlen(argv[1]) != first || strncmp(argv[1], c->name, first) != 0)
        return 0;
    if (!c->name[first])
        return 1;
    return argc > 2 && strcmp(argv[2], c->name + first + 1) == 0 ? 2 : 0;
}

static int unknown_command(int argc, char **argv)
{
    size_t length = strlen(argv[1]);
    for (size_t i = 0; i < NUM_COMMANDS; i++) {
        const char *name = commands[i].name;
        if (strncmp(name, argv[1], length) == 0 && name[length] == ' ') {
            fprintf(stderr, "entrepot %s: %s%s%s; it is followed by one of:", argv[1],
                    argc > 2 ? "unknown word '" : "a word is missing", argc > 2 ? argv[2] : "",
                    argc > 2 ? "'" : "");
            for (size_t k = i; k < NUM_COMMANDS; k++) {
                if (strncmp(commands[k].name, name, length + 1) == 0)
                    fprintf(stderr, " %s", commands[k].name + length + 1);
            }
            fputc('\n', stderr);
            return EXIT_USAGE;
        }
    }
    fprintf(stderr, "entrepot: unknown command '%s' (see entrepot --help)\n", argv[1]);
    return EXIT_USAGE;
}

int main(int argc, char **argv)
{
    if (argc < 2) {
        print_usage(stderr);
        return EXIT_USAGE;
    }
    if (strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "help") == 0) {
        print_usage(stdout);
        return EXIT_OK;
    }
    if (strcmp(argv[1], "--version") == 0) {
        printf("entrepot %s\n", ep_version());
        return EXIT_OK;
    }
    for (size_t i = 0; i < NUM_COMMANDS; i++) {
        int words = match(&commands[i], argc, argv);
        if (words > 0)
            return commands[i].run(argc - words, argv + words);
    }
    return unknown_command(argc, argv);
}
