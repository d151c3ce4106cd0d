/* SPDX-License-Identifier: MIT */
/*
 * One forward, one backward: PipeDream-Flush (Narayanan et al., ICML 2021) and
 * its interleaved form (Narayanan et al., SC 2021, section 2.2).
 */
#include "plan/schedule.h"

void epi_schedule_1f1b(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank)
{
    int32_t ahead = shape->ranks - 1 - rank; /* chunks that must leave before one returns */
    if (ahead > shape->chunks)
        ahead = shape->chunks;
    for (int32_t i = 0; i < ahead; i++)
        epi_build_forward(builder, 0);
    for (int32_t i = ahead; i < shape->chunks; i++) {
        epi_build_forward(builder, 0);
        epi_build_backward(builder, 0);
    }
    for (int32_t i = 0; i < ahead; i++)
        epi_build_backward(builder, 0);
}

/* Chunks go in groups of R: a group passes phase 0, then phase 1, and so on. */
static int phase_of(const ep_schedule_shape *shape, int32_t step)
{
    return step / shape->ranks % shape->phases;
}

void epi_schedule_interleaved(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank)
{
    int32_t total = shape->chunks * shape->phases;
    int32_t ahead = 2 * (shape->ranks - 1 - rank) + (shape->phases - 1) * shape->ranks;
    if (ahead > total)
        ahead = total;
    for (int32_t i = 0; i < total + ahead; i++) {
        if (i < total)
            epi_build_forward(builder, phase_of(shape, i));
        if (i >= ahead)
            epi_build_backward(builder, shape->phases - 1 - phase_of(shape, i - ahead));
    }
}
