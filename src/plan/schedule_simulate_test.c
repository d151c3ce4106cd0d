/* SPDX-License-Identifier: MIT */
/* The simulator against a naive one, and against the published formulas. */
#include "plan/schedule.h"

#include "support/test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static ep_schedule *make(int32_t method, int32_t ranks, int32_t chunks)
{
    ep_schedule_config config = {sizeof config, method, ranks, chunks, 0};
    ep_schedule *s = NULL;
    return ep_schedule_create(&config, &s) == EP_OK ? s : NULL;
}

static void assert_bubble(int32_t method, int32_t ranks, int32_t chunks,
                          const ep_schedule_costs *costs, double makespan, double bubble)
{
    double measured, bubbles[64];
    ep_schedule *s = make(method, ranks, chunks);
    assert_non_null(s);
    assert_int_equal(ep_schedule_simulate(s, costs, 1, &measured, bubbles, NULL, NULL), EP_OK);
    assert_true(measured == makespan);
    for (int32_t rank = 0; rank < ranks; rank++)
        assert_true(bubbles[rank] == bubble);
    ep_schedule_destroy(s);
}

static int32_t most_live(int32_t method, int32_t ranks, int32_t chunks)
{
    int32_t peak[64], most = 0;
    ep_schedule *s = make(method, ranks, chunks);
    assert_non_null(s);
    assert_int_equal(ep_schedule_check(s, peak, NULL), EP_OK);
    for (int32_t rank = 0; rank < ranks; rank++)
        most = peak[rank] > most ? peak[rank] : most;
    ep_schedule_destroy(s);
    return most;
}

/* PP 8, C 20, F=1, B=2, W=1, F&B=3: the published table in numbers. */
static void published_case_is_exact(void **state)
{
    (void)state;
    const ep_schedule_costs costs = {sizeof costs, 1, 2, -1, 1, 3, 0};
    assert_bubble(EP_SCHEDULE_DUALPIPE, 8, 20, &costs, 66, 6);
    assert_bubble(EP_SCHEDULE_ZB1P, 8, 20, &costs, 67, 7);
    assert_bubble(EP_SCHEDULE_1F1B, 8, 20, &costs, 81, 21);
    assert_bubble(EP_SCHEDULE_DUALPIPEV, 4, 20, &costs, 126, 6);
    assert_int_equal(most_live(EP_SCHEDULE_DUALPIPE, 8, 20), 9);
    assert_int_equal(most_live(EP_SCHEDULE_DUALPIPEV, 4, 20), 9);
    assert_int_equal(most_live(EP_SCHEDULE_ZB1P, 8, 20), 8);
    assert_int_equal(most_live(EP_SCHEDULE_1F1B, 8, 20), 8);
}

/* The formulas hold while F = B - W; each pair is given its own length. */
static void published_formulas_hold(void **state)
{
    (void)state;
    for (int32_t ranks = 2; ranks <= 16; ranks += 2) {
        for (int32_t chunks = 2 * ranks; chunks <= 2 * ranks + 12; chunks += 2) {
            const double f = 3, w = 3, b = f + w;
            const ep_schedule_costs c = {sizeof c, f, b, -1, w, -1, 0};
            double work = chunks * (f + b), bubble = (ranks - 1) * (f + b);
            assert_bubble(EP_SCHEDULE_1F1B, ranks, chunks, &c, work + bubble, bubble);
            bubble = (ranks - 1) * (f + b - 2 * w);
            assert_bubble(EP_SCHEDULE_ZB1P, ranks, chunks, &c, work + bubble, bubble);
            bubble = (ranks / 2.0 - 1) * (f + b + b - 3 * w);
            assert_bubble(EP_SCHEDULE_DUALPIPE, ranks, chunks, &c, work + bubble, bubble);
            bubble = (ranks - 1) * (f + b + b - 3 * w); /* PP/2 devices are R here */
            assert_bubble(EP_SCHEDULE_DUALPIPEV, ranks, chunks, &c, 2 * work + bubble, bubble);
            bubble = (ranks - 1) * f; /* ZB-V: only the slant of the pipeline itself */
            assert_bubble(EP_SCHEDULE_ZBV, ranks, chunks, &c, 2 * work + bubble, bubble);
            if (chunks % ranks == 0) { /* interleaved: that of 1F1B over the stages a rank */
                bubble = (ranks - 1) * (f + b);
                assert_bubble(EP_SCHEDULE_INTERLEAVED, ranks, chunks, &c, 2 * work + bubble,
                              bubble);
            }
        }
    }
}

/*
 * Naive simulation: sweeps all computations until no end time changes, reading the
 * dependencies from the model (stage by stage) rather than from sends and receives.
 */
typedef struct naive {
    const ep_schedule *s;
    const ep_schedule_costs *costs;
    double end[2][2][64][64]; /* forward or input gradient, stream, stage, chunk */
} naive;

static double arrival(const naive *n, int back, int32_t rank, int stream, int from, int chunk)
{
    int32_t owner = n->s->owner[stream * n->s->shape.stages + from] / n->s->shape.phases;
    return n->end[back][stream][from][chunk] + (owner == rank ? 0 : n->costs[owner].comm);
}

static double half_ready(const naive *n, int back, int32_t rank, int phase, int chunk)
{
    int32_t place = rank * n->s->shape.phases + phase;
    int stream = n->s->stream[place], stage = n->s->stage[place];
    int from = back ? stage + 1 : stage - 1;
    return from < 0 || from >= n->s->shape.stages ? 0 : arrival(n, back, rank, stream, from, chunk);
}

static void half_done(naive *n, int back, int32_t rank, int phase, int chunk, double when)
{
    int32_t place = rank * n->s->shape.phases + phase;
    n->end[back][n->s->stream[place]][n->s->stage[place]][chunk] = when;
}

static double naive_op(naive *n, int32_t rank, const ep_schedule_op *o, double now)
{
    const ep_schedule_costs *c = &n->costs[rank];
    const double cost[] = {c->forward, c->backward, c->input_grad, c->weight_grad, c->pair};
    bool f = o->kind == EP_OP_FORWARD || o->kind == EP_OP_PAIR;
    bool b = o->kind != EP_OP_FORWARD && o->kind != EP_OP_WEIGHT_GRAD;
    int back_phase = o->kind == EP_OP_PAIR ? o->back_phase : o->phase;
    int back_chunk = o->kind == EP_OP_PAIR ? o->back_chunk : o->chunk;
    if (f)
        now = fmax(now, half_ready(n, 0, rank, o->phase, o->chunk));
    if (b)
        now = fmax(now, half_ready(n, 1, rank, back_phase, back_chunk));
    now += cost[o->kind];
    if (f)
        half_done(n, 0, rank, o->phase, o->chunk, now);
    if (b)
        half_done(n, 1, rank, back_phase, back_chunk, now);
    return now;
}

static double naive_makespan(naive *n, double *ends)
{
    double makespan = 0, before = -1;
    memset(n->end, 0, sizeof n->end);
    while (makespan != before) {
        before = makespan;
        makespan = 0;
        /* A sum over all ends also catches a change that leaves the last one alone. */
        for (int32_t rank = 0; rank < n->s->shape.ranks; rank++) {
            double now = 0;
            for (size_t i = n->s->first[rank]; i < n->s->first[rank + 1]; i++) {
                const ep_schedule_op *o = &n->s->ops[i];
                if (o->kind == EP_OP_SEND || o->kind == EP_OP_RECV)
                    continue;
                now = naive_op(n, rank, o, now);
                ends[i] = now;
                makespan += now;
            }
        }
    }
    double last = 0;
    for (size_t i = 0; i < n->s->first[n->s->shape.ranks]; i++)
        last = fmax(last, ends[i]);
    return last;
}

static double random_cost(void)
{
    static uint64_t x = 1234567;
    x = x * 6364136223846793005u + 1442695040888963407u;
    return (double)(x >> 44) / 65536.0;
}

static void compare_with_naive(int32_t method, int32_t ranks, int32_t chunks)
{
    static naive n;
    ep_schedule_costs costs[16];
    ep_schedule *s = make(method, ranks, chunks);
    if (!s)
        return;
    for (int i = 0; i < 16; i++)
        costs[i] = (ep_schedule_costs){sizeof *costs, random_cost(), random_cost(), random_cost(),
                                       random_cost(), random_cost(), random_cost()};
    n.s = s;
    n.costs = costs;
    size_t total = s->first[ranks];
    double *ends = calloc(total, sizeof *ends), *end = calloc(total, sizeof *end);
    double *start = calloc(total, sizeof *start), makespan, bubble[16];
    assert_true(ends && end && start);
    double expected = naive_makespan(&n, ends);
    assert_int_equal(ep_schedule_simulate(s, costs, ranks, &makespan, bubble, start, end), EP_OK);
    assert_true(makespan == expected);
    for (int32_t rank = 0; rank < ranks; rank++) {
        double busy = 0;
        for (size_t i = s->first[rank]; i < s->first[rank + 1]; i++) {
            if (s->ops[i].kind == EP_OP_SEND || s->ops[i].kind == EP_OP_RECV)
                continue;
            assert_true(end[i] == ends[i] && start[i] <= end[i]);
            busy += end[i] - start[i];
        }
        assert_true(fabs(makespan - busy - bubble[rank]) <= 1e-9 * makespan);
    }
    free(ends);
    free(end);
    free(start);
    ep_schedule_destroy(s);
}

static void agrees_with_naive_simulation(void **state)
{
    (void)state;
    for (int32_t ranks = 1; ranks <= 12; ranks++)
        for (int32_t chunks = 1; chunks <= 40; chunks += 1 + chunks / 7)
            for (int32_t method = 0; method < EP_SCHEDULE_METHODS; method++)
                compare_with_naive(method, ranks, chunks);
}

static void communication_lengthens(void **state)
{
    (void)state;
    ep_schedule_costs c = EP_SCHEDULE_COSTS_INIT;
    c.comm = 0.5;
    /* One chunk through two ranks: F, comm, F, B, comm, B. */
    double makespan, bubble[2];
    ep_schedule *s = make(EP_SCHEDULE_1F1B, 2, 1);
    assert_int_equal(ep_schedule_simulate(s, &c, 1, &makespan, bubble, NULL, NULL), EP_OK);
    assert_true(makespan == 7.0 && bubble[0] == 4.0 && bubble[1] == 4.0);
    ep_schedule_destroy(s);
}

static void bad_costs_are_named(void **state)
{
    (void)state;
    double makespan;
    ep_schedule *s = make(EP_SCHEDULE_1F1B, 2, 1);
    ep_schedule_costs c = EP_SCHEDULE_COSTS_INIT;
    c.forward = -1;
    assert_int_equal(ep_schedule_simulate(s, &c, 1, &makespan, NULL, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(),
                        "ep_schedule_simulate: forward of costs[0] is -1; allowed finite, from 0");
    c.forward = NAN;
    assert_int_equal(ep_schedule_simulate(s, &c, 1, &makespan, NULL, NULL, NULL), EP_ERR_ARGUMENT);
    c.forward = 1;
    c.weight_grad = 3; /* so that I = B - W would be negative */
    assert_int_equal(ep_schedule_simulate(s, &c, 1, &makespan, NULL, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(
        ep_last_error(),
        "ep_schedule_simulate: input_grad of costs[0] is -1; allowed finite, from 0");
    assert_int_equal(ep_schedule_simulate(s, &c, 3, &makespan, NULL, NULL, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(),
                        "ep_schedule_simulate: cost_count is 3; allowed 1 or ranks (2)");
    ep_schedule_destroy(s);
}

static void choice_follows_time_and_memory(void **state)
{
    (void)state;
    ep_schedule_choose_config c = EP_SCHEDULE_CHOOSE_CONFIG_INIT;
    ep_schedule_candidate all[EP_SCHEDULE_METHODS];
    int32_t method = -1;
    c.ranks = 8;
    c.chunks = 24;
    assert_int_equal(ep_schedule_choose(&c, all, &method), EP_OK);
    /* With F = I = W the V of ZB-V has the least bubble: (R-1)/2 of a rank's share. */
    assert_int_equal(method, EP_SCHEDULE_ZBV);
    assert_true(all[EP_SCHEDULE_ZBV].makespan == 75.5);
    assert_true(all[EP_SCHEDULE_1F1B].makespan == 93 && all[EP_SCHEDULE_1F1B].memory == 8);
    assert_true(all[EP_SCHEDULE_INTERLEAVED].makespan == 82.5);
    assert_true(all[EP_SCHEDULE_DUALPIPE].makespan == 78 && all[EP_SCHEDULE_DUALPIPE].memory == 9);
    assert_true(all[EP_SCHEDULE_DUALPIPEV].memory == 8.5);
    /* DualPipe holds the parameters twice. */
    c.parameter_memory = 10;
    assert_int_equal(ep_schedule_choose(&c, all, &method), EP_OK);
    assert_true(all[EP_SCHEDULE_DUALPIPE].memory == 29 && all[EP_SCHEDULE_ZBV].memory == 18);
    /* A pair that hides communication makes the dual schedules worth their memory. */
    ep_schedule_costs costs = EP_SCHEDULE_COSTS_INIT;
    costs.pair = 2.5;
    c.costs = &costs;
    c.parameter_memory = 0;
    assert_int_equal(ep_schedule_choose(&c, NULL, &method), EP_OK);
    assert_true(method == EP_SCHEDULE_DUALPIPE || method == EP_SCHEDULE_DUALPIPEV);
    c.memory = 8;
    assert_int_equal(ep_schedule_choose(&c, all, &method), EP_OK);
    assert_int_equal(method, EP_SCHEDULE_ZBV);
    assert_int_equal(all[EP_SCHEDULE_DUALPIPE].fits, 0);
    c.memory = 7;
    assert_int_equal(ep_schedule_choose(&c, all, &method), EP_ERR_CAPACITY);
    assert_string_equal(ep_last_error(),
                        "ep_schedule_choose: memory is 7; the smallest method, 1f1b, takes 8");
}

static void choice_skips_what_rules_forbid(void **state)
{
    (void)state;
    ep_schedule_choose_config c = EP_SCHEDULE_CHOOSE_CONFIG_INIT;
    ep_schedule_candidate all[EP_SCHEDULE_METHODS];
    int32_t method;
    c.ranks = 3;
    c.chunks = 4;
    assert_int_equal(ep_schedule_choose(&c, all, &method), EP_OK);
    assert_int_equal(all[EP_SCHEDULE_DUALPIPE].allowed, 0);
    assert_int_equal(all[EP_SCHEDULE_INTERLEAVED].allowed, 0);
    assert_int_equal(all[EP_SCHEDULE_ZB1P].allowed, 1);
    c.ranks = 0;
    assert_int_equal(ep_schedule_choose(&c, all, &method), EP_ERR_ARGUMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_case_is_exact),
        cmocka_unit_test(published_formulas_hold),
        cmocka_unit_test(agrees_with_naive_simulation),
        cmocka_unit_test(communication_lengthens),
        cmocka_unit_test(bad_costs_are_named),
        cmocka_unit_test(choice_follows_time_and_memory),
        cmocka_unit_test(choice_skips_what_rules_forbid),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
