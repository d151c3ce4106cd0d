/* SPDX-License-Identifier: MIT */
#ifndef APPS_PLAN_EPLB_H
#define APPS_PLAN_EPLB_H

#include "entrepot/plan.h"

#include <stdio.h>

/* What is drawn: GPU loads [windows][layers][gpus] without the plan and with it. */
typedef struct eplb_figures {
    const ep_plan_config *config;
    const ep_plan_report *report;
    const char *before_title; /* what "before" is */
    int first_layer;          /* number of the first row in the file */
    const double *before, *after;
} eplb_figures;

/* Draws load per GPU and layer before and after, and each layer's slowest GPU. False when memory
 * is out. */
int eplb_svg(FILE *out, const eplb_figures *figures);

#endif
