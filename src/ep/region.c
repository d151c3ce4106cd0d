/* SPDX-License-Identifier: MIT */
#include "ep/region.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"
#include "ep/buffer.h"

static size_t place(size_t *end, int64_t rows, size_t bytes)
{
    size_t at = *end;
    *end = (at + (size_t)rows * bytes + 255) & ~(size_t)255;
    return at;
}

epi_region epi_region_of(const epi_row_shape *shape, int64_t rows)
{
    epi_region region;
    size_t end = 0;
    region.x = place(&end, rows, shape->row);
    region.scales = place(&end, rows, shape->scales);
    region.ids = place(&end, rows, shape->ids);
    region.weights = place(&end, rows, shape->weights);
    region.source = place(&end, rows, sizeof(int32_t));
    region.sums = place(&end, rows, shape->sum);
    region.bytes = end;
    return region;
}

epi_row_shape epi_row_shape_of(ep_dtype wire, int64_t hidden, ep_scale scale, int topk,
                               size_t topk_bytes, bool weights, bool verify)
{
    return (epi_row_shape){
        .row = ep_dtype_size(wire) * (size_t)hidden,
        .scales = wire == EP_E4M3 ? epi_scale_bytes(scale, (size_t)hidden) : 0,
        .ids = topk_bytes * (size_t)topk,
        .weights = weights ? sizeof(float) * (size_t)topk : 0,
        .sum = verify ? sizeof(uint64_t) : 0,
    };
}

/* Mean number of distinct ranks of a token when its experts are drawn uniformly. */
static double expected_ranks(int num_ranks, int topk, int64_t num_experts)
{
    double absent = 1; /* no expert of one given rank drawn, without replacement */
    double elsewhere = (double)num_experts - (double)num_experts / num_ranks;
    for (int k = 0; k < topk; k++)
        absent *= elsewhere - k > 0 ? (elsewhere - k) / ((double)num_experts - k) : 0;
    return num_ranks * (1 - absent);
}

static ep_status check_shape(const ep_normal_shape *shape)
{
    const char *call = "ep_normal_size_query";
    if (shape->num_ranks < 1 || shape->num_ranks > 65536)
        return epi_bad(call, "num_ranks", shape->num_ranks, "1..65536");
    if (shape->num_tokens < 0 || shape->num_tokens > INT32_MAX)
        return epi_bad(call, "num_tokens", shape->num_tokens, "0..2147483647");
    if (shape->hidden < 8 || shape->hidden % 8 || shape->hidden > INT32_MAX)
        return epi_bad(call, "hidden", shape->hidden, "a positive multiple of 8");
    if (shape->num_experts < 1 || shape->num_experts > 65536)
        return epi_bad(call, "num_experts", shape->num_experts, "1..65536");
    if (shape->topk < 1 || shape->topk > shape->num_experts)
        return epi_fail(EP_ERR_ARGUMENT, "%s: topk is %d; it must be 1..%lld (num_experts)", call,
                        (int)shape->topk, (long long)shape->num_experts);
    if (shape->max_experts < 0 || shape->max_experts > 65536)
        return epi_bad(call, "max_experts", shape->max_experts, "0..65536");
    if (shape->dtype != EP_E4M3 &&
        ((unsigned)shape->dtype >= 32 || !(EPI_FLOAT_DTYPES >> shape->dtype & 1)))
        return epi_bad(call, "dtype", shape->dtype, "BF16, F16, F32 or E4M3");
    if (shape->scale < EP_SCALE_F32 || shape->scale > EP_SCALE_UE8M0)
        return epi_bad(call, "scale", shape->scale, "0..2 (ep_scale)");
    if (shape->layout != EP_ROWS_BY_TOKEN && shape->layout != EP_ROWS_BY_EXPERT)
        return epi_bad(call, "layout", shape->layout, "0 or 1 (ep_row_layout)");
    if (shape->expert_alignment < 1)
        return epi_bad(call, "expert_alignment", shape->expert_alignment, "at least 1");
    if (shape->topk_bytes != 4 && shape->topk_bytes != 8)
        return epi_bad(call, "topk_bytes", shape->topk_bytes, "4 or 8");
    return EP_OK;
}

ep_status ep_normal_size_query(const ep_normal_shape *given, ep_normal_size *size)
{
    ep_normal_shape shape = EP_NORMAL_SHAPE_INIT;
    EPI_TRY(epi_args_copy("ep_normal_size_query", "shape", &shape, sizeof shape, given));
    EPI_TRY(check_shape(&shape));
    bool by_expert = shape.layout == EP_ROWS_BY_EXPERT;
    epi_row_shape row =
        epi_row_shape_of(shape.dtype, shape.hidden, shape.scale, by_expert ? 1 : shape.topk,
                         (size_t)shape.topk_bytes, true, false);
    int64_t local = (shape.num_experts + shape.num_ranks - 1) / shape.num_ranks;
    int64_t rows_per_token = by_expert ? (shape.topk < local ? shape.topk : local) : 1;
    double share = by_expert ? (double)shape.topk / shape.num_ranks
                             : expected_ranks(shape.num_ranks, shape.topk, shape.num_experts) /
                                   shape.num_ranks;
    int64_t sent = shape.num_tokens * shape.num_ranks;
    int64_t padding = by_expert ? local * (shape.expert_alignment - 1) : 0;
    ep_normal_size full = {
        .size = sizeof full,
        .control_bytes = epi_control_area_bytes(shape.num_ranks, shape.max_experts),
        .row_bytes = row.row + row.scales + row.ids + row.weights + sizeof(int32_t),
    };
    size_t expected =
        epi_region_of(&row, (int64_t)((double)sent * share + 0.5) + padding / 2).bytes;
    size_t worst = epi_region_of(&row, sent * rows_per_token + padding).bytes;
    full.expected_bytes = full.control_bytes + expected;
    full.worst_bytes = full.control_bytes + worst;
    return epi_result_copy("ep_normal_size_query", "size", size, &full, sizeof full);
}
