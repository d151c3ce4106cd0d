/* SPDX-License-Identifier: MIT */
/* The vector operations that rows_simd.h and logfmt_simd.h are written in, for AVX-512. */
#ifndef EPI_CODEC_VEC_AVX512_H
#define EPI_CODEC_VEC_AVX512_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define V_LANES 16 /* 32-bit lanes of a vector */

typedef __m512 v_float;
typedef __m512i v_int;

#define v_f _mm512_castsi512_ps
#define v_i _mm512_castps_si512

#define v_load_f(p) _mm512_loadu_ps(p)
#define v_store_f(p, a) _mm512_storeu_ps(p, a)
#define v_load_i(p) _mm512_loadu_si512(p)
#define v_store_i(p, a) _mm512_storeu_si512(p, a)
#define v_stream_i(p, a) _mm512_stream_si512((void *)(p), a)
#define v_set_f _mm512_set1_ps
#define v_set_32(x) _mm512_set1_epi32((int)(x))
#define v_set_16(x) _mm512_set1_epi16((short)(x))

#define v_add_f _mm512_add_ps
#define v_sub_f _mm512_sub_ps
#define v_mul_f _mm512_mul_ps
#define v_fma_f _mm512_fmadd_ps
#define v_to_float _mm512_cvtepi32_ps
#define v_truncate _mm512_cvttps_epi32

#define v_and _mm512_and_si512
#define v_or _mm512_or_si512
#define v_add_32 _mm512_add_epi32
#define v_sub_32 _mm512_sub_epi32
#define v_max_32 _mm512_max_epi32
#define v_left_32 _mm512_slli_epi32
#define v_right_32 _mm512_srli_epi32
#define v_sra_32 _mm512_srai_epi32
#define v_add_16 _mm512_add_epi16
#define v_sub_16 _mm512_sub_epi16
#define v_max_16 _mm512_max_epu16
#define v_min_16 _mm512_min_epu16
#define v_max_i16 _mm512_max_epi16
#define v_left_16 _mm512_slli_epi16
#define v_right_16 _mm512_srli_epi16
#define v_sra_16 _mm512_srai_epi16

#define v_and_not(a, b) _mm512_andnot_si512(a, b) /* ~a & b */

/* Even 16-bit lanes of a, odd ones of b. */
#define v_blend_16(a, b) _mm512_mask_blend_epi16(0xaaaaaaaau, a, b)

/* f, with every NaN replaced by the float of these bits. */
static inline v_int v_fix_nan(v_float f, v_int bits)
{
    /* By class of f: quiet and signalling NaN give `bits`, the other six give f. */
    return v_i(_mm512_fixupimm_ps(v_f(bits), f, v_set_32(0x11111100), 0));
}

/* Even 16-bit lanes first, then odd ones. */
static inline v_int v_unzip_16(v_int a)
{
    const v_int order = _mm512_set_epi16(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1,
                                         30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutexvar_epi16(order, a);
}

/* Bytes from the 16-bit lanes of a, then of b; the lanes hold 0..255. */
static inline v_int v_pack_8(v_int a, v_int b)
{
    const v_int order = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
    return _mm512_permutexvar_epi64(order, _mm512_packus_epi16(a, b));
}

static inline uint32_t v_largest_16(v_int a)
{
    __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i m = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    m = _mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi32(-1)));
    return ~(uint32_t)_mm_cvtsi128_si32(m) & 0xffffu;
}

static inline uint32_t v_least_16(v_int a)
{
    __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
    __m128i m = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return (uint32_t)_mm_cvtsi128_si32(_mm_minpos_epu16(m)) & 0xffffu;
}

#define v_largest_32(a) _mm512_reduce_max_epu32(a)

/* Binary16 to float: of the first or last 16-bit lanes, or from memory; and back. */
#define v_half_low(a) _mm512_cvtph_ps(_mm512_castsi512_si256(a))
#define v_half_high(a) _mm512_cvtph_ps(_mm512_extracti64x4_epi64(a, 1))
#define v_load_half(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define v_store_half(p, f) \
    _mm256_storeu_si256((__m256i *)(p), _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT))

/* Unsigned 8 or 16-bit values of memory to lanes, and the low bits of lanes to memory. */
#define v_load_8_as_16(p) _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(p)))
#define v_load_16_as_32(p) _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p)))
#define v_store_16_as_8(p, a) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtepi16_epi8(a))
#define v_store_32_as_16(p, a) _mm256_storeu_si256((__m256i *)(p), _mm512_cvtepi32_epi16(a))

/*
 * One bit of memory per 16-bit lane to the sign bit of the lane, other bits
 * undefined. Shifts, as mask registers in this place halve the decoder's speed.
 */
static inline v_int v_load_signs_16(const uint8_t *p)
{
    const v_int half = _mm512_inserti64x4(v_set_16(0x0100), _mm256_set1_epi16(0x0302), 1);
    const v_int shift = _mm512_set_epi16(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1,
                                         2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    uint32_t bits;
    memcpy(&bits, p, sizeof bits);
    return _mm512_sllv_epi16(_mm512_shuffle_epi8(v_set_32(bits), half), shift);
}

/* And back: sign bits of lanes to memory. */
static inline void v_store_signs_16(uint8_t *p, v_int a)
{
    uint32_t mask = _mm512_movepi16_mask(a);
    memcpy(p, &mask, sizeof mask);
}

#endif
