/* SPDX-License-Identifier: MIT */
#ifndef EPI_PLAN_PIPELINE_H
#define EPI_PLAN_PIPELINE_H

#include "entrepot/pipeline.h"

/* Fills in the defaults and examines every field. */
ep_status epi_pipeline_take_config(const char *call, const ep_pipeline_config *given,
                                   ep_pipeline_config *config);

#endif
