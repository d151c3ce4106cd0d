/* SPDX-License-Identifier: MIT */
/*
 * Row kernels: one table of functions per instruction set, all with the same
 * bits. Arguments are trusted (codec.c checks those of users); pointers may
 * have any alignment; a row may have any number of elements, 0 included; the
 * output must not overlap an input unless an entry says so. Every function is
 * safe from any thread.
 *
 * "Rounded" is to nearest even, and a NaN result is the one of scalar.h. The
 * kernels expect the default floating-point environment: nearest rounding and
 * subnormals kept.
 */
#ifndef EPI_CODEC_ROWS_H
#define EPI_CODEC_ROWS_H

#include "entrepot/codec.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum epi_isa { EPI_ISA_SCALAR = 0, EPI_ISA_AVX2 = 1, EPI_ISA_AVX512 = 2, EPI_ISA_COUNT = 3 };

struct epi_codec {
    const char *name; /* "scalar", "avx2" or "avx512" */

    /*
     * Copies `bytes`. Streaming stores go past the caches, for rows that this
     * core will not read again; fence() must come before whatever publishes them.
     */
    void (*copy)(void *dst, const void *src, size_t bytes, bool streaming);
    void (*fence)(void);

    /*
     * One row of BF16, F16 or F32 to E4M3, one scale per 128 channels, the last
     * block may be short. `scales`: float32 [ceil(hidden/128)], or for UE8M0
     * int32 [ceil(hidden/512)], byte k%4 (least significant first) of word k/4
     * for block k, unused bytes 0. A NaN element becomes NaN and does not count
     * for amax; an infinite one makes its whole block dequantise to NaN.
     * streaming: as for copy, codes only.
     */
    void (*quantise)(const void *x, ep_dtype dtype, size_t hidden, ep_scale kind, uint8_t *q,
                     void *scales, bool streaming);

    /* out = rounded(code * scale) as BF16, F16 or F32; scales as quantise lays them out. */
    void (*dequantise)(const uint8_t *q, const void *scales, ep_scale kind, size_t hidden,
                       ep_dtype dtype, void *out);

    /*
     * out[h] = rounded once(sum in float32, in the order given) of n rows and then
     * of the biases that are not NULL; rows, biases and out are BF16, F16 or F32.
     * Without weights the sum starts as the first term; with weights
     * acc = fma(weights[i], rows[i][h], acc) from 0. No term at all gives zeros.
     * out may be one of the rows or a bias.
     */
    void (*reduce)(ep_dtype dtype, const void *const *rows, const float *weights, size_t n,
                   const void *bias0, const void *bias1, size_t hidden, void *out);

    /* out = rounded(w * x), BF16, F16 or F32. out may be x. */
    void (*scale)(ep_dtype dtype, const void *x, float w, size_t hidden, void *out);

    /*
     * Dot product in float32 in a fixed order: lane i of 16 sums elements
     * i, i+16, ... with fma, then lanes i and i+8, i+4, i+2, i+1 are added.
     */
    float (*dot)(ep_dtype dtype, const void *a, const void *b, size_t hidden);

    /* Rounded conversion between any two of BF16, F16 and F32. out may be x if the types agree. */
    void (*convert)(ep_dtype from, const void *x, ep_dtype to, size_t n, void *out);

    /*
     * LogFMT-10 of a BF16 row, layout in logfmt.h. encode returns the bytes used,
     * at most epi_logfmt_row_bytes(hidden); decode reads no further than that.
     */
    size_t (*logfmt_encode)(const uint16_t *x, size_t hidden, uint8_t *out);
    void (*logfmt_decode)(const uint8_t *in, size_t hidden, uint16_t *out);
};

/* The table in use: chosen at the first call (EP_ISA, else the processor), then fixed. */
const struct epi_codec *epi_codec(void);

/* The table of one instruction set; NULL when this build or processor lacks it. */
const struct epi_codec *epi_codec_of(enum epi_isa isa);

/* Makes epi_codec() return that table from now on; false when it is lacking. For tests. */
bool epi_codec_select(enum epi_isa isa);

/*
 * The table that EP_ISA=name asks for, or the best one when name is NULL, empty,
 * unknown or lacking here; then `note` says so (else it is empty).
 */
#define EPI_ISA_NOTE_BYTES 128
const struct epi_codec *epi_codec_named(const char *name, char *note, size_t note_bytes);

/* Checksum of bytes, a function of their values and positions; the same on every path. */
uint64_t epi_checksum(const void *data, size_t bytes);

/* Bytes of the scales of one row. */
static inline size_t epi_scale_bytes(ep_scale kind, size_t hidden)
{
    return kind == EP_SCALE_UE8M0 ? (hidden + 511) / 512 * 4 : (hidden + 127) / 128 * 4;
}

/* Most bytes that one encoded row can take. */
size_t epi_logfmt_row_bytes(size_t hidden);

/* Bytes that the encoded row `in` takes, from its flags (epi_logfmt_head_bytes of it are read). */
size_t epi_logfmt_used_bytes(const uint8_t *in, size_t hidden);
size_t epi_logfmt_head_bytes(size_t hidden);

#endif
