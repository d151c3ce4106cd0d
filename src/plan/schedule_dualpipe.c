/* SPDX-License-Identifier: MIT */
/*
 * DualPipe (DeepSeek-V3 technical report, section 3.2.1) and DualPipeV, the same
 * order on half the ranks ("cut in half", Qi et al., 2025).
 */
#include "plan/schedule.h"

/* Steps 1 to 3: fill the pipeline. `away` is the distance to its middle. */
static void warm_up(epi_builder *b, int32_t h, int32_t away)
{
    for (int32_t i = 0; i < 2 * away; i++)
        epi_build_forward(b, 0);
    for (int32_t i = 0; i < h + 1; i++) {
        epi_build_forward(b, 0);
        epi_build_forward(b, 1);
    }
    for (int32_t i = 0; i < away; i++) {
        epi_build_input_grad(b, 1);
        epi_build_weight_grad(b);
        epi_build_forward(b, 1);
    }
}

/* Step 4: both directions flow and hide each other's communication. */
static void steady(epi_builder *b, int32_t rounds, int32_t away)
{
    for (int32_t i = 0; i < rounds; i++) {
        if (i == 0 && away == 0) {
            /* In the middle nothing has arrived yet that F0 could be paired with. */
            epi_build_forward(b, 0);
            epi_build_backward(b, 1);
        } else {
            epi_build_pair(b, 0, 1);
        }
        epi_build_pair(b, 1, 0);
    }
}

static void backward(epi_builder *b, int phase, bool defer)
{
    if (defer)
        epi_build_input_grad(b, phase);
    else
        epi_build_backward(b, phase);
}

/* Steps 5 to 8: drain; deferred weight gradients fill the gaps of the tail. */
static void cool_down(epi_builder *b, int32_t h, int32_t away)
{
    for (int32_t i = 0; i < away; i++) {
        epi_build_backward(b, 1);
        epi_build_pair(b, 1, 0);
    }
    int32_t split = (h + 1) / 2;
    for (int32_t i = 0; i < h + 1; i++) {
        backward(b, 1, i > split || (i == split && h % 2 == 1));
        backward(b, 0, i >= split);
    }
    for (int32_t i = 0; i < away; i++) {
        epi_build_weight_grad(b);
        epi_build_input_grad(b, 0);
    }
    for (int32_t i = 0; i < h + 1; i++)
        epi_build_weight_grad(b);
}

/* `h` is the distance from the end where phase 0 enters, `half` the ranks from
 * there to the middle, `chunks` the number each phase runs. */
static void dual(epi_builder *b, int32_t h, int32_t half, int32_t chunks)
{
    int32_t away = half - h - 1;
    warm_up(b, h, away);
    steady(b, chunks - 2 * half + h + 1, away);
    cool_down(b, h, away);
}

void epi_schedule_dualpipe(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank)
{
    int32_t mirror = shape->ranks - 1 - rank;
    dual(builder, rank < mirror ? rank : mirror, shape->ranks / 2, shape->chunks);
}

void epi_schedule_dualpipev(epi_builder *builder, const ep_schedule_shape *shape, int32_t rank)
{
    dual(builder, rank, shape->ranks, shape->chunks);
}
