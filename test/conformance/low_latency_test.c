/* SPDX-License-Identifier: MIT */
/*
 * Low latency against what it must give: equality with the normal mode by expert,
 * all scales, odd shapes, LogFMT against a float64 reference, overflow, an expert
 * named twice, memory as the size query says, wait costs.
 * ctest-timeout: 300
 */
#include "entrepot/low_latency.h"

#include "support/on_device.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/tensors.h"
#include "support/test.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef struct shape {
    int tokens, most, hidden, topk, experts; /* experts per rank */
    ep_dtype wire;
    ep_scale scale;
    bool by_column, wide_ids;
} shape;

typedef struct tensors {
    uint16_t *x, *out, *normal_out;
    int64_t *ids;
    int32_t *narrow_ids;
    float *weights;
} tensors;

static float value_of(uint16_t code)
{
    uint32_t bits = (uint32_t)code << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint16_t code_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static tensors make(const shape *s, int rank, int ranks)
{
    struct rng rng;
    size_t elements = (size_t)(s->tokens * s->hidden) + 1,
           places = (size_t)(s->tokens * s->topk) + 1;
    tensors t = {calloc(elements, 2), calloc(elements, 2), calloc(elements, 2),
                 calloc(places, 8),   calloc(places, 4),   calloc(places, 4)};
    rng_seed(&rng, (uint64_t)(rank * 977 + s->hidden + s->topk));
    for (size_t i = 0; i + 1 < elements; i++) /* a thousand values over and over */
        t.x[i] = i < 1000 ? code_of((float)ldexp(rng_unit(&rng) - 0.5, (int)rng_range(&rng, -6, 2)))
                          : t.x[i - 997];
    routing_fill(&rng, ROUTING_SPARSE, s->tokens, s->topk, (int64_t)s->experts * ranks, ranks,
                 t.ids);
    for (size_t i = 0; i + 1 < places; i++) {
        t.weights[i] = (float)rng_unit(&rng);
        t.narrow_ids[i] = (int32_t)t.ids[i];
    }
    return t;
}

static void drop(tensors *t)
{
    void *memory[] = {t->x, t->out, t->normal_out, t->ids, t->narrow_ids, t->weights};
    for (size_t i = 0; i < sizeof memory / sizeof *memory; i++)
        free(memory[i]);
}

static ep_ll_dispatch_args ll_args(const shape *s, const tensors *t, int ranks)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(t->x, EP_BF16, s->tokens, s->hidden);
    args.topk_idx = s->wide_ids ? ep_tensor_2d(t->ids, EP_I64, s->tokens, s->topk)
                                : ep_tensor_2d(t->narrow_ids, EP_I32, s->tokens, s->topk);
    args.max_tokens = s->most;
    args.num_experts = (int64_t)s->experts * ranks;
    args.wire = s->wire;
    args.scale = s->scale;
    args.scales_by_column = s->by_column;
    return args;
}

static ep_ll_combine_args combine_args(const shape *s, const tensors *t, const ep_ll_recv *recv)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    args.topk_idx = ep_tensor_2d(t->ids, EP_I64, s->tokens, s->topk);
    args.topk_weights = ep_tensor_2d(t->weights, EP_F32, s->tokens, s->topk);
    args.handle = recv->handle;
    args.out = ep_tensor_2d(t->out, EP_BF16, s->tokens, s->hidden);
    return args;
}

/* Rows, scales, sources and counts of each expert are those of the normal mode by expert. */
static int same_rows(const shape *s, const ep_ll_recv *ll, const ep_recv *normal)
{
    size_t row = (size_t)s->hidden * ep_dtype_size(s->wire);
    int64_t room = ll->x.shape[1], words = ll->scales.ndim ? ll->scales.shape[2] : 0;
    const int32_t *offset = normal->expert_offset.data, *count = ll->count.data;
    for (int64_t l = 0; l < ll->x.shape[0]; l++) {
        TEST_CHECK(count[l] == offset[l + 1] - offset[l]);
        for (int i = 0; i < count[l]; i++) {
            int64_t at = l * room + i, from = offset[l] + i;
            TEST_CHECK(memcmp((char *)ll->x.data + (size_t)at * row,
                              (char *)normal->x.data + (size_t)from * row, row) == 0);
            TEST_CHECK(((int32_t *)ll->source_token.data)[at] ==
                       ((int32_t *)normal->source_token.data)[from]);
            for (int64_t w = 0; w < words; w++)
                TEST_CHECK(((int32_t *)ll->scales
                                .data)[l * ll->scales.stride[0] + i * ll->scales.stride[1] +
                                       w * ll->scales.stride[2]] ==
                           ((int32_t *)normal->scales.data)[from * words + w]);
        }
    }
    return 0;
}

/* Expert outputs for both modes: any function of the row's place will do. */
static int equals_normal(ep_buffer *buffer, const shape *s, int rank, int ranks)
{
    tensors t = make(s, rank, ranks);
    ep_ll_dispatch_args args = ll_args(s, &t, ranks);
    ep_ll_recv ll = EP_LL_RECV_INIT;
    ep_dispatch_args normal_args = EP_DISPATCH_ARGS_INIT;
    ep_recv normal = EP_RECV_INIT;
    TEST_OK(ep_ll_dispatch(buffer, &args, &ll, NULL));
    normal_args.x = args.x;
    normal_args.topk_idx = args.topk_idx;
    normal_args.num_experts = args.num_experts;
    normal_args.wire = s->wire == EP_E4M3 ? EP_WIRE_FP8 : EP_WIRE_INPUT;
    normal_args.scale = s->scale;
    normal_args.layout = EP_ROWS_BY_EXPERT;
    TEST_OK(ep_dispatch(buffer, &normal_args, &normal, NULL));
    TEST_CHECK(same_rows(s, &ll, &normal) == 0);

    ep_tensor y;
    uint16_t *normal_y = calloc((size_t)(normal.num_rows * s->hidden) + 1, 2);
    TEST_OK(ep_ll_combine_buffer(buffer, ll.handle, &y));
    const int32_t *offset = normal.expert_offset.data;
    for (int64_t l = 0; l < y.shape[0]; l++)
        for (int64_t i = 0; i < (int64_t)(offset[l + 1] - offset[l]) * s->hidden; i++) {
            uint16_t code = code_of((float)((rank * 31 + l * 7 + i) % 61) / 64 - 0.4f);
            normal_y[(int64_t)offset[l] * s->hidden + i] = code;
            ((uint16_t *)y.data)[l * y.stride[0] + i] = code;
        }
    ep_ll_combine_args combine = combine_args(s, &t, &ll);
    ep_combine_args normal_combine = EP_COMBINE_ARGS_INIT;
    combine.y = y;
    TEST_OK(ep_ll_combine(buffer, &combine, NULL));
    normal_combine.y = ep_tensor_2d(normal_y, EP_BF16, normal.num_rows, s->hidden);
    normal_combine.topk_weights = combine.topk_weights;
    normal_combine.handle = normal.handle;
    normal_combine.out = ep_tensor_2d(t.normal_out, EP_BF16, s->tokens, s->hidden);
    TEST_OK(ep_combine(buffer, &normal_combine, NULL));
    TEST_CHECK(memcmp(t.out, t.normal_out, (size_t)(s->tokens * s->hidden) * 2) == 0);
    ep_ll_recv_release(&ll);
    ep_recv_release(&normal);
    ep_handle_release(normal.handle);
    free(normal_y);
    drop(&t);
    return 0;
}

static int equality(ep_group *group, void *arg)
{
    static const shape shapes[] = {
        {5, 7, 8, 1, 1, EP_BF16, EP_SCALE_F32, false, false},
        {9, 9, 136, 3, 2, EP_E4M3, EP_SCALE_F32, false, true},
        {9, 9, 136, 3, 2, EP_E4M3, EP_SCALE_F32, true, true},
        {4, 20, 1096, 4, 5, EP_E4M3, EP_SCALE_UE8M0, true, false},
        {0, 3, 128, 2, 2, EP_E4M3, EP_SCALE_POW2, false, false},
        {33, 40, 520, 6, 6, EP_BF16, EP_SCALE_F32, false, true},
        {12, 12, 7168, 8, 8, EP_E4M3, EP_SCALE_POW2, false, true},
    };
    ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
    ep_buffer *buffer;
    config.num_threads = *(int *)arg;
    config.verify = *(int *)arg > 1;
    TEST_OK(ep_buffer_create(group, &config, &buffer));
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group);
    for (size_t i = 0; i < 2 * sizeof shapes / sizeof *shapes; i++) {
        shape s = shapes[i % (sizeof shapes / sizeof *shapes)];
        if (s.topk > s.experts * ranks)
            s.topk = s.experts * ranks;
        if (s.tokens > 2)
            s.tokens -= rank % 3; /* not the same on every rank */
        TEST_CHECK(equals_normal(buffer, &s, rank, ranks) == 0);
    }
    ep_buffer_destroy(buffer);
    return 0;
}

/* ------------------------------------------------------------- LogFMT */

/* One rank, one expert a token, weight 1: combine gives each row back through the wire. Rows whose
   range qualifies come back within half a step of their grid, others exactly. */
static int logfmt(ep_group *group, void *arg)
{
    (void)arg;
    static const int widths[] = {8, 120, 136, 512, 1024, 1032, 7168};
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, NULL, &buffer));
    for (int i = 0; i < 7; i++)
        for (int kind = 0; kind < 4; kind++) {
            shape s = {6, 6, widths[i], 1, 2, EP_BF16, EP_SCALE_F32, false, true};
            tensors t = make(&s, 3, 1);
            ep_ll_dispatch_args args = ll_args(&s, &t, 1);
            ep_ll_recv recv = EP_LL_RECV_INIT;
            for (int n = 0; n < s.tokens; n++)
                t.ids[n] = n % 2, t.weights[n] = 1;
            for (int n = 0; n < s.tokens * s.hidden; n++) {
                double magnitude =
                    ldexp(1 + (n * 37 % 64) / 64.0, -1 - n * 11 % (kind == 3 ? 60 : 9));
                if (kind == 1 && n % 8 == 5)
                    magnitude = 3; /* past the range: travels as BF16 */
                if (kind == 2 && n % 7 == 0)
                    magnitude = 0;
                t.x[n] = code_of((float)(n & 1 ? -magnitude : magnitude));
            }
            TEST_OK(ep_ll_dispatch(buffer, &args, &recv, NULL));
            ep_ll_combine_args combine = combine_args(&s, &t, &recv);
            combine.y = recv.x;
            combine.wire = EP_COMBINE_LOGFMT10;
            TEST_OK(ep_ll_combine(buffer, &combine, NULL));
            for (int n = 0; n < s.tokens * s.hidden; n++) {
                double want = value_of(t.x[n]), got = value_of(t.out[n]);
                /* A block spans 2^9 or, cut off, 2^32 in 510 steps; and BF16 rounds by 2^-9. */
                double step = (kind == 3 ? 32 : 9.5) / 510, bound = pow(2, step / 2) - 1 + 0x1p-8;
                if (kind == 1)
                    TEST_CHECK(got == want);
                else if (kind == 3 && fabs(want) < 0x1p-31)
                    TEST_CHECK(fabs(got) <= 0x1p-31);
                else
                    TEST_CHECK(fabs(got - want) <= fabs(want) * bound);
            }
            ep_ll_recv_release(&recv);
            drop(&t);
        }
    ep_buffer_destroy(buffer);
    return 0;
}

/* ------------------------------------------------------------- overflow, twins */

static int overflow(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group);
    shape s = {6, 8, 16, 2, 2, EP_BF16, EP_SCALE_F32, false, true};
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, NULL, &buffer));
    tensors t = make(&s, rank, ranks);
    for (int n = 0; n < s.tokens * s.topk; n++) {
        t.ids[n] = n % 2 ? 1 : 0; /* all to the two experts of rank 0 */
        t.weights[n] = 1;
    }
    for (int n = 0; n < s.tokens * s.hidden; n++)
        t.x[n] = code_of((float)(rank + 1));
    for (int round = 0; round < 6; round++) {
        ep_ll_dispatch_args args = ll_args(&s, &t, ranks);
        ep_ll_recv recv = EP_LL_RECV_INIT;
        args.max_expert_rows = 7;
        args.overflow = round % 2 ? EP_OVERFLOW_DROP : EP_OVERFLOW_ERROR;
        ep_status status = ep_ll_dispatch(buffer, &args, &recv, NULL);
        if (args.overflow == EP_OVERFLOW_ERROR) {
            TEST_CHECK(status == EP_ERR_CAPACITY);
            TEST_CHECK(strstr(ep_last_error(), "expert 0 on rank 0 receives") != NULL);
            continue;
        }
        TEST_OK(status);
        TEST_CHECK(recv.x.shape[1] == 7);
        for (int l = 0; l < 2; l++) {
            int32_t count = ((int32_t *)recv.count.data)[l];
            int32_t dropped = ((int32_t *)recv.dropped.data)[l];
            TEST_CHECK(count == (rank == 0 ? 7 : 0));
            TEST_CHECK(dropped == (rank == 0 ? 6 * ranks - 7 : 0));
        }
        ep_ll_combine_args combine = combine_args(&s, &t, &recv);
        combine.y = recv.x;
        TEST_OK(ep_ll_combine(buffer, &combine, NULL));
        /* In (source, token) order: all six of rank 0, the first of rank 1. */
        for (int n = 0; n < s.tokens; n++) {
            bool kept = rank == 0 || (rank == 1 && n == 0);
            TEST_CHECK(value_of(t.out[n * s.hidden]) == (kept ? 2.0f * (float)(rank + 1) : 0));
        }
        ep_ll_recv_release(&recv);
    }
    drop(&t);
    ep_buffer_destroy(buffer);
    return 0;
}

/* An expert named at two places of a token is one row with both weights; in verify mode an error.
 */
static int twins(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group);
    shape s = {4, 4, 16, 3, 1, EP_BF16, EP_SCALE_F32, false, true};
    for (int verify = 0; verify < 2; verify++) {
        ep_buffer_config config = EP_BUFFER_CONFIG_INIT;
        ep_buffer *buffer;
        config.verify = verify;
        TEST_OK(ep_buffer_create(group, &config, &buffer));
        tensors t = make(&s, rank, ranks);
        for (int n = 0; n < s.tokens * s.topk; n++) {
            t.ids[n] = n % 3 == 1 ? 1 : 0;
            t.weights[n] = n % 3 == 0 ? 1 : n % 3 == 1 ? 2 : 4;
        }
        for (int n = 0; n < s.tokens * s.hidden; n++)
            t.x[n] = code_of(1);
        ep_ll_dispatch_args args = ll_args(&s, &t, ranks);
        ep_ll_recv recv = EP_LL_RECV_INIT;
        ep_status status = ep_ll_dispatch(buffer, &args, &recv, NULL);
        if (verify) {
            TEST_CHECK(status == EP_ERR_CORRUPT || status == EP_ERR_ABORTED);
        } else {
            TEST_OK(status);
            TEST_CHECK(((int32_t *)recv.count.data)[0] == (rank < 2 ? s.tokens * ranks : 0));
            ep_ll_combine_args combine = combine_args(&s, &t, &recv);
            combine.y = recv.x;
            TEST_OK(ep_ll_combine(buffer, &combine, NULL));
            for (int n = 0; n < s.tokens * s.hidden; n++)
                TEST_CHECK(value_of(t.out[n]) == 7);
        }
        ep_ll_recv_release(&recv);
        drop(&t);
        ep_buffer_destroy(buffer);
    }
    return 0;
}

/* ------------------------------------------------------------- memory */

/* The worst routing of every kind, for many calls, both ways to give outputs: never more memory
   than the size query said, and of that most. */
static int memory(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group);
    shape s = {24, 24, 1024, 4, 4, EP_E4M3, EP_SCALE_F32, false, true};
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, NULL, &buffer));
    ep_ll_shape query = EP_LL_SHAPE_INIT;
    query.num_ranks = ranks;
    query.max_tokens = s.most;
    query.hidden = s.hidden;
    query.topk = s.topk;
    query.num_experts = (int64_t)s.experts * ranks;
    query.wire = s.wire;
    ep_ll_size size = {.size = sizeof size};
    TEST_OK(ep_ll_size_query(&query, &size));
    ep_buffer_info info = {.size = sizeof info};
    ep_ll_recv live[2] = {EP_LL_RECV_INIT, EP_LL_RECV_INIT};
    tensors t = make(&s, rank, ranks);
    size_t most = 0;
    for (int call = 0; call < 40; call++) {
        ep_ll_recv *recv = &live[call & 1];
        int target = call / 4 % ranks, turn = call % s.experts;
        for (int n = 0; n < s.tokens; n++)
            for (int k = 0; k < s.topk; k++) /* all to one rank; sometimes spread over all */
                t.ids[n * s.topk + k] = call % 5 == 0 ? (n * s.topk + k) % (s.experts * ranks)
                                                      : target * s.experts + (k + turn) % s.experts;
        ep_ll_recv_release(recv);
        ep_ll_recv none = EP_LL_RECV_INIT;
        *recv = none;
        ep_ll_dispatch_args args = ll_args(&s, &t, ranks);
        TEST_OK(ep_ll_dispatch(buffer, &args, recv, NULL));
        ep_ll_combine_args combine = combine_args(&s, &t, recv);
        TEST_OK(ep_ll_combine_buffer(buffer, recv->handle, &combine.y));
        TEST_OK(ep_ll_combine(buffer, &combine, NULL));
        combine.wire = EP_COMBINE_LOGFMT10;
        TEST_OK(ep_ll_combine(buffer, &combine, NULL));
        uint16_t *elsewhere = malloc((size_t)(combine.y.shape[0] * combine.y.stride[0]) * 2);
        memset(elsewhere, 0, (size_t)(combine.y.shape[0] * combine.y.stride[0]) * 2);
        combine.y.data = elsewhere;
        combine.wire = EP_COMBINE_BF16;
        TEST_OK(ep_ll_combine(buffer, &combine, NULL));
        free(elsewhere);
        TEST_OK(ep_buffer_query(buffer, &info));
        TEST_CHECK(info.used_bytes <= size.window_bytes);
        most = info.used_bytes > most ? info.used_bytes : most;
    }
    TEST_CHECK(most > size.window_bytes / 10 * 9);
    ep_ll_recv_release(&live[0]);
    ep_ll_recv_release(&live[1]);
    drop(&t);
    ep_buffer_destroy(buffer);
    return 0;
}

/* The figure that is documented beside the public one, and half of that at most. */
static void size_of_the_documented_shape(void **state)
{
    (void)state;
    for (int wire = 0; wire < 2; wire++) {
        ep_ll_shape query = EP_LL_SHAPE_INIT;
        ep_ll_size size = {.size = sizeof size};
        query.num_ranks = 8;
        query.max_tokens = 128;
        query.hidden = 7168;
        query.topk = 8;
        query.num_experts = 256;
        query.wire = wire ? EP_BF16 : EP_E4M3;
        assert_int_equal(ep_ll_size_query(&query, &size), EP_OK);
        assert_true(size.window_bytes + size.private_bytes < UINT64_C(1908410496) / 2);
        print_message("%s: window %zu, private %zu, address space %zu bytes\n",
                      wire ? "BF16" : "E4M3", size.window_bytes, size.private_bytes,
                      size.address_bytes);
    }
}

/* ------------------------------------------------------------- wait costs */

static int costs(ep_group *group, void *arg)
{
    (void)arg;
    int rank = ep_group_rank(group), ranks = ep_group_num_ranks(group);
    shape s = {4, 4, 16, 1, 1, EP_BF16, EP_SCALE_F32, false, true};
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, NULL, &buffer));
    tensors t = make(&s, rank, ranks);
    int64_t *cost = calloc((size_t)ranks, 8), *all = calloc((size_t)(ranks * ranks), 8);
    int32_t tokens = 0;
    for (int round = 0; round < 2; round++) {
        ep_ll_dispatch_args args = ll_args(&s, &t, ranks);
        ep_ll_recv recv = EP_LL_RECV_INIT;
        args.wait_cost = ep_tensor_1d(cost, EP_I64, ranks);
        args.expert_tokens = ep_tensor_1d(&tokens, EP_I32, 1);
        TEST_OK(ep_group_barrier(group));
        if (round == 1 && rank == 1) {
            struct timespec pause = {0, 30000000};
            nanosleep(&pause, NULL);
        }
        int32_t before = tokens;
        TEST_OK(ep_ll_dispatch(buffer, &args, &recv, NULL));
        TEST_CHECK(tokens - before == ((int32_t *)recv.count.data)[0]);
        ep_ll_recv_release(&recv);
    }
    TEST_OK(ep_buffer_wait_matrix(buffer, all, 1));
    /* everybody waited for rank 1, which waited for nobody; a device counts for wait_cost only */
    for (int r = 0; r < ranks && !test_device_wanted(); r++)
        TEST_CHECK((all[r * ranks + 1] > 20000000) == (r != 1));
    TEST_CHECK((cost[1] > 20000000) == (rank != 1));
    for (int r = 0; r < ranks; r++) /* nor is that booked to another */
        TEST_CHECK(rank == 1 || r == 1 || cost[r] + 5000000 < cost[1]);
    TEST_OK(ep_buffer_wait_cost(buffer, cost, 0));
    TEST_CHECK(cost[1] < 20000000);
    free(cost);
    free(all);
    drop(&t);
    TEST_OK(ep_group_barrier(group));
    ep_buffer_destroy(buffer);
    return 0;
}

/* ------------------------------------------------------------- the tests */

static const char *const transports[] = {
    "threads",
    "fault(threads):delay_us=100,reorder=1,repeat=10",
#if !defined(__SANITIZE_THREAD__)
    "shm",
    "fault(shm):delay_us=100,reorder=1,repeat=10",
#endif
};

static void everywhere(int ranks, test_group_fn body, void *arg)
{
    if (test_device_wanted())
        assert_int_equal(test_run_groups(test_transport(NULL), ranks, body, arg), 0);
    else
        for (size_t i = 0; i < sizeof transports / sizeof *transports; i++)
            assert_int_equal(test_run_groups(transports[i], ranks, body, arg), 0);
}

static void same_as_normal_mode(void **state)
{
    (void)state;
    int threads[] = {0, 2};
    for (int i = 0; i < 2; i++)
        for (int ranks = 1; ranks <= 5; ranks += 2)
            everywhere(ranks, equality, &threads[i]);
}

static void logfmt_against_float64(void **state)
{
    (void)state;
    everywhere(1, logfmt, NULL);
}

static void overflow_is_an_error_or_counted(void **state)
{
    (void)state;
    everywhere(3, overflow, NULL);
}

static void an_expert_named_twice(void **state)
{
    (void)state;
    everywhere(3, twins, NULL);
}

static void memory_is_as_queried(void **state)
{
    (void)state;
    if (test_device_wanted())
        skip(); /* sizes are those of the CPU's window */
    everywhere(3, memory, NULL);
}

static void who_is_late(void **state)
{
    (void)state;
    assert_int_equal(test_run_groups(test_transport("threads"), 3, costs, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(same_as_normal_mode),
        cmocka_unit_test(logfmt_against_float64),
        cmocka_unit_test(overflow_is_an_error_or_counted),
        cmocka_unit_test(an_expert_named_twice),
        cmocka_unit_test(memory_is_as_queried),
        cmocka_unit_test(size_of_the_documented_shape),
        cmocka_unit_test(who_is_late),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
