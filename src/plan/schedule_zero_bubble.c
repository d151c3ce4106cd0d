/* SPDX-License-Identifier: MIT */
/*
 * Zero-bubble schedules (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR
 * 2024): the weight gradient waits on nothing but its own rank, so it fills what
 * would be bubble.
 */
#include "plan/schedule.h"

/* ZB-H1: 1F1B whose rank r keeps r weight gradients back, which is what 1F1B
 * leaves free of the first rank's activation memory, and spends them at the end. */
void epi_schedule_zb1p(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank)
{
    int32_t ahead = shape->ranks - 1 - rank;
    if (ahead > shape->chunks)
        ahead = shape->chunks;
    for (int32_t i = 0; i < ahead; i++)
        epi_build_forward(builder, 0);
    for (int32_t i = 0; i < shape->chunks; i++) {
        if (ahead + i < shape->chunks)
            epi_build_forward(builder, 0);
        epi_build_input_grad(builder, 0);
        if (i >= rank)
            epi_build_weight_grad(builder);
    }
    for (int32_t i = 0; i < rank; i++)
        epi_build_weight_grad(builder);
}

/*
 * ZB-V: stages r and 2R-1-r on rank r. With F, I and W of one length a rank never
 * waits between its first and last operation, at the activation memory of 1F1B.
 * The pattern is that of at least 2R-1 chunks; with fewer the rest is dropped.
 */
void epi_schedule_zbv(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank)
{
    int32_t ahead = shape->ranks - rank;
    int32_t chunks = 2 * shape->ranks - 1;
    if (chunks < shape->chunks)
        chunks = shape->chunks;
    for (int32_t i = 0; i < 2 * ahead - 1; i++)
        epi_build_forward(builder, 0);
    for (int32_t i = 0; i < rank; i++) {
        epi_build_forward(builder, 1);
        epi_build_forward(builder, 0);
    }
    for (int32_t i = 0; i < ahead; i++) {
        epi_build_forward(builder, 1);
        epi_build_input_grad(builder, 1);
        epi_build_weight_grad(builder);
    }
    int32_t forwards0 = 2 * ahead - 1 + rank;
    for (int32_t i = shape->ranks; i < chunks; i++) {
        if (forwards0++ < chunks)
            epi_build_forward(builder, 0);
        epi_build_input_grad(builder, 0);
        epi_build_weight_grad(builder);
        epi_build_forward(builder, 1);
        epi_build_input_grad(builder, 1);
        epi_build_weight_grad(builder);
    }
    for (int32_t i = 0; i < rank; i++) {
        epi_build_input_grad(builder, 0);
        epi_build_input_grad(builder, 1);
    }
    for (int32_t i = 0; i < ahead; i++) {
        epi_build_input_grad(builder, 0);
        epi_build_weight_grad(builder);
    }
    for (int32_t i = 0; i < 2 * rank; i++)
        epi_build_weight_grad(builder);
}
