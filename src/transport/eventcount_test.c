/* SPDX-License-Identifier: MIT */
/* ctest-timeout: 300 */
/* A notifier that strikes just while the waiter goes to sleep, many times. */
#include "support/random.h"
#include "support/ranks.h"
#include "support/test.h"

#include <sched.h>
#include <stdatomic.h>
#include <string.h>

/* Now and then a pause between any two steps, short or as long as a system call, or another thread
   in between. */
static _Thread_local struct rng *interleave_rng;

static void pause_for(uint64_t spins)
{
    for (; spins > 0; spins--)
        atomic_signal_fence(memory_order_seq_cst);
}

static void interleave(void)
{
    if (interleave_rng == NULL)
        return;
    uint64_t way = rng_below(interleave_rng, 16);
    if (way == 0)
        sched_yield();
    else if (way < 6)
        pause_for(rng_below(interleave_rng, 4000));
}

#define EPI_INTERLEAVE interleave
#include "transport/eventcount.c"

#define SLEEP_NS INT64_C(8000000000) /* nobody who is woken as promised sleeps this long */
#define NOTIFIES 3                   /* per round, of which the first may be left out */

typedef struct duel {
    _Atomic uint64_t round; /* that the waiter is about to sleep in */
    uint64_t num_rounds;
    _Atomic bool lost;
    _Alignas(64) uint8_t memory[sizeof(epi_control) + EPI_NUM_SLOTS * sizeof(uint64_t)];
} duel;

static int wait_side(duel *self, struct rng *rng)
{
    epi_control *control = (epi_control *)self->memory;
    for (uint64_t round = 1; round <= self->num_rounds; round++) {
        atomic_store_explicit(&self->round, round, memory_order_release);
        pause_for(rng_below(rng, 2000));
        int64_t start = test_now_ms();
        for (;;) {
            uint32_t ticket = epi_control_sleep_begin(control);
            if (atomic_load_explicit(&control->source[0].slot[0], memory_order_acquire) >=
                round * NOTIFIES)
                break;
            epi_control_sleep(control, ticket, SLEEP_NS, EPI_FUTEX_PRIVATE);
        }
        if (test_now_ms() - start > SLEEP_NS / 1000000 - 1000) {
            atomic_store(&self->lost, true);
            return 1;
        }
    }
    return 0;
}

static int notify_side(duel *self, struct rng *rng)
{
    epi_control *control = (epi_control *)self->memory;
    for (uint64_t round = 1; round <= self->num_rounds; round++) {
        while (atomic_load_explicit(&self->round, memory_order_acquire) < round)
            if (atomic_load(&self->lost))
                return 0;
        for (uint64_t i = 1 + rng_below(rng, NOTIFIES); i <= NOTIFIES; i++) {
            pause_for(rng_below(rng, 2000));
            epi_control_raise(control, 0, 0, (round - 1) * NOTIFIES + i, EPI_FUTEX_PRIVATE);
        }
    }
    return 0;
}

static int fight(int rank, int num_ranks, void *arg)
{
    (void)num_ranks;
    struct rng rng;
    rng_seed(&rng, rng_env_seed(5) + (uint64_t)rank);
    interleave_rng = &rng;
    int result = rank == 0 ? wait_side(arg, &rng) : notify_side(arg, &rng);
    interleave_rng = NULL;
    return result;
}

static void no_wake_up_is_lost(void **state)
{
    (void)state;
    static duel self;
    self.num_rounds = (uint64_t)rng_env_number("EP_TEST_ROUNDS", 30000);
    assert_int_equal(test_run_threads(2, fight, &self), 0);
}

static void raises_and_never_lowers(void **state)
{
    (void)state;
    static _Alignas(64) uint8_t memory[sizeof(epi_control) + 3 * EPI_NUM_SLOTS * sizeof(uint64_t)];
    epi_control *control = (epi_control *)memory;
    static const uint64_t raise[] = {1, 7, 7, 3, UINT64_MAX, 0};
    static const uint64_t expect[] = {1, 7, 7, 7, UINT64_MAX, UINT64_MAX};
    for (size_t i = 0; i < sizeof raise / sizeof *raise; i++) {
        epi_control_raise(control, 1, 2, raise[i], EPI_FUTEX_PRIVATE);
        assert_int_equal(atomic_load(&control->source[1].slot[2]), expect[i]);
    }
    assert_int_equal(atomic_load(&control->source[0].slot[2]), 0);
    assert_int_equal(atomic_load(&control->source[2].slot[2]), 0);
    assert_int_equal(atomic_load(&control->doorbell), 0); /* nobody slept, nobody was woken */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_wake_up_is_lost),
        cmocka_unit_test(raises_and_never_lowers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
