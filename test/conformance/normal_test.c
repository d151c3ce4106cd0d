/* SPDX-License-Identifier: MIT */
/*
 * Every mode of normal dispatch and combine over every transport, compared with
 * the reference bit for bit.
 * ctest-timeout: 300
 */
#include "support/test.h"
#include "support/world.h"

#define ONE_NODE .num_ranks = 4, .max_tokens = 13, .tokens = TOKENS_RANDOM, .hidden = 264
#define GATE .topk = 3, .num_experts = 12
#define BY_EXPERT .layout = EP_ROWS_BY_EXPERT

static const struct scenario dtypes[] = {
    {"bf16", 1, ONE_NODE, GATE, .weights = true, .num_bias = 1},
    {"f16", 2, ONE_NODE, GATE, .dtype = EP_F16, .y_dtype = EP_F16, .weights = true},
    {"f32", 3, ONE_NODE, GATE, .dtype = EP_F32, .y_dtype = EP_F32, .num_bias = 2},
    {"f32 in, bf16 back", 4, ONE_NODE, GATE, .dtype = EP_F32, .y_dtype = EP_BF16},
    {"i32 ids", 5, ONE_NODE, GATE, .topk_dtype = EP_I32, .weights = true},
    {"e4m3 given, f32 scales", 6, ONE_NODE, GATE, .dtype = EP_E4M3, .weights = true},
    {"e4m3 given, scales and rows strided", 7, ONE_NODE, GATE, .dtype = EP_E4M3, .strided = true},
    {"e4m3 given, ue8m0 scales", 8, ONE_NODE, GATE, .dtype = EP_E4M3, .scale = EP_SCALE_UE8M0},
    {"e4m3 given, ue8m0 scales strided", 9, .num_ranks = 4, .max_tokens = 9, .hidden = 1096, GATE,
     .dtype = EP_E4M3, .scale = EP_SCALE_UE8M0, .strided = true},
    {"bf16 to e4m3, f32 scales", 10, ONE_NODE, GATE, .wire = EP_WIRE_FP8, .weights = true},
    {"bf16 to e4m3, powers of two", 11, ONE_NODE, GATE, .wire = EP_WIRE_FP8, .scale = EP_SCALE_POW2,
     .strided = true},
    {"bf16 to e4m3, ue8m0", 12, ONE_NODE, GATE, .wire = EP_WIRE_FP8, .scale = EP_SCALE_UE8M0},
    {"f16 to e4m3", 13, ONE_NODE, GATE, .dtype = EP_F16, .wire = EP_WIRE_FP8},
    {"f32 to e4m3, ue8m0", 14, .num_ranks = 4, .max_tokens = 5, .hidden = 1024, GATE,
     .dtype = EP_F32, .wire = EP_WIRE_FP8, .scale = EP_SCALE_UE8M0},
};

static const struct scenario modes[] = {
    {"strided", 20, ONE_NODE, GATE, .weights = true, .strided = true, .num_bias = 2},
    {"weights carried back", 21, ONE_NODE, GATE, .weights = true, .carry = true, .strided = true},
    {"aligned counts", 22, ONE_NODE, GATE, .alignment = 8},
    {"worst case, exact", 23, ONE_NODE, GATE, .weights = true, .worst = 1},
    {"worst case, roomy", 24, ONE_NODE, GATE, .weights = true, .worst = 20, .carry = true},
    {"worst case, fp8", 25, ONE_NODE, GATE, .wire = EP_WIRE_FP8, .worst = 4},
    {"allocator", 26, ONE_NODE, GATE, .weights = true, .allocator = true},
    {"allocator, worst case", 27, ONE_NODE, GATE, .weights = true, .allocator = true, .worst = 3},
    {"y from ep_buffer_alloc", 28, ONE_NODE, GATE, .y_place = Y_ALLOC, .num_bias = 1},
    {"y over the received rows", 29, ONE_NODE, GATE, .y_place = Y_RECV, .weights = true},
    {"y ordinary and strided", 30, ONE_NODE, GATE, .strided = true},
    {"shuffled experts", 31, ONE_NODE, .topk = 3, .num_experts = 11, .table = TABLE_SHUFFLED,
     .weights = true},
    {"experts on the last rank only", 32, ONE_NODE, .topk = 3, .num_experts = 7,
     .table = TABLE_ALL_ON_LAST, .weights = true},
    {"sparse", 33, ONE_NODE, GATE, .routing = ROUTING_SPARSE, .weights = true, .num_bias = 2},
    {"nowhere", 34, ONE_NODE, GATE, .routing = ROUTING_NOWHERE, .weights = true, .num_bias = 1},
    {"nowhere, no bias", 35, ONE_NODE, GATE, .routing = ROUTING_NOWHERE},
    {"all to one rank", 36, ONE_NODE, GATE, .routing = ROUTING_ONE_RANK, .weights = true},
    {"no tokens on odd ranks", 37, .num_ranks = 4, .max_tokens = 7, .tokens = TOKENS_SOME_NONE,
     .hidden = 64, GATE, .weights = true},
    {"no tokens", 38, .num_ranks = 4, .max_tokens = 7, .tokens = TOKENS_NONE, .hidden = 64, GATE,
     .weights = true, .num_bias = 1},
    {"smallest rows", 39, .num_ranks = 4, .max_tokens = 7, .hidden = 8, .topk = 1, .num_experts = 4,
     .weights = true},
    {"every expert", 40, .num_ranks = 4, .max_tokens = 6, .hidden = 72, .topk = 8, .num_experts = 8,
     .weights = true},
};

static const struct scenario by_expert[] = {
    {"plain", 50, ONE_NODE, GATE, BY_EXPERT},
    {"weights", 51, ONE_NODE, GATE, BY_EXPERT, .weights = true, .num_bias = 1},
    {"aligned", 52, ONE_NODE, GATE, BY_EXPERT, .weights = true, .alignment = 16, .num_bias = 2},
    {"weights given to combine", 53, ONE_NODE, GATE, BY_EXPERT, .carry = true, .alignment = 4},
    {"both weights, strided", 54, ONE_NODE, GATE, BY_EXPERT, .weights = true, .carry = true,
     .strided = true, .alignment = 3},
    {"fp8", 55, ONE_NODE, GATE, BY_EXPERT, .wire = EP_WIRE_FP8, .weights = true, .alignment = 8},
    {"fp8 given, ue8m0", 56, ONE_NODE, GATE, BY_EXPERT, .dtype = EP_E4M3, .scale = EP_SCALE_UE8M0,
     .strided = true},
    {"worst case", 57, ONE_NODE, GATE, BY_EXPERT, .weights = true, .worst = 9, .alignment = 8},
    {"sparse", 58, ONE_NODE, GATE, BY_EXPERT, .weights = true, .routing = ROUTING_SPARSE},
    {"nowhere", 59, ONE_NODE, GATE, BY_EXPERT, .weights = true, .routing = ROUTING_NOWHERE,
     .alignment = 8},
    {"no tokens", 60, .num_ranks = 4, .hidden = 264, GATE, BY_EXPERT, .weights = true},
    {"shuffled experts", 61, ONE_NODE, .topk = 4, .num_experts = 13, BY_EXPERT,
     .table = TABLE_SHUFFLED, .weights = true, .topk_dtype = EP_I32},
    {"one rank has all", 62, ONE_NODE, .topk = 3, .num_experts = 5, BY_EXPERT,
     .table = TABLE_ALL_ON_LAST, .weights = true, .alignment = 4},
    {"allocator", 63, ONE_NODE, GATE, BY_EXPERT, .weights = true, .allocator = true},
    {"y from ep_buffer_alloc", 64, ONE_NODE, GATE, BY_EXPERT, .weights = true, .y_place = Y_ALLOC},
    {"y over the received rows", 65, ONE_NODE, GATE, BY_EXPERT, .weights = true, .y_place = Y_RECV},
    {"f32", 66, ONE_NODE, GATE, BY_EXPERT, .dtype = EP_F32, .y_dtype = EP_F32, .weights = true},
    {"f16", 67, ONE_NODE, GATE, BY_EXPERT, .dtype = EP_F16, .y_dtype = EP_F16, .weights = true},
};

/* Rank counts at the edges, and calls that go on by themselves. */
static const struct scenario ranks_and_events[] = {
    {"one rank", 70, .num_ranks = 1, .max_tokens = 9, .hidden = 136, GATE, .weights = true,
     .num_bias = 1},
    {"one rank, by expert", 71, .num_ranks = 1, .max_tokens = 9, .hidden = 136, GATE, BY_EXPERT,
     .weights = true, .alignment = 4},
    {"one rank, no tokens", 72, .num_ranks = 1, .max_tokens = 0, .hidden = 8, GATE},
    {"one rank, fp8, event", 73, .num_ranks = 1, .max_tokens = 9, .hidden = 136, GATE,
     .wire = EP_WIRE_FP8, .async = true, .num_threads = 1},
    {"two ranks", 74, .num_ranks = 2, .max_tokens = 9, .hidden = 1000, GATE, .weights = true},
    {"three ranks, odd everything", 75, .num_ranks = 3, .max_tokens = 11, .tokens = TOKENS_RANDOM,
     .hidden = 392, .topk = 5, .num_experts = 9, .weights = true, .num_bias = 1},
    {"events, no thread", 76, ONE_NODE, GATE, .weights = true, .async = true},
    {"events, one thread", 77, ONE_NODE, GATE, .weights = true, .async = true, .num_threads = 1},
    {"events, by expert", 78, ONE_NODE, GATE, BY_EXPERT, .weights = true, .async = true,
     .num_threads = 1, .y_place = Y_ALLOC},
    {"events, three threads", 79, ONE_NODE, GATE, .weights = true, .async = true, .num_threads = 3,
     .wire = EP_WIRE_FP8, .num_bias = 2},
    {"blocking, three threads", 80, ONE_NODE, GATE, .weights = true, .num_threads = 3},
    {"seven ranks", 81, .num_ranks = 7, .max_tokens = 5, .tokens = TOKENS_RANDOM, .hidden = 40,
     .topk = 2, .num_experts = 14, .weights = true},
};

#define SUITE(list)                                                                        \
    static void runs_##list(void **state)                                                  \
    {                                                                                      \
        (void)state;                                                                       \
        assert_int_equal(                                                                  \
            world_run(NULL, list, (int)(sizeof(list) / sizeof *(list)), SCENARIO_ALL), 0); \
    }

SUITE(dtypes)
SUITE(modes)
SUITE(by_expert)
SUITE(ranks_and_events)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(runs_dtypes),
        cmocka_unit_test(runs_modes),
        cmocka_unit_test(runs_by_expert),
        cmocka_unit_test(runs_ranks_and_events),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
