/* SPDX-License-Identifier: MIT */
/*
 * Verify mode on a device: a bit that flips in a row is found, where it flips
 * and in no other call, and worlds in which none does give what they must.
 * Skipped without a device.
 * ctest-timeout: 300
 */
#include "support/cuda.h"
#include "support/scenario.h"
#include "support/test.h"
#include "support/world.h"

#include "entrepot/low_latency.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- flips */

/* A call, and what its error says when row 7 of rank 1 has a bit wrong. */
struct flip {
    const char *name;
    int at; /* number of the call on the buffer; 1 is a dispatch that everything follows */
    ep_wire wire;
    ep_row_layout layout;
    const char *says[3];
};

static const struct flip flips[] = {
    {"dispatch",
     1,
     EP_WIRE_INPUT,
     EP_ROWS_BY_TOKEN,
     {"ep_dispatch", "row 7 from rank 0", "token 7"}},
    {"dispatch, fp8",
     1,
     EP_WIRE_FP8,
     EP_ROWS_BY_TOKEN,
     {"ep_dispatch", "row 7 from rank 0", "token 7"}},
    {"dispatch, by expert",
     1,
     EP_WIRE_FP8,
     EP_ROWS_BY_EXPERT,
     {"ep_dispatch", "row 7 from rank 0", "token 7"}},
    {"combine",
     2,
     EP_WIRE_INPUT,
     EP_ROWS_BY_TOKEN,
     {"ep_combine", "row 7 of rank 1", "for token 7"}},
    {"combine, by expert",
     2,
     EP_WIRE_FP8,
     EP_ROWS_BY_EXPERT,
     {"ep_combine", "row 7 of rank 1", "for token 7"}},
    {"cached", 3, EP_WIRE_INPUT, EP_ROWS_BY_TOKEN, {"ep_dispatch", "row 7 from rank 0", "token 7"}},
    {"backward of combine",
     4,
     EP_WIRE_INPUT,
     EP_ROWS_BY_EXPERT,
     {"ep_combine_backward", "row 7 from rank 0", "token 7"}},
};

/* Ends a call: it must be found bad by the rank that must find it, and by no other. */
static int judge(const struct cuda_rank *c, const struct flip *flip, int number, ep_status started,
                 ep_event **event)
{
    bool combine = strstr(flip->name, "combine") == flip->name;
    bool bad = number == flip->at && c->rank == (combine ? 0 : 1);
    TEST_CHECK(started == EP_OK);
    ep_status status = ep_event_wait(*event);
    ep_event_release(*event);
    *event = NULL;
    TEST_CHECK(status == (bad ? EP_ERR_CORRUPT : EP_OK));
    return bad && !cuda_says((const char *const[]){flip->says[0], flip->says[1], flip->says[2],
                                                   "checksum", NULL});
}

static int flip_dispatch(struct cuda_rank *c, const struct flip *flip, int number,
                         ep_handle *handle, ep_recv *recv)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_event *event = NULL;
    ep_recv init = EP_RECV_INIT;
    *recv = init;
    args.x = c->x;
    args.wire = flip->wire;
    args.handle = handle;
    if (!handle) {
        args.topk_idx = c->ids;
        args.num_experts = c->num_ranks;
        args.layout = flip->layout;
    }
    args.stream = test_device.stream;
    return judge(c, flip, number, ep_dispatch(c->buffer, &args, recv, &event), &event);
}

static int flip_combine(struct cuda_rank *c, const struct flip *flip, ep_handle *handle,
                        const ep_tensor *y, ep_tensor *out)
{
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    ep_event *event = NULL;
    args.y = *y;
    args.handle = handle;
    args.out = *out;
    args.stream = test_device.stream;
    return judge(c, flip, 2, ep_combine(c->buffer, &args, &event), &event);
}

static int flip_backward(struct cuda_rank *c, const struct flip *flip, ep_handle *handle,
                         ep_recv *recv)
{
    ep_combine_backward_args args = EP_COMBINE_BACKWARD_ARGS_INIT;
    ep_event *event = NULL;
    ep_recv init = EP_RECV_INIT;
    *recv = init;
    args.grad_out = c->x;
    args.handle = handle;
    args.stream = test_device.stream;
    return judge(c, flip, 4, ep_combine_backward(c->buffer, &args, recv, &event), &event);
}

/* All four calls; the bad one is followed by good ones. */
static int flip_body(ep_group *group, void *argument)
{
    const struct flip *flip = argument;
    struct cuda_rank c;
    ep_recv first, cached, back;
    char fault[64];
    snprintf(fault, sizeof fault, "flip_rank=1,flip_at=%d,flip_row=7", flip->at);
    setenv("EP_CUDA_FAULT", fault, 1);
    if (cuda_open(group, 0, 1, 40, 520, &c))
        return 1;
    ep_tensor y = tensor_new(EP_BF16, 2 * c.num_tokens, c.hidden, 0, NULL);
    ep_tensor out = tensor_new(EP_BF16, c.num_tokens, c.hidden, 0, NULL);
    uint16_t *zeros = test_zeros(2 * c.num_tokens * c.hidden, 2);
    test_memory_write(y.data, zeros, (size_t)(2 * c.num_tokens * c.hidden) * 2);
    int failed = flip_dispatch(&c, flip, 1, NULL, &first) ||
                 flip_combine(&c, flip, first.handle, &y, &out) ||
                 flip_dispatch(&c, flip, 3, first.handle, &cached) ||
                 flip_backward(&c, flip, first.handle, &back);
    if (failed) {
        fprintf(stderr, "  in '%s' on rank %d\n", flip->name, c.rank);
        return 1;
    }
    cuda_drop(&back);
    cuda_drop(&cached);
    cuda_drop(&first);
    tensor_free(&y);
    tensor_free(&out);
    free(zeros);
    cuda_close(&c);
    return 0;
}

static void flipped_bits_are_found(void **state)
{
    (void)state;
    if (!cuda_present())
        skip();
    for (size_t i = 0; i < sizeof flips / sizeof *flips; i++)
        assert_int_equal(test_run_groups("shm", 2, flip_body, (void *)&flips[i]), 0);
}

/* ---------------------------------------------------------------- low latency */

/* Calls are dispatch 1, combine 2, dispatch 3 and so on; token or output 7 of rank 1 goes bad. */
struct ll_flip {
    const char *name;
    int at;
    ep_dtype wire;
    ep_combine_wire combine;
    bool by_column, hook, zero_copy;
};

static const struct ll_flip ll_flips[] = {
    {"bf16", 1, EP_BF16, EP_COMBINE_BF16, .zero_copy = true},
    {"fp8", 3, EP_E4M3, EP_COMBINE_BF16, .hook = false},
    {"fp8, by column", 1, EP_E4M3, .by_column = true, .hook = true},
    {"combine", 2, EP_BF16, EP_COMBINE_BF16, .hook = false},
    {"combine of the send buffer", 4, EP_E4M3, .zero_copy = true, .hook = true},
    {"logfmt", 4, EP_BF16, .combine = EP_COMBINE_LOGFMT10},
    {"logfmt of the send buffer", 2, EP_BF16, .combine = EP_COMBINE_LOGFMT10, .zero_copy = true},
    {"no flip", 99, EP_E4M3, .by_column = true, .zero_copy = true},
};

/* Only readers of rank 1 find it: of a token each rank, of an output the owner of token 7 % T. */
static int ll_judge(const struct cuda_rank *c, const struct ll_flip *flip, int number,
                    ep_status started, ep_event **event)
{
    bool combine = number % 2 == 0, bad = number == flip->at && (!combine || c->rank == 0);
    TEST_CHECK(started == EP_OK);
    ep_status status = ep_event_wait(*event);
    ep_event_release(*event);
    *event = NULL;
    TEST_CHECK(status == (bad ? EP_ERR_CORRUPT : EP_OK));
    if (!bad)
        return 0;
    return combine ? !CUDA_SAYS("ep_ll_combine", "row 7 of rank 1, for token 7", "checksum")
                   : !CUDA_SAYS("ep_ll_dispatch", "token 7 of rank 1", "checksum");
}

static int ll_combine(struct cuda_rank *c, const struct ll_flip *flip, int number, ep_ll_recv *recv,
                      ep_tensor *out, ep_tensor *weights)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    ep_event *event = NULL;
    int64_t elements = recv->x.shape[0] * recv->x.shape[1] * c->hidden;
    uint16_t *y = test_zeros(elements, 2);
    void *memory = test_memory_new((size_t)elements * 2);
    for (int64_t i = 0; i < elements; i++) /* some chunks can be coded, some can't */
        y[i] = (uint16_t)(i / 1024 % 3 ? 0x3e00 + i * 37 % 251 : 0x4000 + i % 100);
    args.y = recv->x;
    args.y.dtype = EP_BF16;
    args.y.data = memory;
    if (flip->zero_copy)
        TEST_OK(ep_ll_combine_buffer(c->buffer, recv->handle, &args.y));
    test_memory_write(args.y.data, y, (size_t)elements * 2);
    args.topk_idx = c->ids;
    args.topk_weights = *weights;
    args.handle = recv->handle;
    args.wire = flip->combine;
    args.out = *out;
    args.completion = flip->hook ? EP_COMPLETE_BY_HOOK : EP_COMPLETE_IN_BACKGROUND;
    args.stream = test_device.stream;
    int failed = ll_judge(c, flip, number, ep_ll_combine(c->buffer, &args, &event), &event);
    test_memory_free(memory);
    free(y);
    return failed;
}

static int ll_round(struct cuda_rank *c, const struct ll_flip *flip, int number, ep_tensor *out,
                    ep_tensor *weights)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    ep_ll_recv recv = EP_LL_RECV_INIT;
    ep_event *event = NULL;
    args.x = c->x;
    args.topk_idx = c->ids;
    args.max_tokens = c->num_tokens;
    args.num_experts = c->num_ranks;
    args.wire = flip->wire;
    args.scales_by_column = flip->by_column;
    args.completion = flip->hook ? EP_COMPLETE_BY_HOOK : EP_COMPLETE_IN_BACKGROUND;
    args.stream = test_device.stream;
    int failed = ll_judge(c, flip, number, ep_ll_dispatch(c->buffer, &args, &recv, &event), &event);
    if (!failed && number != flip->at) /* there is nothing to combine of a dispatch that failed */
        failed = ll_combine(c, flip, number + 1, &recv, out, weights);
    ep_ll_recv_release(&recv);
    return failed;
}

static int ll_flip_body(ep_group *group, void *argument)
{
    const struct ll_flip *flip = argument;
    struct cuda_rank c;
    char fault[64];
    snprintf(fault, sizeof fault, "flip_rank=1,flip_at=%d,flip_row=7", flip->at);
    setenv("EP_CUDA_FAULT", fault, 1);
    if (cuda_open(group, 0, 1, 40, 2048 + 512 + 136, &c))
        return 1;
    float *ones = test_zeros(c.num_tokens * c.num_ranks, 4);
    for (int64_t i = 0; i < c.num_tokens * c.num_ranks; i++)
        ones[i] = 1;
    ep_tensor weights = tensor_new(EP_F32, c.num_tokens, c.num_ranks, 0, ones);
    ep_tensor out = tensor_new(EP_BF16, c.num_tokens, c.hidden, 0, NULL);
    int failed = 0;
    for (int number = 1; number < 8 && !failed; number += 2)
        failed = ll_round(&c, flip, number, &out, &weights);
    if (failed) {
        fprintf(stderr, "  in low latency, '%s' on rank %d\n", flip->name, c.rank);
        return 1;
    }
    tensor_free(&weights);
    tensor_free(&out);
    free(ones);
    cuda_close(&c);
    return 0;
}

static void flipped_bits_are_found_in_low_latency(void **state)
{
    (void)state;
    if (!cuda_present())
        skip();
    for (size_t i = 0; i < sizeof ll_flips / sizeof *ll_flips; i++)
        assert_int_equal(test_run_groups("shm", 2, ll_flip_body, (void *)&ll_flips[i]), 0);
}

/* ---------------------------------------------------------------- worlds */

static void whole_worlds_pass(void **state)
{
    enum { GROUPS = 3, EACH = 8 };
    struct rng rng;
    (void)state;
    if (!cuda_present())
        skip();
    rng_seed(&rng, rng_env_seed(5));
    for (int group = 0; group < GROUPS; group++) {
        struct scenario list[EACH];
        struct scenario_limits limits = {
            .num_ranks = group + 2, .max_tokens = 70, .max_hidden = 1200, .max_experts = 40};
        ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
        for (int i = 0; i < EACH; i++)
            list[i] = scenario_random(&rng, &limits, "verified world");
        config.verify = 1;
        config.window_max_bytes = (size_t)4 << 30;
        assert_int_equal(world_run_with(NULL, &config, list, EACH, SCENARIO_ALL), 0);
    }
}

/* ---------------------------------------------------------------- faults */

static int fault_body(ep_group *group, void *argument)
{
    static const char *const bad[][2] = {
        {"flip_row=-1", "flip_row= is '-1'; it can be 0..2147483647"},
        {"flip_at=0", "flip_at= is '0'; it can be 1..2147483647"},
        {"flip_rank=0,flop_row=3", "'flop_row=3'; there are"},
    };
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    ep_buffer *buffer = NULL;
    (void)argument;
    config.device = EP_DEVICE_CUDA;
    for (size_t i = 0; i < 2 * (sizeof bad / sizeof *bad); i++) {
        config.verify = i % 2; /* what is wrong is refused even where it would have no effect */
        setenv("EP_CUDA_FAULT", bad[i / 2][0], 1);
        TEST_CHECK(ep_buffer_create(group, &config, &buffer) == EP_ERR_ARGUMENT);
        TEST_CHECK(CUDA_SAYS(bad[i / 2][1]));
    }
    unsetenv("EP_CUDA_FAULT");
    setenv("EP_CUDA_EXPORT", "off", 1);
    TEST_CHECK(ep_buffer_create(group, &config, &buffer) == EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("EP_CUDA_EXPORT is 'off'; it must be 0 or 1"));
    unsetenv("EP_CUDA_EXPORT");
    TEST_OK(ep_buffer_create(group, &config, &buffer));
    ep_buffer_destroy(buffer);
    return 0;
}

static void bad_faults_are_refused(void **state)
{
    (void)state;
    if (!cuda_present())
        skip();
    assert_int_equal(test_run_groups("shm", 1, fault_body, NULL), 0);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(flipped_bits_are_found),
        cmocka_unit_test(flipped_bits_are_found_in_low_latency),
        cmocka_unit_test(whole_worlds_pass),
        cmocka_unit_test(bad_faults_are_refused),
    };
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
