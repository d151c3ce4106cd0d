/* SPDX-License-Identifier: MIT */
/* Low latency: how much memory a shape needs. */
#include "ep/ll.h"

#include "base/error.h"
#include "codec/rows.h"
#include "ep/args.h"

#define PAGE ((size_t)EPI_POOL_ALIGN)

static size_t round_up(size_t bytes, size_t unit)
{
    return (bytes + unit - 1) / unit * unit;
}

size_t epi_ll_row_bytes(const epi_ll_shape *shape)
{
    return ep_dtype_size((ep_dtype)shape->wire) * (size_t)shape->hidden;
}

size_t epi_ll_scale_bytes(const epi_ll_shape *shape)
{
    return shape->wire == EP_E4M3 ? epi_scale_bytes((ep_scale)shape->scale, (size_t)shape->hidden)
                                  : 0;
}

static size_t place(size_t *end, size_t bytes)
{
    size_t at = *end;
    *end = round_up(at + bytes, 64);
    return at;
}

epi_ll_layout epi_ll_layout_of(const epi_ll_shape *shape, int num_ranks, int num_local, bool verify)
{
    epi_ll_layout layout;
    size_t tokens = (size_t)shape->max_tokens, local = (size_t)num_local, end = 0;
    place(&end, sizeof(epi_ll_head));
    layout.ids = place(&end, tokens * (size_t)shape->topk * sizeof(int32_t));
    layout.begin = place(&end, local * (size_t)num_ranks * sizeof(int32_t));
    layout.packed = place(&end, local * sizeof(int32_t));
    layout.sums = place(&end, verify ? tokens * sizeof(uint64_t) : 0);
    layout.rows = place(&end, tokens * epi_ll_row_bytes(shape));
    layout.scales = place(&end, tokens * epi_ll_scale_bytes(shape));
    layout.bytes = round_up(end, PAGE);
    return layout;
}

/* Every token of every rank can have at most min(K, L) rows here; no expert more than S. */
size_t epi_ll_row_bound(const epi_ll_shape *shape, int num_ranks, int num_local)
{
    size_t per_token = (size_t)(shape->topk < num_local ? shape->topk : num_local);
    size_t by_tokens = (size_t)num_ranks * (size_t)shape->max_tokens * per_token;
    size_t by_room = (size_t)num_local * (size_t)shape->expert_rows;
    return by_tokens < by_room ? by_tokens : by_room;
}

size_t epi_ll_result_words(const epi_ll_shape *shape, int num_ranks, int num_local,
                           int64_t num_tokens)
{
    size_t local = (size_t)num_local;
    size_t narrow = (size_t)num_tokens * (size_t)shape->topk + 3 * local + 1;
    return local * (size_t)num_ranks + (narrow + 1) / 2;
}

/* Memory that `rows` rows can occupy: each expert's may begin and end within a page, and the last
   page of all is always there, see reach_end in ll_memory.c. */
static size_t backing_bound(size_t rows, size_t row_bytes, int num_local)
{
    return round_up(rows * row_bytes, PAGE) + PAGE * ((size_t)num_local + 1);
}

static void sizes(const epi_ll_shape *shape, int num_ranks, int num_local, ep_ll_size *size)
{
    size_t row = epi_ll_row_bytes(shape), scales = epi_ll_scale_bytes(shape);
    size_t y_row = 2 * (size_t)shape->hidden, encoded = epi_logfmt_row_bytes((size_t)shape->hidden);
    size_t room = (size_t)num_local * (size_t)shape->expert_rows;
    size_t rows = epi_ll_row_bound(shape, num_ranks, num_local);
    size_t area = epi_ll_layout_of(shape, num_ranks, num_local, false).bytes;
    size_t copy = round_up(rows * (encoded > y_row ? encoded : y_row), PAGE);
    size_t result = sizeof(epi_ll_result) +
                    8 * epi_ll_result_words(shape, num_ranks, num_local, shape->max_tokens);
    /* Expert outputs lie in the [L, S, H] buffer or in a packed copy; a caller may use both. */
    size->window_bytes = 2 * (area + backing_bound(rows, row, num_local) +
                              backing_bound(rows, y_row, num_local) + copy);
    size->private_bytes = 2 * (room * (scales + sizeof(int32_t)) + result);
    size->address_bytes =
        2 * (area + round_up(room * row, PAGE) + round_up(room * y_row, PAGE) + copy) +
        size->private_bytes;
}

static ep_status check_shape(const ep_ll_shape *shape)
{
    const char *call = "ep_ll_size_query";
    if (shape->num_ranks < 1 || shape->num_ranks > 65536)
        return epi_bad(call, "num_ranks", shape->num_ranks, "1..65536");
    int64_t tokens = EPI_LL_MAX_ROWS / shape->num_ranks;
    if (tokens > EPI_LL_MAX_TOKENS)
        tokens = EPI_LL_MAX_TOKENS;
    if (shape->max_tokens < 1 || shape->max_tokens > tokens)
        return epi_fail(EP_ERR_ARGUMENT, "%s: max_tokens is %lld; it must be 1..%lld", call,
                        (long long)shape->max_tokens, (long long)tokens);
    if (shape->hidden < 8 || shape->hidden % 8 || shape->hidden > 1 << 24)
        return epi_bad(call, "hidden", shape->hidden, "a multiple of 8, 8..16777216");
    if (shape->num_experts < 1 || shape->num_experts > 65536)
        return epi_bad(call, "num_experts", shape->num_experts, "1..65536");
    if (shape->topk < 1 || shape->topk > shape->num_experts)
        return epi_fail(EP_ERR_ARGUMENT, "%s: topk is %d; it must be 1..%lld (num_experts)", call,
                        (int)shape->topk, (long long)shape->num_experts);
    if (shape->wire != EP_BF16 && shape->wire != EP_E4M3)
        return epi_bad(call, "wire", shape->wire, "BF16 or E4M3");
    if (shape->scale < EP_SCALE_F32 || shape->scale > EP_SCALE_UE8M0)
        return epi_bad(call, "scale", shape->scale, "0..2 (ep_scale)");
    int64_t most = shape->max_tokens * shape->num_ranks;
    if (shape->max_expert_rows < 0 || shape->max_expert_rows > most)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: max_expert_rows is %lld; it must be 0..%lld (num_ranks * max_tokens)",
                        call, (long long)shape->max_expert_rows, (long long)most);
    return EP_OK;
}

ep_status ep_ll_size_query(const ep_ll_shape *given, ep_ll_size *size)
{
    const char *call = "ep_ll_size_query";
    ep_ll_shape shape = EP_LL_SHAPE_INIT;
    EPI_TRY(epi_args_copy(call, "shape", &shape, sizeof shape, given));
    EPI_TRY(check_shape(&shape));
    const epi_ll_shape inner = {
        .max_tokens = shape.max_tokens,
        .hidden = shape.hidden,
        .num_experts = shape.num_experts,
        .expert_rows =
            shape.max_expert_rows ? shape.max_expert_rows : shape.max_tokens * shape.num_ranks,
        .topk = shape.topk,
        .wire = shape.wire,
        .scale = shape.scale,
    };
    ep_ll_size full = {.size = sizeof full};
    int local = (int)((shape.num_experts + shape.num_ranks - 1) / shape.num_ranks);
    sizes(&inner, shape.num_ranks, local, &full);
    return epi_result_copy(call, "size", size, &full, sizeof full);
}
