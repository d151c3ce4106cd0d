/* SPDX-License-Identifier: MIT */
/*
 * Row checksum: eight 64-bit lanes, each an xor, a rotation and an odd multiply
 * per word, all of them bijections of the lane: one changed word always changes
 * the lane, and the order of words matters. Word i of the data belongs to lane
 * i % 8; data are padded with zeros to a multiple of 64 bytes. Not cryptographic.
 *
 * This is the definition; epi_checksum() is it on the host, and device code has
 * one of its own.
 */
#ifndef EPI_CODEC_CHECKSUM_H
#define EPI_CODEC_CHECKSUM_H

#include "codec/scalar.h"

#define EPI_CHECKSUM_LANES 8
#define EPI_CHECKSUM_MULTIPLIER 0x9e3779b97f4a7c15u /* 2^64 / golden ratio, odd */

EPI_HD uint64_t epi_checksum_lane(int lane)
{
    return (uint64_t)(lane + 1) * 0xbf58476d1ce4e5b9u;
}

EPI_HD uint64_t epi_checksum_mix(uint64_t lane, uint64_t word)
{
    lane ^= word;
    return (lane << 29 | lane >> 35) * EPI_CHECKSUM_MULTIPLIER;
}

/* A bijection that spreads every bit over all others. */
EPI_HD uint64_t epi_checksum_spread(uint64_t value)
{
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93u;
    value = (value ^ value >> 32) * 0xd6e8feb86659fd93u;
    return value ^ value >> 32;
}

/* The sum of no lanes yet; the number of bytes tells zeros from the padding. */
EPI_HD uint64_t epi_checksum_begin(uint64_t bytes)
{
    return epi_checksum_spread(bytes + 1);
}

EPI_HD uint64_t epi_checksum_add(uint64_t sum, uint64_t lane)
{
    return epi_checksum_spread(epi_checksum_mix(sum, lane));
}

/* A row's, of the sums of its bytes and of its scales (0: it has none), and its token. */
EPI_HD uint64_t epi_checksum_of_row(uint64_t row, uint64_t scales, int32_t token)
{
    return (row ^ scales * EPI_CHECKSUM_MULTIPLIER) +
           (uint64_t)(uint32_t)token * 0xff51afd7ed558ccdu;
}

#endif
