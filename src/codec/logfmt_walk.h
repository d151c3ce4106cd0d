/* SPDX-License-Identifier: MIT */
/*
 * The walk over chunks and blocks of a LogFMT row, shared by every path. Each
 * path passes its own block functions, which the compiler inlines.
 */
#ifndef EPI_CODEC_LOGFMT_WALK_H
#define EPI_CODEC_LOGFMT_WALK_H

#include "codec/logfmt.h"
#include "codec/rows.h"

#define EPI_INLINE static inline __attribute__((always_inline))

/* Largest |x| and least |x| other than 0 of a block, as BF16 codes; amin is 0xffff without any. */
struct epi_logfmt_range {
    uint16_t amax, amin;
};

#define EPI_LOGFMT_BLOCKS (1024 / EPI_LOGFMT_BLOCK) /* in a chunk, at most */

typedef struct epi_logfmt_range epi_logfmt_range_fn(const uint16_t *x, size_t n);
/* Writes, or reads, what follows amax and amin in a block. */
typedef void epi_logfmt_encode_fn(const uint16_t *x, size_t n, const struct epi_logfmt_grid *grid,
                                  uint8_t *out);
typedef void epi_logfmt_decode_fn(const uint8_t *in, size_t n, const struct epi_logfmt_grid *grid,
                                  uint16_t *out);

/* Channels of the block that starts at channel i of n. */
EPI_INLINE size_t epi_logfmt_width(size_t i, size_t n)
{
    return n - i < EPI_LOGFMT_BLOCK ? n - i : EPI_LOGFMT_BLOCK;
}

/* Codes a chunk if it qualifies and returns its bytes, else 0. */
EPI_INLINE size_t epi_logfmt_encode_chunk(const uint16_t *x, size_t n, uint8_t *out,
                                          epi_logfmt_range_fn *range, epi_logfmt_encode_fn *encode)
{
    struct epi_logfmt_range r[EPI_LOGFMT_BLOCKS];
    struct epi_logfmt_grid grids[EPI_LOGFMT_BLOCKS];
    if (epi_logfmt_chunk_bytes(n) >= n * sizeof *x)
        return 0;
    for (size_t i = 0, b = 0; i < n; i += EPI_LOGFMT_BLOCK, b++) {
        r[b] = range(x + i, epi_logfmt_width(i, n));
        if (r[b].amax >= EPI_BF16_ONE || r[b].amin >= r[b].amax)
            return 0;
    }
    /* Grids take long chains of arithmetic: of several blocks together they overlap. */
    for (size_t i = 0, b = 0; i < n; i += EPI_LOGFMT_BLOCK, b++)
        grids[b] = epi_logfmt_grid_of(r[b].amax, r[b].amin);
    uint8_t *at = out;
    for (size_t i = 0, b = 0; i < n; i += EPI_LOGFMT_BLOCK, b++) {
        memcpy(at, &r[b].amax, 2);
        memcpy(at + 2, &r[b].amin, 2);
        encode(x + i, epi_logfmt_width(i, n), &grids[b], at + 4);
        at += epi_logfmt_block_bytes(epi_logfmt_width(i, n));
    }
    return (size_t)(at - out);
}

EPI_INLINE void epi_logfmt_decode_chunk(const uint8_t *in, size_t n, uint16_t *out,
                                        epi_logfmt_decode_fn *decode)
{
    struct epi_logfmt_grid grids[EPI_LOGFMT_BLOCKS];
    const size_t bytes = epi_logfmt_block_bytes(EPI_LOGFMT_BLOCK);
    for (size_t i = 0, b = 0; i < n; i += EPI_LOGFMT_BLOCK, b++) {
        struct epi_logfmt_range r;
        memcpy(&r.amax, in + b * bytes, 2);
        memcpy(&r.amin, in + b * bytes + 2, 2);
        grids[b] = epi_logfmt_grid_of(r.amax, r.amin);
    }
    for (size_t i = 0, b = 0; i < n; i += EPI_LOGFMT_BLOCK, b++)
        decode(in + b * bytes + 4, epi_logfmt_width(i, n), &grids[b], out + i);
}

EPI_INLINE size_t epi_logfmt_encode_row(const uint16_t *x, size_t hidden, uint8_t *out,
                                        epi_logfmt_range_fn *range, epi_logfmt_encode_fn *encode)
{
    size_t chunk = epi_logfmt_chunk(hidden), head = epi_logfmt_head_bytes(hidden);
    uint8_t *at = out + head;
    memset(out, 0, head);
    for (size_t c = 0; c * chunk < hidden; c++) {
        size_t start = c * chunk, n = hidden - start < chunk ? hidden - start : chunk;
        size_t used = epi_logfmt_encode_chunk(x + start, n, at, range, encode);
        if (used)
            out[c / 8] = (uint8_t)(out[c / 8] | 1u << c % 8);
        else
            memcpy(at, x + start, used = n * sizeof *x);
        at += used;
    }
    return (size_t)(at - out);
}

/* Whether chunk c is coded; a flag that no encoder sets is not believed, which bounds the reads. */
static inline bool epi_logfmt_is_coded(const uint8_t *head, size_t c, size_t n)
{
    return (head[c / 8] >> c % 8 & 1) && epi_logfmt_chunk_bytes(n) < n * sizeof(uint16_t);
}

EPI_INLINE void epi_logfmt_decode_row(const uint8_t *in, size_t hidden, uint16_t *out,
                                      epi_logfmt_decode_fn *decode)
{
    size_t chunk = epi_logfmt_chunk(hidden);
    const uint8_t *at = in + epi_logfmt_head_bytes(hidden);
    for (size_t c = 0; c * chunk < hidden; c++) {
        size_t start = c * chunk, n = hidden - start < chunk ? hidden - start : chunk;
        if (epi_logfmt_is_coded(in, c, n)) {
            epi_logfmt_decode_chunk(at, n, out + start, decode);
            at += epi_logfmt_chunk_bytes(n);
        } else {
            memcpy(out + start, at, n * sizeof *out);
            at += n * sizeof *out;
        }
    }
}

#endif
