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

/* The UE8M0 words of the row must have been zeroed. */
static inline void epi_scale_store(ep_scale kind, void *scales, size_t k, float scale)
{
    if (kind == EP_SCALE_UE8M0) {
        uint32_t word;
        char *at = (char *)scales + k / 4 * sizeof word;
        memcpy(&word, at, sizeof word);
        word |= (uint32_t)epi_to_ue8m0(scale) << k % 4 * 8;
        memcpy(at, &word, sizeof word);
    } else {
        memcpy((char *)scales + k * sizeof scale, &scale, sizeof scale);
    }
}

static inline float epi_scale_load(ep_scale kind, const void *scales, size_t k)
{
    uint32_t word;
    size_t at = kind == EP_SCALE_UE8M0 ? k / 4 : k;
    memcpy(&word, (const char *)scales + at * sizeof word, sizeof word);
    return kind == EP_SCALE_UE8M0 ? epi_from_ue8m0((uint8_t)(word >> k % 4 * 8)) : epi_float(word);
}

/* The fixed order in which dot adds its 16 lanes. */
static inline float epi_dot_tree(float lanes[16])
{
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return epi_to_f32(lanes[0]);
}

size_t epi_logfmt_encode_scalar(const uint16_t *x, size_t hidden, uint8_t *out);
void epi_logfmt_decode_scalar(const uint8_t *in, size_t hidden, uint16_t *out);
epi_logfmt_encode_fn epi_logfmt_encode_block_scalar;
epi_logfmt_decode_fn epi_logfmt_decode_block_scalar;

#if defined(__x86_64__)
extern const struct epi_codec epi_codec_avx2;
extern const struct epi_codec epi_codec_avx512;
size_t epi_logfmt_encode_avx2(const uint16_t *x, size_t hidden, uint8_t *out);
void epi_logfmt_decode_avx2(const uint8_t *in, size_t hidden, uint16_t *out);
size_t epi_logfmt_encode_avx512(const uint16_t *x, size_t hidden, uint8_t *out);
void epi_logfmt_decode_avx512(const uint8_t *in, size_t hidden, uint16_t *out);
#endif

#endif
