/* SPDX-License-Identifier: MIT */
#include "transport/fault/decide.h"

#include "base/clock.h"

/* splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014). */
static uint64_t next_random(uint64_t *state)
{
    uint64_t z = (*state += UINT64_C(0x9e3779b97f4a7c15));
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

/* 0..most */
static int64_t draw(uint64_t *state, int64_t most)
{
    return (int64_t)(next_random(state) % ((uint64_t)most + 1));
}

epi_fault_decider epi_fault_decider_start(const epi_fault_options *options, int rank)
{
    uint64_t mixed = (uint64_t)options->seed;
    mixed = next_random(&mixed) + (uint64_t)rank;
    return (epi_fault_decider){.options = *options, .rank = rank, .random = mixed};
}

epi_fault_decision epi_fault_decide(epi_fault_decider *decider)
{
    const epi_fault_options *options = &decider->options;
    epi_fault_decision made = {0};
    decider->num_decided++;
    made.kill = options->kill_rank == decider->rank && options->kill_at == decider->num_decided;
    if (options->stall_rank == decider->rank && options->stall_at == decider->num_decided)
        made.stall_ns = options->stall_ms * EPI_NS_PER_MS;
    /* Both are drawn whatever the options, so that one option leaves what the others decide. */
    made.delay_ns = draw(&decider->random, options->delay_us * EPI_NS_PER_US);
    made.repeat = draw(&decider->random, 99) < options->repeat;
    return made;
}
