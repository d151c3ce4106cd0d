/* SPDX-License-Identifier: MIT */
#include "support/load.h"

#include "support/on_device.h"
#include "support/ranks.h"

#include <stdlib.h>
#include <string.h>

enum { MOST_TOKENS = 9, MOST_TOPK = 4, MOST_HIDDEN = 264, MOST_RANKS = 16 };

/* What a step is like, the same on every rank. */
typedef struct step {
    uint64_t number;
    int num_ranks, topk, num_experts, hidden;
    bool low_latency, narrow, logfmt, zero_copy, by_hook, by_expert;
    uint8_t masked[MOST_RANKS];
} step;

static uint64_t mix(uint64_t a, uint64_t b)
{
    uint64_t z = a * UINT64_C(0x9e3779b97f4a7c15) + b + 1;
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static step step_of(const load_rank *load, uint64_t number)
{
    static const int widths[] = {8, 128, 136, 264};
    /* Shapes last for some steps, as they do in use: most calls set no memory up. */
    uint64_t r = mix(number / 12, 7), s = mix(number, 8);
    step st = {.number = number, .num_ranks = ep_group_num_ranks(load->group)};
    st.hidden = widths[r % 4];
    st.topk = 1 + (int)(r / 4 % MOST_TOPK);
    st.num_experts = st.num_ranks * (1 + (int)(r / 16 % 3));
    if (st.num_experts < st.topk)
        st.num_experts = st.num_ranks * st.topk;
    st.narrow = r / 64 & 1;
    st.low_latency = s & 1;
    st.zero_copy = s / 2 & 1;
    st.by_hook = load->hooks && (s / 4 & 1);
    st.by_expert = s / 8 & 1;
    st.logfmt = s / 16 % 4 == 0;
    ep_group_query_masks(load->group, st.masked);
    return st;
}

static int tokens_of(const step *st, int rank)
{
    return (int)(mix(st->number, (uint64_t)rank + 100) % (MOST_TOKENS + 1));
}

/* Distinct experts, a few of them none. */
static int expert_of(const step *st, int rank, int token, int k)
{
    uint64_t r = mix(st->number, (uint64_t)(rank * 64 + token) + 1000);
    if (mix(r, (uint64_t)k) % 11 == 0)
        return -1;
    return (int)((r % (uint64_t)st->num_experts + (uint64_t)k) % (uint64_t)st->num_experts);
}

static int value_of(const step *st, int rank, int token, int h)
{
    return (int)((mix(st->number, (uint64_t)(rank * 64 + token)) + (uint64_t)h * 5) % 8);
}

static float weight_of(int k)
{
    return k == 0 ? 1.0f : k == 1 ? 0.5f : k == 2 ? 2.0f : 0.25f;
}

static int owner_of(const step *st, int expert)
{
    return expert / (st->num_experts / st->num_ranks);
}

/* What expert e makes of a value: small enough to stay exact. */
static int output_of(int expert, int value)
{
    return value * (1 + expert % 2);
}

static uint16_t bf16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)(bits >> 16);
}

static float float_of(uint16_t code)
{
    uint32_t bits = (uint32_t)code << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* One rank's tensors of a step. */
typedef struct inputs {
    int rank, tokens;
    uint16_t x[MOST_TOKENS * MOST_HIDDEN], out[MOST_TOKENS * MOST_HIDDEN];
    int32_t ids[MOST_TOKENS * MOST_TOPK];
    float weights[MOST_TOKENS * MOST_TOPK];
} inputs;

static void fill(const step *st, int rank, inputs *in)
{
    in->rank = rank;
    in->tokens = tokens_of(st, rank);
    for (int t = 0; t < in->tokens; t++) {
        for (int h = 0; h < st->hidden; h++)
            in->x[t * st->hidden + h] = bf16((float)value_of(st, rank, t, h));
        for (int k = 0; k < st->topk; k++) {
            in->ids[t * st->topk + k] = expert_of(st, rank, t, k);
            in->weights[t * st->topk + k] = weight_of(k);
        }
    }
    memset(in->out, 0xff, sizeof in->out);
}

static float expected_sum(const step *st, const inputs *in, int t, int h)
{
    float sum = 0;
    for (int k = 0; k < st->topk; k++) {
        int expert = expert_of(st, in->rank, t, k);
        if (expert < 0 || st->masked[owner_of(st, expert)])
            continue;
        float weight = st->low_latency || st->by_expert ? weight_of(k) : 1;
        sum += weight * (float)output_of(expert, value_of(st, in->rank, t, h));
    }
    return sum;
}

static int check_out(const step *st, const inputs *in)
{
    for (int t = 0; t < in->tokens; t++)
        for (int h = 0; h < st->hidden; h++)
            TEST_CHECK(float_of(in->out[t * st->hidden + h]) == expected_sum(st, in, t, h));
    return 0;
}

/* Reads received row `row` of an [.., H] tensor with its scales as BF16. */
static int read_row(const step *st, const ep_tensor *x, const ep_tensor *scales, int64_t row,
                    uint16_t *to)
{
    if (x->dtype == EP_BF16)
        memcpy(to, (uint16_t *)x->data + row * st->hidden, (size_t)st->hidden * 2);
    else
        TEST_OK(ep_dequantise((uint8_t *)x->data + row * st->hidden,
                              (float *)scales->data + row * ((st->hidden + 127) / 128),
                              EP_SCALE_POW2, 1, st->hidden, EP_BF16, to));
    return 0;
}

static int check_row(const step *st, const ep_tensor *x, const ep_tensor *scales, int64_t row,
                     int source, int token, uint16_t *values)
{
    TEST_CHECK(read_row(st, x, scales, row, values) == 0);
    for (int h = 0; h < st->hidden; h++)
        TEST_CHECK(float_of(values[h]) == (float)value_of(st, source, token, h));
    return 0;
}

/* ------------------------------------------------------------- normal mode */

static bool goes_to(const step *st, int source, int token, int rank)
{
    for (int k = 0; k < st->topk; k++) {
        int expert = expert_of(st, source, token, k);
        if (expert >= 0 && owner_of(st, expert) == rank)
            return true;
    }
    return false;
}

/* The sum of this rank's experts' outputs for a token, as its row by token. */
static float sum_here(const step *st, int source, int token, int rank, int h)
{
    float sum = 0;
    for (int k = 0; k < st->topk; k++) {
        int expert = expert_of(st, source, token, k);
        if (expert >= 0 && owner_of(st, expert) == rank)
            sum += (float)output_of(expert, value_of(st, source, token, h));
    }
    return sum;
}

/* Walks the rows that must have come, in their order; fills y. */
static int check_by_token(const step *st, const ep_recv *recv, int rank, uint16_t *y)
{
    uint16_t values[MOST_HIDDEN];
    int64_t row = 0;
    for (int s = 0; s < st->num_ranks; s++)
        for (int t = 0; !st->masked[s] && t < tokens_of(st, s); t++) {
            if (!goes_to(st, s, t, rank))
                continue;
            TEST_CHECK(row < recv->num_rows);
            TEST_CHECK(((int32_t *)recv->source_token.data)[row] == t);
            TEST_CHECK(check_row(st, &recv->x, &recv->scales, row, s, t, values) == 0);
            for (int h = 0; h < st->hidden; h++)
                y[row * st->hidden + h] = bf16(sum_here(st, s, t, rank, h));
            row++;
        }
    TEST_CHECK(row == recv->num_rows);
    return 0;
}

static int check_by_expert(const step *st, const ep_recv *recv, int rank, uint16_t *y)
{
    uint16_t values[MOST_HIDDEN];
    int64_t row = 0;
    int local = st->num_experts / st->num_ranks;
    for (int e = rank * local; e < (rank + 1) * local; e++)
        for (int s = 0; s < st->num_ranks; s++)
            for (int t = 0; !st->masked[s] && t < tokens_of(st, s); t++)
                for (int k = 0; k < st->topk; k++) {
                    if (expert_of(st, s, t, k) != e)
                        continue;
                    TEST_CHECK(row < recv->num_rows);
                    TEST_CHECK(((int32_t *)recv->source_token.data)[row] == t);
                    TEST_CHECK(check_row(st, &recv->x, &recv->scales, row, s, t, values) == 0);
                    for (int h = 0; h < st->hidden; h++)
                        y[row * st->hidden + h] = bf16((float)output_of(e, value_of(st, s, t, h)));
                    row++;
                }
    TEST_CHECK(row == recv->num_rows);
    return 0;
}

static ep_status combine_normal(const load_rank *load, const step *st, inputs *in,
                                const ep_recv *recv, uint16_t *y)
{
    ep_combine_args args = EP_COMBINE_ARGS_INIT;
    args.y = ep_tensor_2d(y, EP_BF16, recv->num_rows, st->hidden);
    args.handle = recv->handle;
    args.out = ep_tensor_2d(in->out, EP_BF16, in->tokens, st->hidden);
    if (st->by_expert)
        args.topk_weights = ep_tensor_2d(in->weights, EP_F32, in->tokens, st->topk);
    return ep_combine(load->buffer, &args, NULL);
}

static int normal_step(const load_rank *load, const step *st, inputs *in, ep_status *status)
{
    ep_dispatch_args args = EP_DISPATCH_ARGS_INIT;
    ep_recv recv = EP_RECV_INIT;
    args.x = ep_tensor_2d(in->x, EP_BF16, in->tokens, st->hidden);
    args.topk_idx = ep_tensor_2d(in->ids, EP_I32, in->tokens, st->topk);
    args.num_experts = st->num_experts;
    args.wire = st->narrow ? EP_WIRE_FP8 : EP_WIRE_INPUT;
    args.scale = EP_SCALE_POW2;
    args.layout = st->by_expert ? EP_ROWS_BY_EXPERT : EP_ROWS_BY_TOKEN;
    *status = ep_dispatch(load->buffer, &args, &recv, NULL);
    if (*status != EP_OK)
        return 0;
    uint16_t *y = malloc((size_t)recv.num_rows * (size_t)st->hidden * 2 + 2);
    int wrong = !y || (st->by_expert ? check_by_expert : check_by_token)(st, &recv, in->rank, y);
    if (!wrong)
        *status = combine_normal(load, st, in, &recv, y);
    if (!wrong && *status == EP_OK)
        wrong = check_out(st, in);
    free(y);
    ep_recv_release(&recv);
    ep_handle_release(recv.handle);
    return wrong;
}

/* ------------------------------------------------------------- low latency */

/* With `event` the call is left to its hook. */
static ep_status dispatch_ll(const load_rank *load, const step *st, inputs *in, ep_ll_recv *recv,
                             ep_event **event)
{
    ep_ll_dispatch_args args = EP_LL_DISPATCH_ARGS_INIT;
    args.x = ep_tensor_2d(in->x, EP_BF16, in->tokens, st->hidden);
    args.topk_idx = ep_tensor_2d(in->ids, EP_I32, in->tokens, st->topk);
    args.max_tokens = MOST_TOKENS;
    args.num_experts = st->num_experts;
    args.wire = st->narrow ? EP_E4M3 : EP_BF16;
    args.scale = EP_SCALE_POW2;
    args.completion = EP_COMPLETE_BY_HOOK;
    return ep_ll_dispatch(load->buffer, &args, recv, event);
}

static ep_status run_hook(ep_event *event)
{
    ep_status status = ep_event_wait(event);
    ep_event_release(event);
    return status;
}

/* Rows of each expert in (source, token) order; fills y. */
static int check_ll(const step *st, const ep_ll_recv *recv, int rank, const ep_tensor *y)
{
    uint16_t values[MOST_HIDDEN];
    int local = st->num_experts / st->num_ranks;
    int64_t room = recv->x.shape[1];
    for (int l = 0; l < local; l++) {
        int64_t row = 0;
        for (int s = 0; s < st->num_ranks; s++) {
            int64_t first = row;
            for (int t = 0; !st->masked[s] && t < tokens_of(st, s); t++)
                for (int k = 0; k < st->topk; k++) {
                    if (expert_of(st, s, t, k) != rank * local + l)
                        continue;
                    int64_t at = l * room + row++;
                    TEST_CHECK(((int32_t *)recv->source_token.data)[at] == t);
                    TEST_CHECK(check_row(st, &recv->x, &recv->scales, at, s, t, values) == 0);
                    for (int h = 0; h < st->hidden; h++)
                        ((uint16_t *)y->data)[at * st->hidden + h] =
                            bf16((float)output_of(rank * local + l, value_of(st, s, t, h)));
                }
            TEST_CHECK(((int64_t *)recv->source_range.data)[l * st->num_ranks + s] ==
                       (first << 32 | (row - first)));
        }
        TEST_CHECK(((int32_t *)recv->count.data)[l] == row);
    }
    return 0;
}

static ep_status combine_ll(const load_rank *load, const step *st, inputs *in,
                            const ep_ll_recv *recv, const ep_tensor *y, ep_event **event)
{
    ep_ll_combine_args args = EP_LL_COMBINE_ARGS_INIT;
    args.y = *y;
    args.topk_idx = ep_tensor_2d(in->ids, EP_I32, in->tokens, st->topk);
    args.topk_weights = ep_tensor_2d(in->weights, EP_F32, in->tokens, st->topk);
    args.handle = recv->handle;
    args.wire = st->logfmt ? EP_COMBINE_LOGFMT10 : EP_COMBINE_BF16; /* values of 1 and more: BF16 */
    args.out = ep_tensor_2d(in->out, EP_BF16, in->tokens, st->hidden);
    args.completion = EP_COMPLETE_BY_HOOK;
    return ep_ll_combine(load->buffer, &args, event);
}

/* Expert outputs in ordinary memory, which the caller frees, or in the send buffer. */
static int place_outputs(const load_rank *load, const step *st, const ep_ll_recv *recv,
                         ep_tensor *y, void **ordinary)
{
    *y = recv->x;
    y->dtype = EP_BF16;
    *ordinary = NULL;
    if (st->zero_copy)
        TEST_OK(ep_ll_combine_buffer(load->buffer, recv->handle, y));
    else
        *ordinary = y->data =
            malloc((size_t)(recv->x.shape[0] * recv->x.shape[1] * st->hidden) * 2 + 2);
    return y->data == NULL;
}

static int ll_step(const load_rank *load, const step *st, inputs *in, ep_status *status)
{
    ep_ll_recv recv = EP_LL_RECV_INIT;
    ep_event *event = NULL, **hook = st->by_hook ? &event : NULL;
    ep_tensor y;
    void *ordinary = NULL;
    *status = dispatch_ll(load, st, in, &recv, hook);
    if (event)
        *status = run_hook(event);
    int wrong = 0;
    if (*status == EP_OK)
        wrong = place_outputs(load, st, &recv, &y, &ordinary) || check_ll(st, &recv, in->rank, &y);
    event = NULL;
    if (!wrong && *status == EP_OK)
        *status = combine_ll(load, st, in, &recv, &y, hook);
    if (event)
        *status = run_hook(event);
    if (!wrong && *status == EP_OK)
        wrong = check_out(st, in);
    ep_ll_recv_release(&recv);
    free(ordinary);
    return wrong;
}

/* One of the batches in flight. */
typedef struct flight {
    step st;
    inputs in;
    ep_ll_recv recv;
    ep_event *event;
    ep_tensor y;
    void *ordinary;
} flight;

static ep_status fly(const load_rank *load, flight *f, const int *order, int *wrong)
{
    ep_status status = EP_OK;
    for (int i = 0; i < 2 && status == EP_OK; i++)
        status = dispatch_ll(load, &f[i].st, &f[i].in, &f[i].recv, &f[i].event);
    for (int i = 0; i < 2; i++) {
        flight *g = &f[order[0] ^ i];
        ep_status hook = g->event ? run_hook(g->event) : EP_OK;
        g->event = NULL;
        status = status == EP_OK ? hook : status;
        if (status == EP_OK)
            *wrong |= place_outputs(load, &g->st, &g->recv, &g->y, &g->ordinary) ||
                      check_ll(&g->st, &g->recv, g->in.rank, &g->y);
    }
    for (int i = 0; i < 2 && status == EP_OK && !*wrong; i++)
        status = combine_ll(load, &f[i].st, &f[i].in, &f[i].recv, &f[i].y, &f[i].event);
    for (int i = 0; i < 2; i++) {
        flight *g = &f[order[1] ^ i];
        ep_status hook = g->event ? run_hook(g->event) : EP_OK;
        status = status == EP_OK ? hook : status;
        if (status == EP_OK)
            *wrong |= check_out(&g->st, &g->in);
    }
    return status;
}

int load_overlap(const load_rank *load, uint64_t number, ep_status *status)
{
    int rank = ep_group_rank(load->group), wrong = 0;
    uint64_t r = mix(number, (uint64_t)rank + 50);
    const int order[2] = {(int)(r & 1), (int)(r >> 1 & 1)};
    flight *f = calloc(2, sizeof *f);
    TEST_CHECK(f != NULL);
    for (int i = 0; i < 2; i++) {
        ep_ll_recv none = EP_LL_RECV_INIT;
        f[i].recv = none;
        f[i].st = step_of(load, 2 * number + (uint64_t)i);
        f[i].st.low_latency = true;
        fill(&f[i].st, rank, &f[i].in);
    }
    *status = fly(load, f, order, &wrong);
    for (int i = 0; i < 2; i++) {
        ep_ll_recv_release(&f[i].recv);
        free(f[i].ordinary);
    }
    free(f);
    if (wrong)
        fprintf(stderr, "  overlap %llu, rank %d\n", (unsigned long long)number, rank);
    return wrong;
}

int load_step(const load_rank *load, uint64_t number, ep_status *status)
{
    step st = step_of(load, number);
    inputs *in = malloc(sizeof *in);
    TEST_CHECK(in != NULL && st.num_ranks <= MOST_RANKS);
    fill(&st, ep_group_rank(load->group), in);
    int wrong = (st.low_latency ? ll_step : normal_step)(load, &st, in, status);
    if (wrong)
        fprintf(stderr, "  step %llu, %s mode, rank %d\n", (unsigned long long)number,
                st.low_latency ? "low-latency" : "normal", in->rank);
    free(in);
    return wrong;
}

ep_status load_agree(const load_rank *load, uint64_t mine, uint64_t *least, uint64_t *most)
{
    uint64_t all[MOST_RANKS];
    uint8_t masked[MOST_RANKS];
    ep_status status = ep_group_allgather(load->group, &mine, all, sizeof mine);
    if (status == EP_OK)
        status = ep_group_query_masks(load->group, masked);
    *least = *most = mine;
    for (int r = 0; status == EP_OK && r < ep_group_num_ranks(load->group); r++) {
        if (masked[r])
            continue;
        *least = all[r] < *least ? all[r] : *least;
        *most = all[r] > *most ? all[r] : *most;
    }
    return status;
}
