/* SPDX-License-Identifier: MIT */
/* The row checksum of codec/checksum.h. Plain C keeps up with memory, so every path shares it. */
#include "codec/checksum.h"
#include "codec/rows.h"

#include <string.h>

#define STRIPE (EPI_CHECKSUM_LANES * sizeof(uint64_t))

static void mix_stripe(uint64_t *lanes, const unsigned char *data)
{
    for (int i = 0; i < EPI_CHECKSUM_LANES; i++) {
        uint64_t word;
        memcpy(&word, data + (size_t)i * sizeof word, sizeof word);
        lanes[i] = epi_checksum_mix(lanes[i], word);
    }
}

uint64_t epi_checksum(const void *data, size_t bytes)
{
    const unsigned char *at = data;
    size_t left = bytes;
    uint64_t lanes[EPI_CHECKSUM_LANES];
    for (int i = 0; i < EPI_CHECKSUM_LANES; i++)
        lanes[i] = epi_checksum_lane(i);
    for (; left >= STRIPE; left -= STRIPE, at += STRIPE)
        mix_stripe(lanes, at);
    if (left) {
        unsigned char last[STRIPE] = {0};
        memcpy(last, at, left);
        mix_stripe(lanes, last);
    }
    uint64_t sum = epi_checksum_begin(bytes);
    for (int i = 0; i < EPI_CHECKSUM_LANES; i++)
        sum = epi_checksum_add(sum, lanes[i]);
    return sum;
}
