/* SPDX-License-Identifier: MIT */
/*
 * Low latency in small worlds, all of them: every routing of up to 2 ranks with 2
 * tokens each to K of E experts, with room for every row and with room for one.
 * What must arrive is worked out here by plain loops. Values are small integers,
 * exact in BF16 and in float32 sums. Sanitizers see a sample; EP_EXHAUSTIVE=N is
 * the budget of worlds per space.
 * ctest-timeout: 600
 */
#include "entrepot/low_latency.h"

#include "support/on_device.h"
#include "support/random.h"
#include "support/ranks.h"
#include "support/sanitize.h"
#include "support/small_worlds.h"
#include "support/tensors.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

enum { HIDDEN = 8, MOST_RANKS = 2, MOST_TOKENS = 2, MOST_TOPK = 2, MOST_EXPERTS = 4 };
enum { PLACES = MOST_RANKS * MOST_TOKENS * MOST_TOPK };

struct walk {
    struct space space;
    struct choices all;
    int64_t total, step, first;
    int64_t room; /* rows per expert; 0: enough for all */
};

struct world {
    const struct space *s;
    int64_t number, room;
    int64_t ids[PLACES];
    int tokens[MOST_RANKS];
};

static uint16_t code_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static float value_of(int source, int token, int channel)
{
    return (float)(1 + channel + 8 * (source * MOST_TOKENS + token));
}

static float output_of(int64_t expert, float value)
{
    return value + 32.0f * (float)expert; /* at most 128, exact in BF16 */
}

static int owner_of(const struct space *s, int64_t expert)
{
    return (int)(s->experts % s->ranks ? (expert + 1) % s->ranks
                                       : expert / (s->experts / s->ranks));
}

static const int64_t *ids_of(const struct world *w, int source, int token)
{
    return w->ids + (source * w->s->tokens + token) * w->s->topk;
}

static bool names(const struct world *w, int source, int token, int64_t expert)
{
    for (int k = 0; k < w->s->topk; k++)
        if (ids_of(w, source, token)[k] == expert)
            return true;
    return false;
}

/* Whether this token's row found room at the expert: rows come in (source, token) order. */
static bool has_room(const struct world *w, int source, int token, int64_t expert)
{
    int64_t before = 0;
    for (int s = 0; s <= source; s++)
        for (int t = 0; t < (s < source ? w->tokens[s] : token); t++)
            before += names(w, s, t, expert);
    return before < w->room;
}

/* Rows, ranges and counts of local expert `l`, which is `expert`. */
static int check_expert(const struct world *w, const ep_ll_recv *recv, int l, int64_t expert)
{
    int32_t row = 0, dropped = 0;
    for (int s = 0; s < w->s->ranks; s++) {
        int32_t first = row;
        for (int t = 0; t < w->tokens[s]; t++) {
            if (!names(w, s, t, expert))
                continue;
            if (!has_room(w, s, t, expert)) {
                dropped++;
                continue;
            }
            int64_t at = l * w->room + row++;
            TEST_CHECK(((const int32_t *)recv->source_token.data)[at] == t);
            for (int h = 0; h < HIDDEN; h++)
                TEST_CHECK(((const uint16_t *)recv->x.data)[at * HIDDEN + h] ==
                           code_of(value_of(s, t, h)));
        }
        TEST_CHECK(((const int64_t *)recv->source_range.data)[l * w->s->ranks + s] ==
                   ((int64_t)first << 32 | (row - first)));
    }
    TEST_CHECK(((const int32_t *)recv->count.data)[l] == row);
    TEST_CHECK(((const int32_t *)recv->dropped.data)[l] == dropped);
    return 0;
}

static int check_recv(const struct world *w, const ep_ll_recv *recv, int rank)
{
    int l = 0;
    for (int64_t e = 0; e < w->s->experts; e++)
        if (owner_of(w->s, e) == rank)
            TEST_CHECK(check_expert(w, recv, l++, e) == 0);
    TEST_CHECK(recv->x.shape[0] == l && recv->x.shape[1] == w->room && recv->x.shape[2] == HIDDEN);
    return 0;
}

static void run_experts(const struct world *w, int rank, uint16_t *y)
{
    int l = 0;
    for (int64_t e = 0; e < w->s->experts; e++) {
        if (owner_of(w->s, e) != rank)
            continue;
        int64_t row = l * w->room;
        for (int s = 0; s < w->s->ranks; s++)
            for (int t = 0; t < w->tokens[s]; t++)
                if (names(w, s, t, e) && has_room(w, s, t, e))
                    for (int h = 0, at = (int)row++; h < HIDDEN; h++)
                        y[at * HIDDEN + h] = code_of(output_of(e, value_of(s, t, h)));
        l++;
    }
}

static int check_out(const struct world *w, int rank, const float *weights, const uint16_t *out)
{
    for (int t = 0; t < w->tokens[rank]; t++)
        for (int h = 0; h < HIDDEN; h++) {
            float sum = 0;
            for (int k = 0; k < w->s->topk; k++) {
                int64_t e = ids_of(w, rank, t)[k];
                if (e >= 0 && has_room(w, rank, t, e))
                    sum += weights[t * w->s->topk + k] * output_of(e, value_of(rank, t, h));
            }
            TEST_CHECK(out[t * HIDDEN + h] == code_of(sum));
        }
    return 0;
}

static int run_world(ep_buffer *buffer, const struct world *w, int rank)
{
    const struct space *s = w->s;
    const float weights[MOST_TOKENS * MOST_TOPK] = {1, 0.5f, 2, 0.25f};
    uint16_t x[MOST_TOKENS * HIDDEN], out[MOST_TOKENS * HIDDEN];
    uint16_t ordinary[MOST_EXPERTS * MOST_RANKS * MOST_TOKENS * HIDDEN] = {0};
    int32_t table[MOST_EXPERTS];
    for (int i = 0; i < s->tokens * HIDDEN; i++)
        x[i] = code_of(value_of(rank, i / HIDDEN, i % HIDDEN));
    for (int64_t e = 0; e < s->experts; e++)
        table[e] = owner_of(s, e);
    ep_ll_recv recv = EP_LL_RECV_INIT;
    ep_ll_dispatch_args dispatch = EP_LL_DISPATCH_ARGS_INIT;
    int64_t tokens = w->tokens[rank];
    dispatch.x = ep_tensor_2d(x, EP_BF16, tokens, HIDDEN);
    dispatch.topk_idx = ep_tensor_2d((void *)ids_of(w, rank, 0), EP_I64, tokens, s->topk);
    dispatch.max_tokens = s->tokens;
    dispatch.num_experts = s->experts;
    dispatch.expert_rank = s->experts % s->ranks ? table : NULL;
    dispatch.max_expert_rows = w->room;
    dispatch.overflow = EP_OVERFLOW_DROP;
    TEST_OK(ep_ll_dispatch(buffer, &dispatch, &recv, NULL));
    TEST_CHECK(check_recv(w, &recv, rank) == 0);
    ep_ll_combine_args combine = EP_LL_COMBINE_ARGS_INIT;
    TEST_OK(ep_ll_combine_buffer(buffer, recv.handle, &combine.y));
    if (w->number % 2)
        combine.y.data = ordinary;
    run_experts(w, rank, combine.y.data);
    combine.topk_idx = dispatch.topk_idx;
    combine.topk_weights = ep_tensor_2d((void *)weights, EP_F32, tokens, s->topk);
    combine.handle = recv.handle;
    combine.out = ep_tensor_2d(out, EP_BF16, tokens, HIDDEN);
    memset(out, 0x5a, sizeof out);
    TEST_OK(ep_ll_combine(buffer, &combine, NULL));
    ep_ll_recv_release(&recv);
    return check_out(w, rank, weights, out);
}

static int run_walk(ep_buffer *buffer, const struct walk *walk, int rank)
{
    const struct space *s = &walk->space;
    int failed = 0;
    for (int64_t n = walk->first; n < walk->total && !failed; n += walk->step) {
        struct world w = {.s = s, .number = n, .room = walk->room};
        write_world(s, &walk->all, n, w.ids);
        for (int r = 0; r < s->ranks; r++) /* now and then a rank has fewer */
            w.tokens[r] = s->tokens - (n % 5 == 3 + r);
        failed = run_world(buffer, &w, rank);
        if (failed)
            fprintf(stderr, "R=%d T=%d K=%d E=%d room=%d: world %lld\n", s->ranks, s->tokens,
                    s->topk, (int)s->experts, (int)walk->room, (long long)n);
    }
    return failed;
}

/* Every space of one number of ranks, with room for all rows and for one. */
struct walks {
    struct walk walk[2 * MOST_EXPERTS * MOST_TOPK * MOST_TOKENS];
    int count;
};

static int run_rank(ep_group *group, void *argument)
{
    const struct walks *walks = argument;
    ep_buffer *buffer;
    TEST_OK(ep_buffer_create(group, NULL, &buffer));
    int failed = 0;
    for (int i = 0; i < walks->count && !failed; i++)
        failed = run_walk(buffer, &walks->walk[i], ep_group_rank(group));
    ep_buffer_destroy(buffer);
    return failed;
}

static void add_space(struct walks *walks, const struct space *s)
{
    struct walk walk = {.space = *s, .all = choices_of(s)};
    int64_t budget = rng_env_number("EP_EXHAUSTIVE", TEST_SANITIZED ? 60 : 200000);
    walk.total = worlds_of(s, &walk.all);
    walk.step = world_step(walk.total, budget, walk.all.count);
    walk.first = (int64_t)rng_env_seed(1) % walk.step;
    const int64_t rooms[] = {(int64_t)s->ranks * s->tokens, 1};
    for (int i = 0; i < 2; i++) {
        walk.room = rooms[i];
        walks->walk[walks->count++] = walk;
    }
    print_message(
        "R=%d T=%d K=%d E=%d: %lld of %lld worlds\n", s->ranks, s->tokens, s->topk, (int)s->experts,
        (long long)((walk.total - walk.first + walk.step - 1) / walk.step), (long long)walk.total);
}

static void all_small_worlds(void **state)
{
    (void)state;
    struct space s;
    for (s.ranks = 1; s.ranks <= MOST_RANKS; s.ranks++) {
        struct walks walks = {.count = 0};
        for (s.experts = 1; s.experts <= MOST_EXPERTS; s.experts++)
            for (s.topk = 1; s.topk <= s.experts && s.topk <= MOST_TOPK; s.topk++)
                for (s.tokens = 1; s.tokens <= MOST_TOKENS; s.tokens++)
                    add_space(&walks, &s);
        assert_int_equal(test_run_groups(test_transport("threads"), s.ranks, run_rank, &walks), 0);
        for (int i = 0; i < walks.count; i += 2) /* both rooms have the same choices */
            free(walks.walk[i].all.rows);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(all_small_worlds)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
