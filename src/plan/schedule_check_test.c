/* SPDX-License-Identifier: MIT */
/* The checker must accept what is legal and refuse everything else, naming the place. */
#include "plan/schedule.h"

#include "support/test.h"

#include <stdlib.h>
#include <string.h>

/* A schedule taken apart so that a test can spoil it. */
typedef struct parts {
    ep_schedule_layout layout;
    int32_t stage[64], stream[64];
    size_t count[16];
    ep_schedule_op ops[8192];
} parts;

static parts p;

static void take_apart(const ep_schedule *s)
{
    size_t total = s->first[s->shape.ranks];
    assert_true(total < sizeof p.ops / sizeof *p.ops && epi_schedule_places(s) <= 64);
    p.layout =
        (ep_schedule_layout){sizeof p.layout, s->shape.ranks,  s->shape.phases, s->shape.streams,
                             s->shape.stages, s->shape.chunks, p.stage,         p.stream};
    memcpy(p.stage, s->stage, (size_t)epi_schedule_places(s) * sizeof *p.stage);
    memcpy(p.stream, s->stream, (size_t)epi_schedule_places(s) * sizeof *p.stream);
    memcpy(p.ops, s->ops, total * sizeof *p.ops);
    for (int32_t rank = 0; rank < s->shape.ranks; rank++)
        p.count[rank] = s->first[rank + 1] - s->first[rank];
}

static void load(int32_t method, int32_t ranks, int32_t chunks)
{
    ep_schedule_config config = {sizeof config, method, ranks, chunks, 0};
    ep_schedule *s;
    assert_int_equal(ep_schedule_create(&config, &s), EP_OK);
    take_apart(s);
    ep_schedule_destroy(s);
}

static ep_schedule_op *op(int32_t rank, size_t position)
{
    size_t first = 0;
    for (int32_t i = 0; i < rank; i++)
        first += p.count[i];
    assert_true(position < p.count[rank]);
    return &p.ops[first + position];
}

static void insert(int32_t rank, size_t position, ep_schedule_op what)
{
    p.count[rank]++;
    ep_schedule_op *at = op(rank, position);
    memmove(at + 1, at, (size_t)(p.ops + sizeof p.ops / sizeof *p.ops - 1 - at) * sizeof *at);
    *at = what;
}

static ep_schedule_op take(int32_t rank, size_t position)
{
    ep_schedule_op *at = op(rank, position), taken = *at;
    memmove(at, at + 1, (size_t)(p.ops + sizeof p.ops / sizeof *p.ops - 1 - at) * sizeof *at);
    p.count[rank]--;
    return taken;
}

static void move(int32_t rank, size_t from, size_t to)
{
    insert(rank, to, take(rank, from));
}

static ep_status verdict(int32_t *slots)
{
    ep_schedule *s = NULL;
    assert_int_equal(ep_schedule_assemble(&p.layout, p.ops, p.count, 0, &s), EP_OK);
    ep_status status = ep_schedule_check(s, NULL, slots);
    ep_schedule_destroy(s);
    return status;
}

static void assert_illegal(const char *message)
{
    assert_int_equal(verdict(NULL), EP_ERR_FORMAT);
    assert_string_equal(ep_last_error(), message);
}

/*
 * 1F1B, R=2, C=2.
 * rank 0: F0 >F0 F1 >F1 <B0 B0 <B1 B1
 * rank 1: <F0 F0 B0 >B0 <F1 F1 B1 >B1
 */
static void spoiled_1f1b_is_refused(void **state)
{
    (void)state;
    load(EP_SCHEDULE_1F1B, 2, 2);
    assert_int_equal(verdict(NULL), EP_OK);
    take(0, 3);
    assert_illegal("schedule: rank 0: send of activation 0.1 to rank 1 is missing");
    load(EP_SCHEDULE_1F1B, 2, 2);
    take(1, 4);
    assert_illegal("schedule: rank 1, position 4, F0.1: activation 0.1 has not been received from "
                   "rank 0");
    load(EP_SCHEDULE_1F1B, 2, 2);
    take(0, 5);
    assert_illegal("schedule: rank 0: B or I of 0.0 is missing");
    load(EP_SCHEDULE_1F1B, 2, 2);
    op(0, 3)->peer = 0;
    assert_illegal("schedule: rank 0, position 3, send of activation 0.1 to rank 0: it goes to "
                   "rank 1");
    load(EP_SCHEDULE_1F1B, 2, 2);
    op(1, 4)->peer = 1;
    assert_illegal("schedule: rank 1, position 4, receive of activation 0.1 from rank 1: it comes "
                   "from rank 0");
    load(EP_SCHEDULE_1F1B, 2, 2);
    move(0, 1, 0);
    assert_illegal("schedule: rank 0, position 0, send of activation 0.0 to rank 1: it has not "
                   "been made yet");
    load(EP_SCHEDULE_1F1B, 2, 2);
    insert(0, 2, *op(0, 1));
    assert_illegal("schedule: rank 0, position 2, send of activation 0.0 to rank 1: it is sent "
                   "twice");
    load(EP_SCHEDULE_1F1B, 2, 2);
    insert(1, 1, *op(1, 0));
    assert_illegal("schedule: rank 1, position 1, receive of activation 0.0 from rank 0: it is "
                   "received twice");
    load(EP_SCHEDULE_1F1B, 2, 2);
    insert(0, 1, *op(0, 0));
    assert_illegal("schedule: rank 0, position 1, F0.0: F0.0 is done twice");
    load(EP_SCHEDULE_1F1B, 2, 2);
    move(1, 2, 1);
    assert_illegal("schedule: rank 1, position 1, B0.0: F0.0 has not been done");
    load(EP_SCHEDULE_1F1B, 2, 2);
    op(1, 0)->payload = EP_PAYLOAD_GRADIENT;
    assert_illegal("schedule: rank 1, position 0, receive of gradient 0.0 from rank 0: this phase "
                   "receives nothing of the kind");
    load(EP_SCHEDULE_1F1B, 2, 2);
    op(0, 1)->payload = EP_PAYLOAD_GRADIENT;
    assert_illegal("schedule: rank 0, position 1, send of gradient 0.0 to rank 1: this phase sends "
                   "nothing of the kind");
}

static void swapped_messages_are_refused(void **state)
{
    (void)state;
    load(EP_SCHEDULE_1F1B, 2, 2);
    /* Rank 0 sends chunk 1 first while rank 1 takes chunk 0 first. */
    move(0, 1, 3);
    assert_illegal("schedule: rank 1, position 0, receive of activation 0.0 from rank 0: rank 0 "
                   "sends chunk 1 before it");
}

static void deadlock_is_refused(void **state)
{
    (void)state;
    load(EP_SCHEDULE_1F1B, 2, 2);
    /* Rank 0 waits for the gradient of chunk 0 before it sends chunk 1, which rank 1
     * wants before it makes that gradient. */
    move(0, 4, 2);
    move(0, 5, 3);
    move(1, 4, 2);
    move(1, 5, 3);
    assert_illegal("schedule: rank 0, position 2, receive of gradient 0.0 from rank 1: deadlock: "
                   "it waits for ever");
}

/* ZB1P, R=2, C=3, rank 1: <F0 F0 I0 >B0 <F1 F1 I1 >B1 W0 <F2 F2 I2 >B2 W1 W2 */
static void weight_gradients_leave_in_order(void **state)
{
    (void)state;
    load(EP_SCHEDULE_ZB1P, 2, 3);
    assert_int_equal(op(1, 13)->kind, EP_OP_WEIGHT_GRAD);
    move(1, 13, 14);
    assert_illegal("schedule: rank 1, position 13, W0.2: the oldest deferred weight gradient is "
                   "W0.1");
    load(EP_SCHEDULE_ZB1P, 2, 3);
    take(1, 14);
    assert_illegal("schedule: rank 1: W of 0.2 is missing");
    load(EP_SCHEDULE_ZB1P, 2, 3);
    move(1, 8, 0);
    assert_illegal("schedule: rank 1, position 0, W0.0: no weight gradient has been deferred");
    load(EP_SCHEDULE_ZB1P, 2, 3);
    op(1, 2)->kind = EP_OP_BACKWARD;
    assert_illegal("schedule: rank 1, position 8, W0.0: the oldest deferred weight gradient is "
                   "W0.1");
    load(EP_SCHEDULE_ZB1P, 2, 3);
    op(1, 6)->chunk = 0;
    assert_illegal("schedule: rank 1, position 6, I0.0: the gradient of 0.0 is done twice");
}

/* ZB-V, R=1: F0 and F1 of a chunk meet on the rank without a message. */
static void local_hand_over_is_ordered(void **state)
{
    (void)state;
    load(EP_SCHEDULE_ZBV, 1, 1);
    move(0, 1, 0);
    assert_illegal("schedule: rank 0, position 0, F1.0: phase 0 of this rank has not made its "
                   "activation yet");
}

static void a_pair_is_of_two_chunks(void **state)
{
    (void)state;
    load(EP_SCHEDULE_1F1B, 1, 1);
    op(0, 0)->kind = EP_OP_PAIR;
    take(0, 1);
    assert_illegal("schedule: rank 0, position 0, (F0.0+B0.0): a chunk is paired with itself");
}

/* Two streams over two ranks, taken in opposite orders: both chunks of stream 0 are
 * under way before rank 1 takes the first. */
static void slots_are_counted(void **state)
{
    (void)state;
    static const int32_t stage[] = {0, 0, 1, 1}, stream[] = {0, 1, 0, 1};
    const ep_schedule_layout layout = {sizeof layout, 2, 2, 2, 2, 2, stage, stream};
    ep_schedule_op ops[16];
    const size_t count[] = {8, 8};
    for (int i = 0; i < 16; i++) {
        int rank = i / 8, back = i / 4 % 2, phase = i / 2 % 2;
        ops[i] = (ep_schedule_op){.kind = back ? EP_OP_BACKWARD : EP_OP_FORWARD,
                                  .phase = (uint8_t)(rank ? 1 - phase : phase),
                                  .chunk = i % 2};
    }
    ep_schedule *s = NULL;
    int32_t slots = 0, peak[2];
    assert_int_equal(ep_schedule_assemble(&layout, ops, count, 1, &s), EP_OK);
    assert_int_equal(ep_schedule_check(s, peak, &slots), EP_OK);
    assert_int_equal(slots, 2);
    assert_int_equal(peak[0], 4);
    assert_int_equal(peak[1], 4);
    ep_schedule_destroy(s);
}

/*
 * An independent judge: plays all ranks at once with sets of what has been made
 * and lists of what is under way, with none of the checker's passes.
 */
typedef struct judge {
    const ep_schedule *s;
    bool made[2][2][64][64]; /* payload, stream, stage, chunk: made by that stage */
    bool got[2][2][64][64];  /* arrived at that stage from another rank */
    bool done[2][2][64][64]; /* [0] weight gradient done, [1] deferred */
    int32_t line[2][2][64][64], sent[2][2][64], taken[2][2][64]; /* under way to a stage */
} judge;

static bool judge_ready(judge *j, int payload, int rank, int stream, int stage, int chunk)
{
    int from = payload ? stage + 1 : stage - 1;
    if (from < 0 || from >= j->s->shape.stages)
        return true;
    int32_t owner = j->s->owner[stream * j->s->shape.stages + from] / j->s->shape.phases;
    return owner == rank ? j->made[payload][stream][from][chunk]
                         : j->got[payload][stream][stage][chunk];
}

/* 1: done, 0: must wait, -1: illegal whatever the others do. */
static int judge_step(judge *j, int rank, const ep_schedule_op *o, int *queue, int *head, int *tail)
{
    int32_t place = rank * j->s->shape.phases + o->phase;
    int stream = j->s->stream[place], stage = j->s->stage[place], chunk = o->chunk;
    int to = o->payload ? stage - 1 : stage + 1, from = o->payload ? stage + 1 : stage - 1;
    int far = o->kind == EP_OP_SEND ? to : from;
    switch (o->kind) {
    case EP_OP_PAIR: {
        ep_schedule_op f = {.kind = EP_OP_FORWARD, .phase = o->phase, .chunk = o->chunk};
        ep_schedule_op b = {.kind = EP_OP_BACKWARD, .phase = o->back_phase, .chunk = o->back_chunk};
        int first = judge_step(j, rank, &b, queue, head, tail);
        return first == 1 ? judge_step(j, rank, &f, queue, head, tail) : first;
    }
    case EP_OP_FORWARD:
        if (j->made[0][stream][stage][chunk] || !judge_ready(j, 0, rank, stream, stage, chunk))
            return -1;
        j->made[0][stream][stage][chunk] = true;
        return 1;
    case EP_OP_BACKWARD:
    case EP_OP_INPUT_GRAD:
        if (!j->made[0][stream][stage][chunk] || j->made[1][stream][stage][chunk] ||
            !judge_ready(j, 1, rank, stream, stage, chunk))
            return -1;
        j->made[1][stream][stage][chunk] = true;
        if (o->kind == EP_OP_BACKWARD)
            j->done[0][stream][stage][chunk] = true;
        else
            queue[(*tail)++] = place * 64 + chunk;
        return 1;
    case EP_OP_WEIGHT_GRAD:
        if (*head == *tail || queue[(*head)++] != place * 64 + chunk)
            return -1;
        j->done[0][stream][stage][chunk] = true;
        return 1;
    default:
        if (far < 0 || far >= j->s->shape.stages || o->peer == rank ||
            j->s->owner[stream * j->s->shape.stages + far] / j->s->shape.phases != o->peer)
            return -1;
    }
    int32_t *line = j->line[o->payload][stream][o->kind == EP_OP_SEND ? to : stage];
    if (o->kind == EP_OP_SEND) {
        int32_t n = j->sent[o->payload][stream][to]++;
        if (!j->made[o->payload][stream][stage][chunk] || n == 64)
            return -1;
        line[n] = chunk;
        return 1;
    }
    int32_t *taken = &j->taken[o->payload][stream][stage];
    if (*taken == j->sent[o->payload][stream][stage])
        return 0;
    if (line[(*taken)++] != chunk || j->got[o->payload][stream][stage][chunk])
        return -1;
    j->got[o->payload][stream][stage][chunk] = true;
    return 1;
}

static bool judge_complete(const judge *j)
{
    const ep_schedule_shape *h = &j->s->shape;
    for (int stream = 0; stream < h->streams; stream++) {
        for (int stage = 0; stage < h->stages; stage++) {
            for (int chunk = 0; chunk < h->chunks; chunk++)
                if (!j->made[0][stream][stage][chunk] || !j->made[1][stream][stage][chunk] ||
                    !j->done[0][stream][stage][chunk])
                    return false;
            for (int payload = 0; payload < 2; payload++)
                if (j->sent[payload][stream][stage] != j->taken[payload][stream][stage])
                    return false;
        }
    }
    return true;
}

static bool judge_legal(const ep_schedule *s)
{
    static judge j;
    static int queue[16][8192];
    int head[16] = {0}, tail[16] = {0};
    size_t next[16] = {0};
    bool moved = true, finished = true;
    memset(&j, 0, sizeof j);
    j.s = s;
    while (moved) {
        moved = false;
        for (int rank = 0; rank < s->shape.ranks; rank++) {
            if (s->first[rank] + next[rank] == s->first[rank + 1])
                continue;
            int step = judge_step(&j, rank, &s->ops[s->first[rank] + next[rank]], queue[rank],
                                  &head[rank], &tail[rank]);
            if (step < 0)
                return false;
            next[rank] += (size_t)step;
            moved |= step > 0;
        }
    }
    for (int rank = 0; rank < s->shape.ranks; rank++)
        finished &= s->first[rank] + next[rank] == s->first[rank + 1];
    return finished && judge_complete(&j);
}

static uint32_t random_below(uint32_t bound)
{
    static uint64_t x = 88172645463325252u;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return (uint32_t)(x >> 20) % bound;
}

static void mutate(void)
{
    int32_t rank = (int32_t)random_below((uint32_t)p.layout.ranks);
    uint32_t count = (uint32_t)p.count[rank];
    uint32_t at = random_below(count);
    switch (random_below(5)) {
    case 0:
        take(rank, at);
        break;
    case 1:
        insert(rank, at, *op(rank, random_below(count)));
        break;
    case 2:
        op(rank, at)->chunk = (int32_t)random_below((uint32_t)p.layout.chunks);
        break;
    case 3: /* a near move is often legal, a far one seldom */
        move(rank, at, at + 1 < count ? at + 1 : at);
        break;
    default:
        move(rank, at, random_below(count));
    }
}

static void agrees_with_the_judge_on_mutations(void **state)
{
    (void)state;
    int legal = 0, illegal = 0;
    for (int round = 0; round < 6000; round++) {
        int32_t method = round % EP_SCHEDULE_METHODS;
        int32_t ranks = 2 * (1 + (int32_t)random_below(2));
        load(method, ranks, 2 * ranks + 4 * (int32_t)random_below(2));
        for (uint32_t i = random_below(3); i < 3; i++)
            mutate();
        ep_schedule *s = NULL;
        assert_int_equal(ep_schedule_assemble(&p.layout, p.ops, p.count, 0, &s), EP_OK);
        bool expected = judge_legal(s);
        ep_status status = ep_schedule_check(s, NULL, NULL);
        if (status != (expected ? EP_OK : EP_ERR_FORMAT))
            fail_msg("round %d: the judge says %s, the checker %s", round,
                     expected ? "legal" : "illegal", status ? ep_last_error() : "legal");
        legal += expected;
        illegal += !expected;
        ep_schedule_destroy(s);
    }
    assert_true(legal > 100 && illegal > 3000);
}

static void dropping_any_operation_is_refused(void **state)
{
    (void)state;
    for (int32_t method = 0; method < EP_SCHEDULE_METHODS; method++) {
        load(method, 4, 8);
        for (int32_t rank = 0; rank < 4; rank++) {
            for (size_t at = 0; at < p.count[rank]; at++) {
                ep_schedule_op taken = take(rank, at);
                assert_int_equal(verdict(NULL), EP_ERR_FORMAT);
                insert(rank, at, taken);
            }
        }
        assert_int_equal(verdict(NULL), EP_OK);
    }
}

static void assert_not_assembled(const char *message)
{
    ep_schedule *s = NULL;
    assert_int_equal(ep_schedule_assemble(&p.layout, p.ops, p.count, 0, &s), EP_ERR_ARGUMENT);
    assert_null(s);
    assert_string_equal(ep_last_error(), message);
}

static void fields_out_of_range_are_named(void **state)
{
    (void)state;
    load(EP_SCHEDULE_1F1B, 2, 2);
    op(1, 3)->chunk = 2;
    assert_not_assembled("ep_schedule_assemble: rank 1, position 3: chunk is 2; allowed 0 to 1");
    load(EP_SCHEDULE_1F1B, 2, 2);
    op(1, 3)->peer = -1;
    assert_not_assembled("ep_schedule_assemble: rank 1, position 3: peer is -1; allowed 0 to 1");
    load(EP_SCHEDULE_1F1B, 2, 2);
    op(0, 0)->kind = 7;
    assert_not_assembled("ep_schedule_assemble: rank 0, position 0: kind is 7; allowed 0 to 6");
    load(EP_SCHEDULE_1F1B, 2, 2);
    p.stage[1] = 0;
    assert_not_assembled(
        "ep_schedule_assemble: stream 0, stage 0 is on rank 0 and on rank 1; allowed once");
    p.layout.stages = 3;
    assert_not_assembled(
        "ep_schedule_assemble: stages is 3; ranks * phases (2) over streams (1) is allowed");
    /* Sends in a list that asks for them to be derived. */
    load(EP_SCHEDULE_1F1B, 2, 2);
    ep_schedule *s = NULL;
    assert_int_equal(ep_schedule_assemble(&p.layout, p.ops, p.count, 1, &s), EP_ERR_ARGUMENT);
    assert_int_equal(ep_schedule_check(NULL, NULL, NULL), EP_ERR_ARGUMENT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(spoiled_1f1b_is_refused),
        cmocka_unit_test(swapped_messages_are_refused),
        cmocka_unit_test(deadlock_is_refused),
        cmocka_unit_test(weight_gradients_leave_in_order),
        cmocka_unit_test(local_hand_over_is_ordered),
        cmocka_unit_test(a_pair_is_of_two_chunks),
        cmocka_unit_test(slots_are_counted),
        cmocka_unit_test(agrees_with_the_judge_on_mutations),
        cmocka_unit_test(dropping_any_operation_is_refused),
        cmocka_unit_test(fields_out_of_range_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
