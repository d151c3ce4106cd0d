/* SPDX-License-Identifier: MIT */
/*
 * Every allocation of the expert placement made to fail once: the call says so,
 * writes nothing and (under the address sanitizer) leaves nothing behind.
 * ctest-wrap: malloc calloc realloc
 */
#include "entrepot/plan.h"

#include "support/test.h"

#include <stdlib.h>
#include <string.h>

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

enum { EXPERTS = 8, SLOTS = 12, WINDOWS = 2 };

static const float load[WINDOWS][EXPERTS] = {{9, 1, 1, 4, 2, 2, 7, 1}, {1, 8, 3, 1, 2, 5, 1, 1}};
static const int32_t current[SLOTS] = {0, 1, 2, 0, 1, 3, 4, 5, 6, 4, 6, 7};

static ep_status plan(int policy, int32_t *phy2log)
{
    ep_plan_config c = EP_PLAN_CONFIG_INIT;
    ep_plan_report report = {.size = sizeof report};
    int32_t rank[SLOTS];
    c.layers = 1;
    c.experts = EXPERTS;
    c.replicas = SLOTS;
    c.groups = 4;
    c.nodes = 2;
    c.gpus = 4;
    c.policy = policy;
    c.windows = WINDOWS;
    c.max_moves = 3;
    return ep_plan_eplb(&c, load[0], current, phy2log, rank, &report);
}

static ep_status others(void)
{
    ep_plan_config c = EP_PLAN_CONFIG_INIT;
    ep_plan_report report = {.size = sizeof report};
    ep_plan_router r = EP_PLAN_ROUTER_INIT;
    int32_t most, log2phy[EXPERTS * 2], count[EXPERTS];
    int64_t ids[2] = {0, 1}, moves;
    double gpu_load[4];
    c.layers = 1;
    c.experts = r.experts = EXPERTS;
    c.replicas = r.replicas = SLOTS;
    c.gpus = r.gpus = 4;
    r.max_count = 2;
    r.log2phy = log2phy;
    r.logcnt = count;
    r.choice = EP_PLAN_LEAST_LOADED;
    ep_status status = ep_plan_judge(&c, load[0], NULL, current, &report);
    if (status == EP_OK)
        status = ep_plan_gpu_load(&c, load[0], current, gpu_load);
    if (status == EP_OK)
        status = ep_plan_moves(&c, current, current, NULL, 0, &moves);
    if (status == EP_OK)
        status = ep_plan_max_count(&c, current, &most);
    if (status == EP_OK)
        status = ep_plan_tables(&c, current, NULL, 2, log2phy, count);
    return status == EP_OK ? ep_plan_route(&r, ids, 8, 2, 1, ids, NULL) : status;
}

/* Fails the first allocation, the second and so on until the call needs no more. */
static void every_policy_reports_it(void **state)
{
    (void)state;
    for (int policy = 0; policy < EP_PLAN_POLICIES; policy++)
        for (int n = 0;; n++) {
            int32_t phy2log[SLOTS];
            memset(phy2log, 0x55, sizeof phy2log);
            until_failure = n;
            ep_status status = plan(policy, phy2log);
            int over = until_failure >= 0; /* it was not reached */
            until_failure = -1;
            if (over) {
                assert_int_equal(status, EP_OK);
                assert_true(n > 2);
                break;
            }
            if (status == EP_OK) /* the failure was of a block that is only made smaller */
                continue;
            assert_int_equal(status, EP_ERR_MEMORY);
            assert_non_null(strstr(ep_last_error(), "ep_plan_eplb: no memory for"));
            for (int i = 0; i < SLOTS; i++)
                assert_int_equal(phy2log[i], 0x55555555);
        }
}

static void the_others_report_it(void **state)
{
    (void)state;
    int n = 0;
    for (;; n++) {
        until_failure = n;
        ep_status status = others();
        int over = until_failure >= 0;
        until_failure = -1;
        if (over) {
            assert_int_equal(status, EP_OK);
            break;
        }
        assert_int_equal(status, EP_ERR_MEMORY);
    }
    assert_true(n >= 6);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_policy_reports_it),
        cmocka_unit_test(the_others_report_it),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
