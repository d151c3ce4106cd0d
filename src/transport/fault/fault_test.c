/* SPDX-License-Identifier: MIT */
/* The fault transport over one that only records what reaches it. */
#include "transport/fault/fault.h"

#include "support/test.h"
#include "transport/fault/decide.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define RECORD_MAX 4096

typedef struct recorder {
    epi_transport base;
    pthread_mutex_t mutex;
    uint64_t value[RECORD_MAX];
    int count;
    int kills;
    bool destroyed_window;
} recorder;

static void record_notify(epi_window *window, int dst, int slot, uint64_t value)
{
    (void)dst;
    (void)slot;
    recorder *self = (recorder *)window->transport;
    pthread_mutex_lock(&self->mutex);
    self->value[self->count++] = value;
    pthread_mutex_unlock(&self->mutex);
}

static ep_status record_window_create(epi_transport *transport, size_t reserve, size_t committed,
                                      epi_window **window)
{
    static epi_window made;
    made = (epi_window){.transport = transport, .reserve = reserve, .committed = committed};
    *window = &made;
    return EP_OK;
}

static void record_window_destroy(epi_window *window)
{
    ((recorder *)window->transport)->destroyed_window = true;
}

static void record_kill(epi_transport *transport)
{
    ((recorder *)transport)->kills++;
}

static void record_destroy(epi_transport *transport)
{
    (void)transport;
}

static const epi_transport_ops record_ops = {
    .name = "recorder",
    .destroy = record_destroy,
    .window_create = record_window_create,
    .window_destroy = record_window_destroy,
    .notify = record_notify,
    .kill_self = record_kill,
};

static ep_status alone(epi_bootstrap *bootstrap, const void *send, void *recv, size_t bytes)
{
    (void)bootstrap;
    memcpy(recv, send, bytes);
    return EP_OK;
}

static _Alignas(16) uint8_t scratch[EPI_BOOTSTRAP_MAX];
static epi_bootstrap bootstrap = {alone, NULL, 0, 1, scratch, false};

static recorder *recorder_create(void)
{
    recorder *self = calloc(1, sizeof *self);
    self->base = (epi_transport){&record_ops, 0, 1};
    pthread_mutex_init(&self->mutex, NULL);
    return self;
}

/* Notifies 1..count through `options`, closes the window, and returns what has come. */
static recorder *run(const char *options, int count)
{
    recorder *inner = recorder_create();
    epi_transport *fault = NULL;
    epi_window *window = NULL;
    assert_int_equal(epi_fault_open(&bootstrap, &inner->base, options, &fault), EP_OK);
    assert_int_equal(fault->ops->window_create(fault, 4096, 4096, &window), EP_OK);
    for (int i = 1; i <= count; i++)
        fault->ops->notify(window, 0, 0, (uint64_t)i);
    fault->ops->window_destroy(window);
    fault->ops->destroy(fault);
    assert_true(inner->destroyed_window);
    return inner;
}

static bool is_sorted(const recorder *inner)
{
    for (int i = 1; i < inner->count; i++)
        if (inner->value[i] < inner->value[i - 1])
            return false;
    return true;
}

/* How often each of 1..count has come. */
static void count_each(const recorder *inner, int count, int *times)
{
    memset(times, 0, (size_t)(count + 1) * sizeof *times);
    for (int i = 0; i < inner->count; i++) {
        assert_in_range(inner->value[i], 1, count);
        times[inner->value[i]]++;
    }
}

static void passes_on_at_once(void **state)
{
    (void)state;
    recorder *inner = run("", 100);
    assert_int_equal(inner->count, 100);
    assert_true(is_sorted(inner));
    free(inner);
}

static void delays_in_order(void **state)
{
    (void)state;
    recorder *inner = run("delay_us=2000", 200);
    assert_int_equal(inner->count, 200);
    assert_true(is_sorted(inner));
    free(inner);
}

static void reorders(void **state)
{
    (void)state;
    int times[201];
    recorder *inner = run("delay_us=2000,reorder=1", 200);
    assert_int_equal(inner->count, 200);
    assert_false(is_sorted(inner));
    count_each(inner, 200, times);
    for (int i = 1; i <= 200; i++)
        assert_int_equal(times[i], 1);
    free(inner);
}

static void repeats(void **state)
{
    (void)state;
    int times[1001];
    recorder *all = run("repeat=100", 1000);
    count_each(all, 1000, times);
    for (int i = 1; i <= 1000; i++)
        assert_int_equal(times[i], 2);
    free(all);
    recorder *some = run("repeat=30", 1000);
    assert_in_range(some->count, 1200, 1400);
    free(some);
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void delivers_while_nobody_calls(void **state)
{
    (void)state;
    recorder *inner = recorder_create();
    epi_transport *fault = NULL;
    epi_window *window = NULL;
    assert_int_equal(epi_fault_open(&bootstrap, &inner->base, "delay_us=1000", &fault), EP_OK);
    assert_int_equal(fault->ops->window_create(fault, 4096, 4096, &window), EP_OK);
    fault->ops->notify(window, 0, 0, 7);
    int seen = 0;
    for (int64_t until = now_ms() + 10000; seen == 0 && now_ms() < until;) {
        pthread_mutex_lock(&inner->mutex);
        seen = inner->count;
        pthread_mutex_unlock(&inner->mutex);
    }
    assert_int_equal(seen, 1);
    fault->ops->window_destroy(window);
    fault->ops->destroy(fault);
    free(inner);
}

static void kills_and_stalls_where_told(void **state)
{
    (void)state;
    recorder *inner = run("kill_rank=0,kill_at=5", 4);
    assert_int_equal(inner->kills, 0);
    free(inner);
    inner = run("kill_rank=0,kill_at=5", 9);
    assert_int_equal(inner->kills, 1);
    free(inner);
    int64_t start = now_ms();
    free(run("stall_rank=0,stall_at=2,stall_ms=60", 2));
    assert_true(now_ms() - start >= 60);
    epi_fault_options options;
    assert_int_equal(epi_fault_options_parse("stall_rank=0,stall_at=2,stall_ms=60", 1, &options),
                     EP_OK);
    epi_fault_decider decider = epi_fault_decider_start(&options, 0);
    for (int i = 1; i <= 5; i++)
        assert_int_equal(epi_fault_decide(&decider).stall_ns, i == 2 ? 60000000 : 0);
}

static void decides_by_seed(void **state)
{
    (void)state;
    epi_fault_options options;
    assert_int_equal(epi_fault_options_parse("seed=9,delay_us=100,repeat=50", 4, &options), EP_OK);
    epi_fault_decider a = epi_fault_decider_start(&options, 2), b = a,
                      other_rank = epi_fault_decider_start(&options, 3);
    options.seed = 10;
    epi_fault_decider other_seed = epi_fault_decider_start(&options, 2);
    int same_rank = 0, same_seed = 0;
    int64_t sum = 0;
    for (int i = 0; i < 1000; i++) {
        epi_fault_decision one = epi_fault_decide(&a), again = epi_fault_decide(&b);
        assert_int_equal(one.delay_ns, again.delay_ns);
        assert_int_equal(one.repeat, again.repeat);
        assert_in_range(one.delay_ns, 0, 100000);
        sum += one.delay_ns;
        same_rank += one.delay_ns == epi_fault_decide(&other_rank).delay_ns;
        same_seed += one.delay_ns == epi_fault_decide(&other_seed).delay_ns;
    }
    assert_in_range(sum / 1000, 45000, 55000);
    assert_true(same_rank < 5 && same_seed < 5);
}

static void names_bad_options(void **state)
{
    (void)state;
    static const struct {
        const char *text, *message;
    } bad[] = {
        {"delay=5", "transport option \"delay=5\"; there are seed=, delay_us=, reorder=, repeat=, "
                    "stall_rank=, stall_at=, stall_ms=, kill_rank= and kill_at="},
        {"delay_us", "transport option \"delay_us\"; there are seed=, delay_us=, reorder=, "
                     "repeat=, stall_rank=, stall_at=, stall_ms=, kill_rank= and kill_at="},
        {"delay_us=", "transport option delay_us is \"\"; it can be 0..10000000"},
        {"delay_us=1e3", "transport option delay_us is \"1e3\"; it can be 0..10000000"},
        {"delay_us=-1", "transport option delay_us is \"-1\"; it can be 0..10000000"},
        {"delay_us=10000001", "transport option delay_us is \"10000001\"; it can be 0..10000000"},
        {"reorder=2", "transport option reorder is \"2\"; it can be 0..1"},
        {"repeat=101", "transport option repeat is \"101\"; it can be 0..100"},
        {"seed=99999999999999999999",
         "transport option seed is \"99999999999999999999\"; it can be 0..9223372036854775807"},
        {"kill_rank=4,kill_at=1", "transport option kill_rank is \"4\"; it can be 0..3"},
        {"kill_rank=1", "transport options kill_rank and kill_at go together"},
        {"kill_at=1", "transport options kill_rank and kill_at go together"},
        {"stall_rank=1,stall_at=1",
         "transport options stall_rank, stall_at and stall_ms go together"},
        {"seed=1,", "transport options end with a comma"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        epi_fault_options options;
        assert_int_equal(epi_fault_options_parse(bad[i].text, 4, &options), EP_ERR_ARGUMENT);
        assert_string_equal(ep_last_error(), bad[i].message);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(passes_on_at_once),
        cmocka_unit_test(delays_in_order),
        cmocka_unit_test(reorders),
        cmocka_unit_test(repeats),
        cmocka_unit_test(delivers_while_nobody_calls),
        cmocka_unit_test(kills_and_stalls_where_told),
        cmocka_unit_test(decides_by_seed),
        cmocka_unit_test(names_bad_options),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
