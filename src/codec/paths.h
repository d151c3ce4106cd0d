/* SPDX-License-Identifier: MIT */
/* What the files of one path share with each other and with the choice in rows.c. */
#ifndef EPI_CODEC_PATHS_H
#define EPI_CODEC_PATHS_H

#include "codec/logfmt_walk.h"
#include "codec/rows.h"

extern const struct epi_codec epi_codec_scalar;

/* Factors of a block; storing and loading the scale of block k of a row. */
static inline struct epi_scale epi_scale_of(ep_scale kind, float amax)
{
    return kind == EP_SCALE_F32 ? epi_scale_f32(amax) : epi_scale_pow2(amax);
}

/* Place of exponent byte k of a row's words, least significant byte of a word first. */
static inline uint8_t *epi_ue8m0_at(const void *scales, size_t k)
{
    const uint32_t one = 1;
    uint8_t first;
    memcpy(&first, &one, 1);
    return (uint8_t *)scales + (first ? k : k ^ 3);
}

/* The UE8M0 words of the row must have been zeroed. */
static inline void epi_scale_store(ep_scale kind, void *scales, size_t k, float scale)
{
    if (kind == EP_SCALE_UE8M0)
        *epi_ue8m0_at(scales, k) = epi_to_ue8m0(scale);
    else
        memcpy((char *)scales + k * sizeof scale, &scale, sizeof scale);
}

static inline float epi_scale_load(ep_scale kind, const void *scales, size_t k)
{
    float scale;
    if (kind == EP_SCALE_UE8M0)
        return epi_from_ue8m0(*epi_ue8m0_at(scales, k));
    memcpy(&scale, (const char *)scales + k * sizeof scale, sizeof scale);
    return scale;
}

/* What a reduction adds up: n rows, then the biases. Weights only if there are rows. */
struct epi_terms {
    const void *const *rows;
    const float *weights;
    size_t n;
    const void *bias[2];
    int biases;
};

static inline struct epi_terms epi_terms_of(const void *const *rows, const float *weights, size_t n,
                                            const void *bias0, const void *bias1)
{
    struct epi_terms t = {rows, n ? weights : NULL, n, {bias0, bias1}, 0};
    if (!bias0)
        t.bias[0] = bias1;
    t.biases = (bias0 != NULL) + (bias1 != NULL);
    return t;
}

/* Scalar parts that the other paths use for what is left of a row after whole vectors. */

/* Block k of a row: n elements at x, their codes at q. */
void epi_quantise_block_scalar(const void *x, ep_dtype dtype, size_t n, ep_scale kind, uint8_t *q,
                               void *scales, size_t k);
/* Elements [first, hidden) of a row. */
void epi_dequantise_scalar(const uint8_t *q, const void *scales, ep_scale kind, size_t first,
                           size_t hidden, ep_dtype dtype, void *out);
void epi_reduce_scalar(ep_dtype dtype, const struct epi_terms *t, size_t first, size_t hidden,
                       void *out);
/* Adds n more products to the 16 lanes, the first to lane 0, and adds up the lanes. */
float epi_dot_rest(ep_dtype dtype, const void *a, const void *b, size_t n, float lanes[16]);

size_t epi_logfmt_encode_scalar(const uint16_t *x, size_t hidden, uint8_t *out);
void epi_logfmt_decode_scalar(const uint8_t *in, size_t hidden, uint16_t *out);
epi_logfmt_encode_fn epi_logfmt_encode_block_scalar;
epi_logfmt_decode_fn epi_logfmt_decode_block_scalar;

#if defined(__x86_64__)
extern const struct epi_codec epi_codec_avx2;
extern const struct epi_codec epi_codec_avx512;
#endif

#endif
