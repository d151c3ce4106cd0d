/* SPDX-License-Identifier: MIT */
/*
 * The reference itself, against a world small enough to be worked out by hand:
 * two ranks, experts 0 and 1 on rank 0, 2 and 3 on rank 1.
 */
#include "support/formats.h"
#include "support/reference.h"
#include "support/test.h"

#include <math.h>
#include <string.h>

static int64_t idx0[] = {0, 2, 3, 2, 1, -1}, idx1[] = {-1, -1, 1, 0};
static float weights0[] = {1, 2, 3, 4, 5, 6}, weights1[] = {7, 8, 9, 10};
static float x0[3][8] = {{10}, {11}, {12}}, x1[2][8] = {{20}, {21}};
static const int32_t table[] = {0, 0, 1, 1};

static struct ref_world world = {.num_ranks = 2,
                                 .hidden = 8,
                                 .topk = 2,
                                 .num_experts = 4,
                                 .expert_rank = table,
                                 .dtype = EP_F32,
                                 .expert_alignment = 1};

static const struct ref_tokens tokens[] = {{3, (uint8_t *)x0, NULL, idx0, weights0},
                                           {2, (uint8_t *)x1, NULL, idx1, weights1}};

static float first(const struct ref_recv *recv, int64_t row)
{
    return (float)format_load(EP_F32, recv->x, row * 8);
}

static void places_by_token(void **state)
{
    (void)state;
    struct ref_recv recv[2];
    world.layout = EP_ROWS_BY_TOKEN;
    ref_dispatch(&world, tokens, 0, &recv[0]);
    ref_dispatch(&world, tokens, 1, &recv[1]);
    const int64_t ids0[] = {0, -1, 1, -1, 1, 0}, ids1[] = {-1, 0, 1, 0};
    const float got0[] = {1, 0, 5, 0, 9, 10}, got1[] = {0, 2, 3, 4};
    const int32_t source0[] = {0, 2, 1}, source1[] = {0, 1};
    const int32_t offset0[] = {0, 2, 3}, offset1[] = {0, 2, 2};
    const int32_t experts0[] = {2, 2}, experts1[] = {2, 1};
    assert_int_equal(recv[0].rows, 3);
    assert_int_equal(recv[1].rows, 2);
    assert_memory_equal(recv[0].topk_idx, ids0, sizeof ids0);
    assert_memory_equal(recv[1].topk_idx, ids1, sizeof ids1);
    assert_memory_equal(recv[0].topk_weights, got0, sizeof got0);
    assert_memory_equal(recv[1].topk_weights, got1, sizeof got1);
    assert_memory_equal(recv[0].source_token, source0, sizeof source0);
    assert_memory_equal(recv[1].source_token, source1, sizeof source1);
    assert_memory_equal(recv[0].source_offset, offset0, sizeof offset0);
    assert_memory_equal(recv[1].source_offset, offset1, sizeof offset1);
    assert_memory_equal(recv[0].tokens_per_expert, experts0, sizeof experts0);
    assert_memory_equal(recv[1].tokens_per_expert, experts1, sizeof experts1);
    assert_true(first(&recv[0], 0) == 10 && first(&recv[0], 1) == 12 && first(&recv[0], 2) == 21);

    /* y = 100 * (rank + 1) + row: token 0 of rank 0 went to both, row 0 each. */
    float y0[3][8] = {{100}, {101}, {102}}, y1[2][8] = {{200}, {201}}, out[3][8];
    const uint8_t *y[] = {(uint8_t *)y0, (uint8_t *)y1};
    struct ref_combine c = {.dtype = EP_F32, .y = y};
    ref_combine(&world, recv, 0, 3, &c, (uint8_t *)out, NULL);
    assert_true(out[0][0] == 300 && out[1][0] == 201 && out[2][0] == 101);
    ref_combine(&world, recv, 1, 2, &c, (uint8_t *)out, NULL);
    assert_true(out[0][0] == 0 && out[1][0] == 102);
    ref_recv_free(&recv[0]);
    ref_recv_free(&recv[1]);
}

static void places_by_expert(void **state)
{
    (void)state;
    struct ref_recv recv[2];
    world.layout = EP_ROWS_BY_EXPERT;
    world.expert_alignment = 4;
    ref_dispatch(&world, tokens, 0, &recv[0]);
    ref_dispatch(&world, tokens, 1, &recv[1]);
    world.expert_alignment = 1;
    const int64_t ids[] = {0, 0, -1, -1, 1, 1, -1, -1};
    const float weights[] = {1, 10, 0, 0, 5, 9, 0, 0};
    const int32_t source[] = {0, 1, -1, -1, 2, 1, -1, -1}, offset[] = {0, 4, 8};
    assert_int_equal(recv[0].rows, 8);
    assert_int_equal(recv[0].num_rows, 4);
    assert_int_equal(recv[1].num_rows, 3);
    assert_memory_equal(recv[0].topk_idx, ids, sizeof ids);
    assert_memory_equal(recv[0].topk_weights, weights, sizeof weights);
    assert_memory_equal(recv[0].source_token, source, sizeof source);
    assert_memory_equal(recv[0].expert_offset, offset, sizeof offset);
    assert_memory_equal(recv[0].tokens_per_expert, ((int32_t[]){4, 4}), 8);

    /* Rank 0's token 1 chose expert 3 (weight 3) then 2 (weight 4). */
    float y0[8][8] = {{0}}, y1[8][8] = {{0}}, out[3][8];
    y1[1][0] = 10;  /* expert 2, from token 1 of rank 0 */
    y1[4][0] = 100; /* expert 3 */
    const uint8_t *y[] = {(uint8_t *)y0, (uint8_t *)y1};
    struct ref_combine c = {.dtype = EP_F32, .y = y, .weights = weights0};
    ref_combine(&world, recv, 0, 3, &c, (uint8_t *)out, NULL);
    assert_true(out[1][0] == 3 * 100 + 4 * 10);
    ref_recv_free(&recv[0]);
    ref_recv_free(&recv[1]);
}

static void counts_a_layout(void **state)
{
    (void)state;
    int32_t per_rank[2], per_node[1], per_expert[4];
    uint8_t in_rank[6];
    ref_layout(&world, &tokens[0], 2, per_rank, per_node, per_expert, in_rank);
    assert_memory_equal(per_rank, ((int32_t[]){2, 2}), sizeof per_rank);
    assert_int_equal(per_node[0], 3);
    assert_memory_equal(per_expert, ((int32_t[]){1, 1, 2, 1}), sizeof per_expert);
    assert_memory_equal(in_rank, ((uint8_t[]){1, 1, 0, 1, 1, 0}), sizeof in_rank);
}

static uint16_t half(ep_dtype dtype, double value)
{
    uint16_t code = 0;
    format_store(dtype, &code, 0, value);
    return code;
}

static uint8_t e4m3(double value)
{
    uint8_t code = 0;
    format_store(EP_E4M3, &code, 0, value);
    return code;
}

static void rounds_formats(void **state)
{
    (void)state;
    assert_int_equal(half(EP_BF16, 1), 0x3f80);
    assert_int_equal(half(EP_BF16, -0.0), 0x8000);
    assert_int_equal(half(EP_BF16, 1 + 0x1p-8), 0x3f80); /* a tie, to even */
    assert_int_equal(half(EP_BF16, 1 + 0x3p-8), 0x3f82); /* a tie, to even */
    assert_int_equal(half(EP_BF16, 3.4e38), 0x7f80);     /* over the largest */
    assert_int_equal(half(EP_BF16, 0x1p-133), 0x0001);   /* the least subnormal */
    assert_int_equal(half(EP_F16, 65504), 0x7bff);
    assert_int_equal(half(EP_F16, 65519), 0x7bff);
    assert_int_equal(half(EP_F16, 65520), 0x7c00);
    assert_int_equal(half(EP_F16, 0x1p-24), 0x0001);
    assert_int_equal(half(EP_F16, 0x1p-25), 0x0000);
    assert_int_equal(e4m3(448), 0x7e);
    assert_int_equal(e4m3(1e9), 0x7e);
    assert_int_equal(e4m3(-464), 0xfe);
    assert_int_equal(e4m3((double)NAN) & 0x7f, 0x7f);
    assert_int_equal(e4m3(1), 0x38);
    assert_int_equal(e4m3(0x1p-9), 0x01);
    assert_int_equal(e4m3(17), 0x58); /* between 16 and 18, to even */
    for (int code = 0; code < 256; code++)
        if ((code & 0x7f) != 0x7f)
            assert_int_equal(e4m3(format_load(EP_E4M3, &(uint8_t){(uint8_t)code}, 0)), code);
    for (int code = 0; code < 65536; code++) {
        uint16_t bits = (uint16_t)code;
        double bf16 = format_load(EP_BF16, &bits, 0), f16 = format_load(EP_F16, &bits, 0);
        assert_true(isnan(bf16) || half(EP_BF16, bf16) == code);
        assert_true(isnan(f16) || half(EP_F16, f16) == code);
    }
}

static void quantises_a_row(void **state)
{
    (void)state;
    float row[136] = {448, -224, 1}, scales[2];
    uint8_t codes[136], bytes[4];
    row[128] = 896;
    row[129] = 2;
    format_quantise(EP_F32, row, 136, EP_SCALE_F32, codes, scales);
    assert_true(scales[0] == 1 && scales[1] == 2);
    assert_int_equal(codes[0], 0x7e);
    assert_int_equal(codes[1], 0x76 | 0x80);
    assert_int_equal(codes[2], 0x38);
    assert_int_equal(codes[128], 0x7e);
    assert_int_equal(codes[129], 0x38);
    row[0] = 449; /* a scale a little over 1 goes up to 2 */
    format_quantise(EP_F32, row, 136, EP_SCALE_POW2, codes, scales);
    assert_true(scales[0] == 2 && scales[1] == 2);
    format_quantise(EP_F32, row, 136, EP_SCALE_UE8M0, codes, bytes);
    assert_memory_equal(bytes, ((uint8_t[]){128, 128, 0, 0}), 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(places_by_token), cmocka_unit_test(places_by_expert),
        cmocka_unit_test(counts_a_layout), cmocka_unit_test(rounds_formats),
        cmocka_unit_test(quantises_a_row),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
