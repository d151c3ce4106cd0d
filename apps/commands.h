/* SPDX-License-Identifier: MIT */
/* The commands. Each gets its own name as argv[0] and returns an exit code of exit.h. */
#ifndef APPS_COMMANDS_H
#define APPS_COMMANDS_H

int cmd_info(int argc, char **argv);
int cmd_demo(int argc, char **argv);
int cmd_bench_ep(int argc, char **argv);
int cmd_plan_eplb(int argc, char **argv);
int cmd_plan_pipeline(int argc, char **argv);
int cmd_run(int argc, char **argv);

#endif
