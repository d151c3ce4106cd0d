/* SPDX-License-Identifier: MIT */
/* Sizes of LogFMT rows and the scalar path. */
#include "codec/logfmt.h"

#include "codec/logfmt_walk.h"
#include "codec/paths.h"

size_t epi_logfmt_head_bytes(size_t hidden)
{
    size_t chunk = epi_logfmt_chunk(hidden), chunks = (hidden + chunk - 1) / chunk;
    return (chunks + 31) / 32 * 4;
}

size_t epi_logfmt_row_bytes(size_t hidden)
{
    return epi_logfmt_head_bytes(hidden) + hidden * sizeof(uint16_t);
}

size_t epi_logfmt_used_bytes(const uint8_t *in, size_t hidden)
{
    size_t chunk = epi_logfmt_chunk(hidden), used = epi_logfmt_head_bytes(hidden);
    for (size_t c = 0; c * chunk < hidden; c++) {
        size_t n = hidden - c * chunk < chunk ? hidden - c * chunk : chunk;
        used += epi_logfmt_is_coded(in, c, n) ? epi_logfmt_chunk_bytes(n) : n * sizeof(uint16_t);
    }
    return used;
}

static uint16_t at(const uint16_t *x, size_t i)
{
    uint16_t value;
    memcpy(&value, (const char *)x + i * sizeof value, sizeof value);
    return value;
}

static struct epi_logfmt_range range_of(const uint16_t *x, size_t n)
{
    struct epi_logfmt_range range = {0, 0xffff};
    for (size_t i = 0; i < n; i++) {
        uint16_t magnitude = at(x, i) & 0x7fff;
        if (magnitude > range.amax)
            range.amax = magnitude;
        if (magnitude && magnitude < range.amin)
            range.amin = magnitude;
    }
    return range;
}

void epi_logfmt_encode_block_scalar(const uint16_t *x, size_t n, const struct epi_logfmt_grid *grid,
                                    uint8_t *out)
{
    uint8_t *high = out + n, *sign = high + (n + 7) / 8;
    memset(high, 0, 2 * ((n + 7) / 8));
    for (size_t i = 0; i < n; i++) {
        uint16_t value = at(x, i);
        uint32_t code = epi_logfmt_code(grid, value & 0x7fff);
        out[i] = (uint8_t)code;
        high[i / 8] = (uint8_t)(high[i / 8] | (code >> 8) << i % 8);
        sign[i / 8] = (uint8_t)(sign[i / 8] | (value >> 15) << i % 8);
    }
}

void epi_logfmt_decode_block_scalar(const uint8_t *in, size_t n, const struct epi_logfmt_grid *grid,
                                    uint16_t *out)
{
    const uint8_t *high = in + n, *sign = high + (n + 7) / 8;
    for (size_t i = 0; i < n; i++) {
        uint32_t code = in[i] | (high[i / 8] >> i % 8 & 1u) << 8;
        uint32_t negative = sign[i / 8] >> i % 8 & 1u;
        uint16_t value = (uint16_t)(negative << 15 | epi_logfmt_magnitude(grid, code));
        memcpy((char *)out + i * sizeof value, &value, sizeof value);
    }
}

size_t epi_logfmt_encode_scalar(const uint16_t *x, size_t hidden, uint8_t *out)
{
    return epi_logfmt_encode_row(x, hidden, out, range_of, epi_logfmt_encode_block_scalar);
}

void epi_logfmt_decode_scalar(const uint8_t *in, size_t hidden, uint16_t *out)
{
    epi_logfmt_decode_row(in, hidden, out, epi_logfmt_decode_block_scalar);
}
