/* SPDX-License-Identifier: MIT */
/* A pipeline's link over a group: agreement at the start, late ranks named in a run. */
#include "entrepot/pipeline.h"

#include "support/ranks.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

/* The last two deliver notifications late, out of order and more than once. */
static const char *const transports[] = {"threads", "shm",
                                         "fault(threads):delay_us=200,reorder=1,repeat=30",
                                         "fault(shm):delay_us=200,reorder=1,repeat=30"};
enum { TRANSPORTS = sizeof transports / sizeof *transports };

static const ep_pipeline_config config = {sizeof config, 4096, 8};

static ep_schedule *make(int32_t method, int32_t ranks, int32_t chunks)
{
    const ep_schedule_config c = {sizeof c, method, ranks, chunks, 0};
    ep_schedule *s = NULL;
    return ep_schedule_create(&c, &s) == EP_OK ? s : NULL;
}

/* The first word of a message counts the stages it has passed. */
static ep_status forward(void *context, const ep_pipeline_step *step, const void *input,
                         void *output)
{
    int64_t passed = input ? *(const int64_t *)input : 0;
    *(int *)context += passed != step->stage;
    if (output)
        *(int64_t *)output = passed + 1;
    return EP_OK;
}

static ep_status backward(void *context, const ep_pipeline_step *step, const void *output_grad,
                          void *input_grad)
{
    int64_t stage = output_grad ? *(const int64_t *)output_grad - 1 : step->stage;
    *(int *)context += stage != step->stage;
    if (input_grad)
        *(int64_t *)input_grad = stage;
    return EP_OK;
}

static ep_status weight_grad(void *context, const ep_pipeline_step *step)
{
    (void)context, (void)step;
    return EP_OK;
}

static ep_pipeline_callbacks callbacks_of(int *mistakes)
{
    return (ep_pipeline_callbacks){
        sizeof(ep_pipeline_callbacks), mistakes, forward, backward, backward, weight_grad, NULL};
}

static int run_all_methods(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group), mistakes = 0;
    const ep_pipeline_callbacks callbacks = callbacks_of(&mistakes);
    for (int32_t method = 0; method < EP_SCHEDULE_METHODS; method++) {
        ep_pipeline_link link = EP_PIPELINE_LINK_INIT;
        ep_schedule *s = make(method, ranks, 4 * ranks);
        if (!s)
            continue;
        TEST_OK(ep_pipeline_link_open(group, s, &config, &link));
        for (int i = 0; i < 5; i++)
            TEST_OK(ep_pipeline_run(s, rank, &config, &callbacks, &link));
        TEST_CHECK(mistakes == 0);
        ep_pipeline_link_close(&link);
        ep_pipeline_link_close(&link);
        ep_schedule_destroy(s);
    }
    return 0;
}

static void all_methods_run(void **state)
{
    (void)state;
    for (int t = 0; t < TRANSPORTS; t++)
        for (int ranks = 1; ranks <= 4; ranks++)
            assert_int_equal(test_run_groups(transports[t], ranks, run_all_methods, NULL), 0);
}

static int disagree(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group);
    ep_pipeline_link link = EP_PIPELINE_LINK_INIT;
    ep_pipeline_config other = config;
    ep_schedule *s = make(EP_SCHEDULE_1F1B, 2, 4), *t = make(EP_SCHEDULE_ZB1P, 2, 4);
    ep_schedule *three = make(EP_SCHEDULE_1F1B, 3, 4);
    TEST_CHECK(ep_pipeline_link_open(group, rank ? s : t, &config, &link) == EP_ERR_MISMATCH);
    TEST_CHECK(strcmp(ep_last_error(),
                      "ep_pipeline_link_open: ranks 0 and 1 have different schedules") == 0);
    other.gradient_bytes += rank;
    TEST_CHECK(ep_pipeline_link_open(group, s, &other, &link) == EP_ERR_MISMATCH);
    other.activation_bytes = 0;
    TEST_CHECK(ep_pipeline_link_open(group, s, rank ? &other : &config, &link) ==
               (rank ? EP_ERR_ARGUMENT : EP_ERR_ABORTED));
    TEST_CHECK(ep_pipeline_link_open(group, three, &config, &link) == EP_ERR_ARGUMENT);
    TEST_CHECK(ep_pipeline_link_open(group, NULL, &config, &link) == EP_ERR_ARGUMENT);
    TEST_CHECK(ep_pipeline_link_open(NULL, s, &config, &link) == EP_ERR_ARGUMENT);
    ep_schedule_destroy(s);
    ep_schedule_destroy(t);
    ep_schedule_destroy(three);
    return 0;
}

static void disagreement_is_named(void **state)
{
    (void)state;
    for (int t = 0; t < TRANSPORTS; t++)
        assert_int_equal(test_run_groups(transports[t], 2, disagree, NULL), 0);
}

/* Rank 1 of three never runs. The neighbour whose time is short says so at its own operation, and
   the other, who would wait long, hears of it. */
static int one_stays_away(ep_group *group, void *arg)
{
    int rank = ep_group_rank(group), mistakes = 0, hasty = *(int *)arg;
    const ep_pipeline_callbacks callbacks = callbacks_of(&mistakes);
    ep_pipeline_link link = EP_PIPELINE_LINK_INIT;
    ep_schedule *s = make(EP_SCHEDULE_1F1B, 3, 4);
    TEST_OK(ep_pipeline_link_open(group, s, &config, &link));
    if (rank == hasty) {
        TEST_OK(ep_group_set_timeout_ms(group, 80));
        TEST_CHECK(ep_pipeline_run(s, rank, &config, &callbacks, &link) == EP_ERR_TIMEOUT);
        TEST_CHECK(strcmp(ep_last_error(),
                          rank ? "pipeline: rank 2, position 0, receive of activation 0.0 from "
                                 "rank 1: receive (call 1): no word from rank 1 within 80 ms"
                               : "pipeline: rank 0, position 5, send of activation 0.2 to rank 1: "
                                 "send (call 3): no word from rank 1 within 80 ms") == 0);
    } else if (rank != 1) {
        TEST_CHECK(ep_pipeline_run(s, rank, &config, &callbacks, &link) == EP_ERR_ABORTED);
        TEST_CHECK(strstr(ep_last_error(),
                          hasty ? "rank 2 gave the channel up: " : "rank 0 gave the channel up: "));
    }
    TEST_OK(ep_group_set_timeout_ms(group, 30000));
    TEST_OK(ep_group_barrier(group));
    ep_pipeline_link_close(&link);
    ep_schedule_destroy(s);
    return 0;
}

static void late_ranks_are_named(void **state)
{
    (void)state;
    for (int t = 0; t < TRANSPORTS; t++)
        for (int hasty = 0; hasty <= 2; hasty += 2)
            assert_int_equal(test_run_groups(transports[t], 3, one_stays_away, &hasty), 0);
}

static ep_status refuse(void *context, const ep_pipeline_step *step, const void *output_grad,
                        void *input_grad)
{
    (void)context, (void)step, (void)output_grad, (void)input_grad;
    return (ep_status)1234; /* a caller's own */
}

/* The last rank's backward fails: all learn whose it was long before their time is up, also those
   who never wait for that rank, and a new link serves the next run. */
static int one_fails(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group), mistakes = 0;
    ep_pipeline_callbacks callbacks = callbacks_of(&mistakes);
    ep_pipeline_link link = EP_PIPELINE_LINK_INIT;
    ep_schedule *s = make(EP_SCHEDULE_1F1B, ranks, 2 * ranks);
    TEST_OK(ep_pipeline_link_open(group, s, &config, &link));
    if (rank == ranks - 1)
        callbacks.backward = refuse;
    ep_status status = ep_pipeline_run(s, rank, &config, &callbacks, &link);
    if (rank == ranks - 1) {
        TEST_CHECK(status == (ep_status)1234 && strstr(ep_last_error(), "the callback returned "));
    } else {
        TEST_CHECK(status == EP_ERR_ABORTED);
        TEST_CHECK(strstr(ep_last_error(), "rank 3 gave the channel up: "));
    }
    ep_pipeline_link_close(&link);
    callbacks = callbacks_of(&mistakes);
    TEST_OK(ep_pipeline_link_open(group, s, &config, &link));
    TEST_OK(ep_pipeline_run(s, rank, &config, &callbacks, &link));
    ep_pipeline_link_close(&link);
    ep_schedule_destroy(s);
    return 0;
}

static void failures_reach_everybody(void **state)
{
    (void)state;
    for (int t = 0; t < TRANSPORTS; t++)
        assert_int_equal(test_run_groups(transports[t], 4, one_fails, NULL), 0);
}

/* Rank 1 dies at some notification in the middle of a run: nobody waits out the time. */
static int one_dies(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group), mistakes = 0;
    const ep_pipeline_callbacks callbacks = callbacks_of(&mistakes);
    ep_pipeline_link link = EP_PIPELINE_LINK_INIT;
    ep_schedule *s = make(EP_SCHEDULE_1F1B, 3, 4);
    ep_status status = ep_pipeline_link_open(group, s, &config, &link);
    TEST_CHECK(status == EP_OK);
    for (int i = 0; i < 100 && status == EP_OK; i++)
        status = ep_pipeline_run(s, rank, &config, &callbacks, &link);
    TEST_CHECK(status == EP_ERR_RANK_DEAD);
    TEST_CHECK(strstr(ep_last_error(),
                      rank == 1 ? "rank 1, this one, has ended" : "rank 1 has ended") != NULL);
    ep_pipeline_link_close(&link);
    ep_schedule_destroy(s);
    return 0;
}

static void dead_ranks_are_named(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups("fault(threads):kill_rank=1,kill_at=300", 3, one_dies, NULL),
                     0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(all_methods_run),      cmocka_unit_test(disagreement_is_named),
        cmocka_unit_test(late_ranks_are_named), cmocka_unit_test(failures_reach_everybody),
        cmocka_unit_test(dead_ranks_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
