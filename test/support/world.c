/* SPDX-License-Identifier: MIT */
#include "support/world.h"

#include "support/ranks.h"
#include "support/sanitize.h"
#include "support/tensors.h"

#include <stdlib.h>

#define FAULTS "delay_us=100,reorder=1,repeat=20"

const char *const world_transports[] = {"threads", "fault(threads):seed=7," FAULTS,
#if !TEST_TSAN
                                        "shm", "fault(shm):seed=11," FAULTS,
#endif
                                        NULL};

struct batch {
    struct scenario_data **data;
    int count, calls;
    const ep_buffer_config *config;
};

static int run_batch(ep_group *group, void *argument)
{
    const struct batch *batch = argument;
    ep_buffer *buffer = NULL;
    int failed = 0;
    for (int i = 0; i < batch->count && !failed; i++) {
        const struct scenario *sc = &batch->data[i]->sc;
        if (!buffer || sc->num_threads != batch->data[i - 1]->sc.num_threads) {
            ep_buffer_config config = batch->config ? *batch->config : scenario_buffer_config(sc);
            config.num_threads = sc->num_threads;
            config.device = test_device.type;
            config.device_index = test_device.index;
            ep_buffer_destroy(buffer);
            buffer = NULL;
            TEST_OK(ep_buffer_create(group, &config, &buffer));
        }
        failed = scenario_run(batch->data[i], buffer, batch->calls);
    }
    ep_buffer_destroy(buffer);
    return failed;
}

static int run_rank(ep_group *group, void *batch)
{
    TEST_OK(test_device_enter(ep_group_rank(group)));
    int failed = run_batch(group, batch);
    test_device_leave();
    return failed;
}

static int run_over(const char *transport, const ep_buffer_config *config,
                    struct scenario_data **data, int count, int calls)
{
    int failed = 0;
    for (int first = 0, end; first < count; first = end) {
        int ranks = data[first]->sc.num_ranks;
        for (end = first + 1; end < count && data[end]->sc.num_ranks == ranks; end++)
            ;
        struct batch batch = {data + first, end - first, calls, config};
        failed += test_run_groups(transport, ranks, run_rank, &batch);
    }
    if (failed)
        fprintf(stderr, "  over %s\n", transport);
    return failed;
}

int world_run_with(const char *transport, const ep_buffer_config *config,
                   const struct scenario *list, int count, int calls)
{
    int failed = 0;
    struct scenario_data **data = test_zeros(count, sizeof(void *));
    for (int i = 0; i < count; i++)
        data[i] = scenario_build(&list[i]);
    transport = test_transport(transport);
    if (transport)
        failed = run_over(transport, config, data, count, calls);
    for (const char *const *each = world_transports; !transport && *each; each++)
        failed += run_over(*each, config, data, count, calls);
    for (int i = 0; i < count; i++)
        scenario_free(data[i]);
    free(data);
    return failed;
}

int world_run(const char *transport, const struct scenario *list, int count, int calls)
{
    return world_run_with(transport, NULL, list, count, calls);
}
