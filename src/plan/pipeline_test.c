/* SPDX-License-Identifier: MIT */
/*
 * The executor over threads and mailboxes: callbacks in the schedule's order, each
 * with the message that its neighbour stage made for it.
 */
#include "entrepot/pipeline.h"

#include "plan/schedule.h"

#include "support/ranks.h"
#include "support/test.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_RANKS = 6, MAX_LANES = 4, MAX_ROOM = 8, WORDS = 3 };

typedef struct mailbox {
    uint64_t message[MAX_ROOM][WORDS];
    int put, taken;
} mailbox;

/* One job of all ranks: the schedule and its mail. */
typedef struct job {
    ep_schedule *s;
    int32_t slots;
    bool overlap; /* give the pair its own callback */
    pthread_mutex_t lock;
    pthread_cond_t changed;
    mailbox mail[MAX_RANKS][MAX_LANES];
} job;

typedef struct worker {
    job *job;
    int32_t rank;
    size_t next; /* computation expected next, among the rank's operations */
    int mistakes;
    int fail_at; /* callbacks until one fails; negative: never */
} worker;

static ep_status put(void *context, int32_t to, int32_t lane, const void *data, size_t bytes)
{
    job *j = ((worker *)context)->job;
    mailbox *m = &j->mail[to][lane];
    pthread_mutex_lock(&j->lock);
    while (m->put - m->taken == j->slots)
        pthread_cond_wait(&j->changed, &j->lock);
    memcpy(m->message[m->put++ % MAX_ROOM], data, bytes);
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
    return EP_OK;
}

static ep_status get(void *context, int32_t from, int32_t lane, void *data, size_t bytes)
{
    worker *w = context;
    job *j = w->job;
    mailbox *m = &j->mail[w->rank][lane];
    pthread_mutex_lock(&j->lock);
    while (m->put == m->taken)
        pthread_cond_wait(&j->changed, &j->lock);
    memcpy(data, m->message[m->taken++ % MAX_ROOM], bytes);
    pthread_cond_broadcast(&j->changed);
    pthread_mutex_unlock(&j->lock);
    return from == w->rank ? EP_ERR_STATE : EP_OK;
}

static uint64_t token(int payload, const ep_pipeline_step *step, int stage)
{
    return (uint64_t)payload << 48 | (uint64_t)stage << 32 | (uint64_t)step->stream << 16 |
           (uint64_t)step->chunk;
}

/* What comes in must be of the neighbour stage, and what goes out is marked as this one's. */
static void pass(worker *w, int payload, const ep_pipeline_step *step, const void *in, void *out)
{
    int last = w->job->s->shape.stages - 1, from = payload ? step->stage + 1 : step->stage - 1;
    bool has_in = from >= 0 && from <= last, has_out = step->stage != (payload ? 0 : last);
    w->mistakes += has_in != (in != NULL) || has_out != (out != NULL);
    if (in)
        w->mistakes += ((const uint64_t *)in)[payload ? 2 : 1] != token(payload, step, from);
    if (out)
        ((uint64_t *)out)[payload ? 2 : 1] = token(payload, step, step->stage);
}

/* The computation that the schedule has next. */
static const ep_schedule_op *upcoming(worker *w)
{
    const ep_schedule_op *ops = w->job->s->ops + w->job->s->first[w->rank];
    while (ops[w->next].kind == EP_OP_SEND || ops[w->next].kind == EP_OP_RECV)
        w->next++;
    return &ops[w->next];
}

/* It must be this one. */
static ep_status expect(worker *w, int kind, const ep_pipeline_step *first,
                        const ep_pipeline_step *second)
{
    const ep_schedule_op *op = upcoming(w);
    w->next++;
    w->mistakes += op->kind != kind || op->phase != first->phase || op->chunk != first->chunk;
    if (second)
        w->mistakes += op->back_phase != second->phase || op->back_chunk != second->chunk;
    return w->fail_at-- == 0 ? EP_ERR_DEVICE : EP_OK;
}

/* A pair without its own callback comes as a forward, then its backward. */
static bool in_pair(worker *w)
{
    return upcoming(w)->kind == EP_OP_PAIR;
}

static ep_status on_forward(void *context, const ep_pipeline_step *step, const void *input,
                            void *output)
{
    worker *w = context;
    pass(w, 0, step, input, output);
    return in_pair(w) ? EP_OK : expect(w, EP_OP_FORWARD, step, NULL);
}

static ep_status on_backward(void *context, const ep_pipeline_step *step, const void *output_grad,
                             void *input_grad)
{
    worker *w = context;
    pass(w, 1, step, output_grad, input_grad);
    if (in_pair(w)) {
        w->next++;
        return EP_OK;
    }
    return expect(w, EP_OP_BACKWARD, step, NULL);
}

static ep_status on_input_grad(void *context, const ep_pipeline_step *step, const void *output_grad,
                               void *input_grad)
{
    pass(context, 1, step, output_grad, input_grad);
    return expect(context, EP_OP_INPUT_GRAD, step, NULL);
}

static ep_status on_weight_grad(void *context, const ep_pipeline_step *step)
{
    return expect(context, EP_OP_WEIGHT_GRAD, step, NULL);
}

static ep_status on_pair(void *context, const ep_pipeline_step *forward, const void *input,
                         void *output, const ep_pipeline_step *backward, const void *output_grad,
                         void *input_grad)
{
    pass(context, 0, forward, input, output);
    pass(context, 1, backward, output_grad, input_grad);
    return expect(context, EP_OP_PAIR, forward, backward);
}

static const ep_pipeline_config config = {sizeof config, WORDS * sizeof(uint64_t), 0};

static ep_pipeline_callbacks callbacks_of(worker *w)
{
    return (ep_pipeline_callbacks){
        sizeof(ep_pipeline_callbacks),   w, on_forward, on_backward, on_input_grad, on_weight_grad,
        w->job->overlap ? on_pair : NULL};
}

static int run_rank(int rank, int num_ranks, void *arg)
{
    job *j = arg;
    worker w = {.job = j, .rank = rank, .fail_at = -1};
    ep_pipeline_callbacks callbacks = callbacks_of(&w);
    const ep_pipeline_link link = {sizeof link, &w, put, get, NULL};
    for (int round = 0; round < 2; round++) {
        w.next = 0;
        TEST_OK(ep_pipeline_run(j->s, rank, &config, &callbacks, num_ranks > 1 ? &link : NULL));
        size_t count = j->s->first[rank + 1] - j->s->first[rank];
        while (w.next < count && j->s->ops[j->s->first[rank] + w.next].kind == EP_OP_SEND)
            w.next++;
        TEST_CHECK(w.next == count);
    }
    TEST_CHECK(w.mistakes == 0);
    return 0;
}

static ep_schedule *make(int32_t method, int32_t ranks, int32_t chunks)
{
    ep_schedule_config c = {sizeof c, method, ranks, chunks, 0};
    ep_schedule *s = NULL;
    return ep_schedule_create(&c, &s) == EP_OK ? s : NULL;
}

static void every_method_runs(void **state)
{
    (void)state;
    for (int32_t method = 0; method < EP_SCHEDULE_METHODS; method++) {
        for (int32_t ranks = 1; ranks <= MAX_RANKS; ranks++) {
            job j = {.s = make(method, ranks, 2 * ranks), .overlap = ranks % 4 < 2};
            if (!j.s)
                continue;
            assert_int_equal(ep_schedule_check(j.s, NULL, &j.slots), EP_OK);
            pthread_mutex_init(&j.lock, NULL);
            pthread_cond_init(&j.changed, NULL);
            assert_int_equal(test_run_threads(ranks, run_rank, &j), 0);
            pthread_mutex_destroy(&j.lock);
            pthread_cond_destroy(&j.changed);
            ep_schedule_destroy(j.s);
        }
    }
}

static void failures_name_the_operation(void **state)
{
    (void)state;
    job j = {.s = make(EP_SCHEDULE_ZBV, 1, 2), .overlap = true};
    for (int at = 0; at < 12; at++) {
        worker w = {.job = &j, .fail_at = at};
        ep_pipeline_callbacks callbacks = callbacks_of(&w);
        assert_int_equal(ep_pipeline_run(j.s, 0, &config, &callbacks, NULL), EP_ERR_DEVICE);
        if (at == 3)
            assert_string_equal(ep_last_error(), "pipeline: rank 0, position 3, W1.0: the callback "
                                                 "returned EP_ERR_DEVICE");
    }
    ep_schedule_destroy(j.s);
}

static ep_status broken_link(void *context, int32_t to, int32_t lane, const void *data,
                             size_t bytes)
{
    (void)context, (void)to, (void)lane, (void)data, (void)bytes;
    return EP_ERR_TIMEOUT;
}

static ep_status told;

static void note_given_up(void *context, ep_status why)
{
    (void)context;
    told = why;
}

static void arguments_are_named(void **state)
{
    (void)state;
    job j = {.s = make(EP_SCHEDULE_DUALPIPE, 2, 4), .overlap = true};
    worker w = {.job = &j, .fail_at = -1};
    ep_pipeline_callbacks callbacks = callbacks_of(&w);
    ep_pipeline_link link = {sizeof link, &w, broken_link, get, note_given_up};
    ep_pipeline_config bad = {sizeof bad, 0, 0};
    assert_int_equal(ep_pipeline_run(NULL, 0, &config, &callbacks, &link), EP_ERR_ARGUMENT);
    assert_int_equal(ep_pipeline_run(j.s, 2, &config, &callbacks, &link), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_pipeline_run: rank is 2; allowed 0 to 1");
    assert_int_equal(ep_pipeline_run(j.s, 0, &bad, &callbacks, &link), EP_ERR_ARGUMENT);
    assert_int_equal(ep_pipeline_run(j.s, 0, NULL, &callbacks, &link), EP_ERR_ARGUMENT);
    assert_int_equal(ep_pipeline_run(j.s, 0, &config, NULL, &link), EP_ERR_ARGUMENT);
    assert_int_equal(ep_pipeline_run(j.s, 0, &config, &callbacks, NULL), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(), "ep_pipeline_run: link.send is NULL; send of activation "
                                         "0.0 to rank 1 needs it");
    callbacks.weight_grad = NULL;
    assert_int_equal(ep_pipeline_run(j.s, 0, &config, &callbacks, &link), EP_ERR_ARGUMENT);
    assert_string_equal(ep_last_error(),
                        "ep_pipeline_run: callbacks.weight_grad is NULL; W0.1 needs it");
    assert_int_equal(w.next, 0);
    callbacks.weight_grad = on_weight_grad;
    assert_int_equal(told, EP_ERR_ARGUMENT); /* the others would have waited for this rank */
    assert_int_equal(ep_pipeline_run(j.s, 0, &config, &callbacks, &link), EP_ERR_TIMEOUT);
    assert_int_equal(told, EP_ERR_TIMEOUT);
    ep_schedule_destroy(j.s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_method_runs),
        cmocka_unit_test(failures_name_the_operation),
        cmocka_unit_test(arguments_are_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
