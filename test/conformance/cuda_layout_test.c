/* SPDX-License-Identifier: MIT */
/*
 * Where tokens go, counted on a device: as ep_layout counts for the same ids.
 * Skipped without a device.
 */
#include "support/cuda.h"
#include "support/random.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

/* What is asked about, and how. */
struct batch {
    int64_t tokens, num_experts;
    int topk, num_ranks, per_node;
    ep_dtype dtype;
    int64_t gap;    /* elements between the rows of ids */
    bool by_table;  /* experts at ranks of a table's choice */
    unsigned wants; /* bit for each output */
};

enum { PER_RANK, PER_NODE, PER_EXPERT, IN_RANK, NUM_OUTPUTS };

static void sizes_of(const struct batch *b, size_t bytes[NUM_OUTPUTS])
{
    bytes[PER_RANK] = (size_t)b->num_ranks * 4;
    bytes[PER_NODE] = (size_t)(b->num_ranks / b->per_node) * 4;
    bytes[PER_EXPERT] = (size_t)b->num_experts * 4;
    bytes[IN_RANK] = (size_t)(b->tokens * b->num_ranks);
}

static ep_status ask(const struct batch *b, const ep_tensor *ids, const int32_t *table, void **out,
                     bool device)
{
    if (device)
        return ep_layout_on_stream(ids, b->num_experts, table, b->num_ranks, b->per_node,
                                   out[PER_RANK], out[PER_NODE], out[PER_EXPERT], out[IN_RANK],
                                   test_device.stream);
    return ep_layout(ids, b->num_experts, table, b->num_ranks, b->per_node, out[PER_RANK],
                     out[PER_NODE], out[PER_EXPERT], out[IN_RANK]);
}

/* The device's outputs begin as rubbish: nothing counts on zeros. */
static int compare(const struct batch *b, const int64_t *ids, const int64_t *known,
                   const int32_t *table)
{
    size_t bytes[NUM_OUTPUTS], table_bytes = (size_t)b->num_experts * 4;
    void *want[NUM_OUTPUTS], *got[NUM_OUTPUTS] = {NULL}, *place = NULL;
    sizes_of(b, bytes);
    ep_tensor there = tensor_new_ids(b->dtype, b->tokens, b->topk, b->gap, ids);
    ep_tensor here = ep_tensor_2d((void *)(uintptr_t)known, EP_I64, b->tokens, b->topk);
    if (table) {
        place = test_memory_new(table_bytes);
        test_memory_write(place, table, table_bytes);
    }
    for (int i = 0; i < NUM_OUTPUTS; i++) {
        want[i] = malloc(bytes[i] + 1);
        memset(want[i], 0x5a, bytes[i] + 1);
        if (b->wants >> i & 1) {
            got[i] = test_memory_new(bytes[i] + 1);
            test_memory_write(got[i], want[i], bytes[i] + 1);
        }
    }
    TEST_OK(ask(b, &here, table, want, false));
    TEST_OK(ask(b, &there, place, got, true));
    for (int i = 0; i < NUM_OUTPUTS; i++) {
        uint8_t *copy = malloc(bytes[i] + 1);
        if (got[i]) {
            TEST_OK(ep_device_copy(test_device.type, test_device.index, copy, got[i], bytes[i] + 1,
                                   test_device.stream));
            TEST_CHECK(memcmp(copy, want[i], bytes[i] + 1) == 0); /* and nothing behind it */
            test_memory_free(got[i]);
        }
        free(copy);
        free(want[i]);
    }
    test_memory_free(place);
    tensor_free(&there);
    return 0;
}

static void choose(struct rng *rng, int round, struct batch *b)
{
    static const int64_t tokens[] = {0, 1, 31, 32, 33, 1000, 1024, 1025, 4096};
    static const int ranks[] = {1, 2, 8, 31, 32, 33, 64, 100};
    b->tokens = tokens[round % 9];
    b->num_ranks = ranks[rng_below(rng, 8)];
    b->num_experts = b->num_ranks * rng_range(rng, 1, 40);
    b->topk = 1 + round % 32;
    b->topk = b->topk < b->num_experts ? b->topk : (int)b->num_experts;
    b->per_node = b->num_ranks % 4 ? 1 : 4;
    b->dtype = round % 2 ? EP_I32 : EP_I64;
    b->gap = (int64_t)rng_below(rng, 3);
    b->by_table = rng_below(rng, 2);
    b->wants = round % 4 ? (unsigned)rng_below(rng, 16) : 15;
}

/* Ids beyond the experts are -1 to the CPU, which would refuse them, and count nowhere either. */
static int one_round(struct rng *rng, int round)
{
    struct batch b;
    choose(rng, round, &b);
    int64_t n = b.tokens * b.topk;
    int64_t *ids = test_zeros(n, 8), *known = test_zeros(n, 8);
    int32_t *table = test_zeros(b.num_experts, 4);
    routing_fill(rng, (enum routing)(round % ROUTING_COUNT), b.tokens, b.topk, b.num_experts,
                 b.num_ranks, ids);
    for (int64_t i = 0; i < b.num_experts; i++)
        table[i] = (int32_t)rng_below(rng, (uint64_t)b.num_ranks);
    for (int64_t i = 0; i < n; i++) {
        if (round % 3 == 0 && rng_below(rng, 9) == 0)
            ids[i] = rng_below(rng, 2) ? b.num_experts + (int64_t)rng_below(rng, 5) : -7;
        known[i] = ids[i] < 0 || ids[i] >= b.num_experts ? -1 : ids[i];
    }
    int wrong = compare(&b, ids, known, b.by_table ? table : NULL);
    if (wrong)
        fprintf(stderr, "round %d: T %d, K %d, E %d, R %d\n", round, (int)b.tokens, b.topk,
                (int)b.num_experts, b.num_ranks);
    free(ids);
    free(known);
    free(table);
    return wrong;
}

static int rounds(int rank, int num_ranks, void *argument)
{
    struct rng rng;
    (void)rank, (void)num_ranks, (void)argument;
    TEST_OK(test_device_enter(0));
    rng_seed(&rng, rng_env_seed(5));
    for (int round = 0; round < 288; round++)
        if (one_round(&rng, round))
            return 1;
    test_device_leave();
    return 0;
}

static void as_on_the_cpu(void **state)
{
    (void)state;
    if (!cuda_present())
        skip();
    assert_int_equal(test_run_processes(1, rounds, NULL), 0);
}

static int wrong_calls(int rank, int num_ranks, void *argument)
{
    int64_t ids[2] = {0, 1};
    (void)rank, (void)num_ranks, (void)argument;
    ep_tensor host = ep_tensor_2d(ids, EP_I64, 2, 1), device = host;
    device.device = EP_DEVICE_CUDA;
    TEST_CHECK(ep_layout_on_stream(&host, 2, NULL, 2, 1, NULL, NULL, NULL, NULL, NULL) ==
               EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("ep_layout_on_stream: topk_idx.device is 0"));
    TEST_CHECK(ep_layout_on_stream(&device, 3, NULL, 2, 1, NULL, NULL, NULL, NULL, NULL) ==
               EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("num_experts is 3; without expert_rank it must be a multiple of the 2"));
    TEST_CHECK(ep_layout_on_stream(&device, 2, NULL, 2, 3, NULL, NULL, NULL, NULL, NULL) ==
               EP_ERR_ARGUMENT);
    device.dtype = EP_F32;
    TEST_CHECK(ep_layout_on_stream(&device, 2, NULL, 2, 1, NULL, NULL, NULL, NULL, NULL) ==
               EP_ERR_ARGUMENT);
    TEST_CHECK(CUDA_SAYS("ep_layout_on_stream: topk_idx.dtype is F32 (3)"));
    return 0;
}

/* Needs no device. */
static void wrong_arguments(void **state)
{
    (void)state;
    assert_int_equal(test_run_processes(1, wrong_calls, NULL), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(as_on_the_cpu),
        cmocka_unit_test(wrong_arguments),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
