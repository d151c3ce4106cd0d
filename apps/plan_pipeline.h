/* SPDX-License-Identifier: MIT */
#ifndef EP_APPS_PLAN_PIPELINE_H
#define EP_APPS_PLAN_PIPELINE_H

#include "entrepot/schedule.h"

#include <stdio.h>

/* What a drawing shows beside the schedule. */
typedef struct pipeline_figures {
    double makespan;
    const double *bubble; /* [ranks] */
    const int32_t *peak;  /* [ranks] live activations */
    const double *start;  /* [operations of all ranks] */
    const double *end;
} pipeline_figures;

/* Draws a schedule: one row per rank over a time axis, as the papers do. */
void pipeline_svg(FILE *out, const ep_schedule *schedule, const pipeline_figures *figures);

#endif
