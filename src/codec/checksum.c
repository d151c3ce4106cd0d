/* SPDX-License-Identifier: MIT */
/*
 * Row checksum: eight 64-bit lanes, each an xor, a rotation and an odd multiply
 * per word, all of them bijections of the lane: one changed word always changes
 * the lane, and the order of words matters. Plain C keeps up with memory, so
 * every path shares it. Not cryptographic.
 */
#include "codec/rows.h"

#include <string.h>

#define LANES 8
#define STRIPE (LANES * sizeof(uint64_t))
#define MULTIPLIER 0x9e3779b97f4a7c15u /* 2^64 / golden ratio, odd */

static inline uint64_t mix(uint64_t lane, uint64_t word)
{
    lane ^= word;
    return (lane << 29 | lane >> 35) * MULTIPLIER;
}

/* A bijection that spreads every bit over all others. */
static uint64_t avalanche(uint64_t value)
{
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93u;
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93u;
    return value ^ value >> 32;
}

static void mix_stripe(uint64_t *lanes, const unsigned char *data)
{
    for (int i = 0; i < LANES; i++) {
        uint64_t word;
        memcpy(&word, data + i * sizeof word, sizeof word);
        lanes[i] = mix(lanes[i], word);
    }
}

uint64_t epi_checksum(const void *data, size_t bytes)
{
    const unsigned char *at = data;
    size_t left = bytes;
    uint64_t lanes[LANES];
    for (int i = 0; i < LANES; i++)
        lanes[i] = (uint64_t)(i + 1) * 0xbf58476d1ce4e5b9u;
    for (; left >= STRIPE; left -= STRIPE, at += STRIPE)
        mix_stripe(lanes, at);
    if (left) {
        unsigned char last[STRIPE] = {0};
        memcpy(last, at, left);
        mix_stripe(lanes, last);
    }
    uint64_t sum = avalanche(bytes + 1); /* tells zeros from the padding */
    for (int i = 0; i < LANES; i++)
        sum = avalanche(mix(sum, lanes[i]));
    return sum;
}
