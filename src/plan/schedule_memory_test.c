/* SPDX-License-Identifier: MIT */
/*
 * Every allocation of the schedules and the executor made to fail once: the call
 * says so, and (under the address sanitizer) nothing is left behind.
 * ctest-wrap: malloc calloc realloc
 */
#include "entrepot/pipeline.h"

#include "support/test.h"

#include <stdlib.h>

static int until_failure = -1; /* allocations that still succeed; negative: all */

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_realloc(void *memory, size_t size);
void *__wrap_malloc(size_t size);
void *__wrap_calloc(size_t count, size_t size);
void *__wrap_realloc(void *memory, size_t size);

static int fails(void)
{
    return until_failure >= 0 && until_failure-- == 0;
}

void *__wrap_malloc(size_t size)
{
    return fails() ? NULL : __real_malloc(size);
}

void *__wrap_calloc(size_t count, size_t size)
{
    return fails() ? NULL : __real_calloc(count, size);
}

void *__wrap_realloc(void *memory, size_t size)
{
    return fails() ? NULL : __real_realloc(memory, size);
}

static ep_status forward(void *context, const ep_pipeline_step *step, const void *input,
                         void *output)
{
    (void)context, (void)step, (void)input, (void)output;
    return EP_OK;
}

static ep_status backward(void *context, const ep_pipeline_step *step, const void *output_grad,
                          void *input_grad)
{
    (void)context, (void)step, (void)output_grad, (void)input_grad;
    return EP_OK;
}

static ep_status weight_grad(void *context, const ep_pipeline_step *step)
{
    (void)context, (void)step;
    return EP_OK;
}

static ep_status assemble(ep_schedule **s)
{
    static const int32_t stage[] = {0};
    static const ep_schedule_op ops[] = {{.kind = EP_OP_FORWARD}, {.kind = EP_OP_BACKWARD}};
    static const size_t count[] = {2};
    const ep_schedule_layout layout = {sizeof layout, 1, 1, 1, 1, 1, stage, NULL};
    return ep_schedule_assemble(&layout, ops, count, 1, s);
}

/* All calls on one rank that holds two stages, so that buffers are needed too. */
static ep_status everything(void)
{
    const ep_schedule_config config = {sizeof config, EP_SCHEDULE_DUALPIPEV, 1, 2, 0};
    const ep_schedule_costs costs = EP_SCHEDULE_COSTS_INIT;
    const ep_pipeline_config sizes = {sizeof sizes, 64, 0};
    const ep_pipeline_callbacks callbacks = {sizeof callbacks, NULL,        forward, backward,
                                             backward,         weight_grad, NULL};
    ep_schedule_choose_config choice = EP_SCHEDULE_CHOOSE_CONFIG_INIT;
    ep_schedule *s = NULL, *own = NULL;
    double makespan;
    int32_t method;
    ep_status status = ep_schedule_create(&config, &s);
    if (status == EP_OK)
        status = ep_schedule_check(s, NULL, NULL);
    if (status == EP_OK)
        status = ep_schedule_simulate(s, &costs, 1, &makespan, NULL, NULL, NULL);
    if (status == EP_OK)
        status = ep_pipeline_run(s, 0, &sizes, &callbacks, NULL);
    if (status == EP_OK)
        status = ep_schedule_choose(&choice, NULL, &method);
    if (status == EP_OK)
        status = assemble(&own);
    if (status == EP_OK)
        status = ep_schedule_simulate(own, &costs, 1, &makespan, NULL, NULL, NULL);
    ep_schedule_destroy(s);
    ep_schedule_destroy(own);
    return status;
}

static void every_failure_is_reported(void **state)
{
    (void)state;
    int failed = 0;
    for (;; failed++) {
        until_failure = failed;
        ep_status status = everything();
        int reached = until_failure < 0;
        until_failure = -1;
        if (!reached) {
            assert_int_equal(status, EP_OK);
            break;
        }
        assert_int_equal(status, EP_ERR_MEMORY);
        assert_string_not_equal(ep_last_error(), "");
    }
    assert_true(failed > 50);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_failure_is_reported),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
