/* SPDX-License-Identifier: MIT */
/* The vector operations that rows_simd.h and logfmt_simd.h are written in, for AVX2. */
#ifndef EPI_CODEC_VEC_AVX2_H
#define EPI_CODEC_VEC_AVX2_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define V_LANES 8 /* 32-bit lanes of a vector */

typedef __m256 v_float;
typedef __m256i v_int;

#define v_f _mm256_castsi256_ps
#define v_i _mm256_castps_si256

#define v_load_f(p) _mm256_loadu_ps(p)
#define v_store_f(p, a) _mm256_storeu_ps(p, a)
#define v_load_i(p) _mm256_loadu_si256((const __m256i *)(p))
#define v_store_i(p, a) _mm256_storeu_si256((__m256i *)(p), a)
#define v_stream_i(p, a) _mm256_stream_si256((__m256i *)(p), a)
#define v_set_f _mm256_set1_ps
#define v_set_32(x) _mm256_set1_epi32((int)(x))
#define v_set_16(x) _mm256_set1_epi16((short)(x))

#define v_add_f _mm256_add_ps
#define v_sub_f _mm256_sub_ps
#define v_mul_f _mm256_mul_ps
#define v_fma_f _mm256_fmadd_ps
#define v_to_float _mm256_cvtepi32_ps
#define v_truncate _mm256_cvttps_epi32

#define v_and _mm256_and_si256
#define v_or _mm256_or_si256
#define v_add_32 _mm256_add_epi32
#define v_sub_32 _mm256_sub_epi32
#define v_max_32 _mm256_max_epi32
#define v_left_32 _mm256_slli_epi32
#define v_right_32 _mm256_srli_epi32
#define v_sra_32 _mm256_srai_epi32
#define v_add_16 _mm256_add_epi16
#define v_sub_16 _mm256_sub_epi16
#define v_max_16 _mm256_max_epu16
#define v_min_16 _mm256_min_epu16
#define v_max_i16 _mm256_max_epi16
#define v_left_16 _mm256_slli_epi16
#define v_right_16 _mm256_srli_epi16
#define v_sra_16 _mm256_srai_epi16

#define v_and_not(a, b) _mm256_andnot_si256(a, b) /* ~a & b */

/* Even 16-bit lanes of a, odd ones of b. */
#define v_blend_16(a, b) _mm256_blend_epi16(a, b, 0xaa)

/* f, with every NaN replaced by the float of these bits. */
static inline v_int v_fix_nan(v_float f, v_int bits)
{
    return v_i(_mm256_blendv_ps(f, v_f(bits), _mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
}

/* Even 16-bit lanes first, then odd ones. */
static inline v_int v_unzip_16(v_int a)
{
    const v_int order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1,
                                         4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(a, order), 0xd8);
}

/* Bytes from the 16-bit lanes of a, then of b; the lanes hold 0..255. */
static inline v_int v_pack_8(v_int a, v_int b)
{
    return _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8);
}

static inline uint32_t v_largest_16(v_int a)
{
    __m128i m = _mm_max_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_minpos_epu16(_mm_xor_si128(m, _mm_set1_epi32(-1)));
    return ~(uint32_t)_mm_cvtsi128_si32(m) & 0xffffu;
}

static inline uint32_t v_least_16(v_int a)
{
    __m128i m = _mm_min_epu16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    return (uint32_t)_mm_cvtsi128_si32(_mm_minpos_epu16(m)) & 0xffffu;
}

static inline uint32_t v_largest_32(v_int a)
{
    __m128i m = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0x4e));
    m = _mm_max_epu32(m, _mm_shuffle_epi32(m, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(m);
}

/* Binary16 to float: of the first or last 16-bit lanes, or from memory; and back. */
#define v_half_low(a) _mm256_cvtph_ps(_mm256_castsi256_si128(a))
#define v_half_high(a) _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))
#define v_load_half(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define v_store_half(p, f) \
    _mm_storeu_si128((__m128i *)(p), _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT))

/* Unsigned 8 or 16-bit values of memory to lanes, and the low bits of lanes to memory. */
#define v_load_8_as_16(p) _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(p)))
#define v_load_16_as_32(p) _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p)))

static inline __m128i v_low_16(v_int a)
{
    a = v_and(a, v_set_32(0xffff));
    return _mm_packus_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
}

static inline void v_store_32_as_16(void *p, v_int a)
{
    _mm_storeu_si128((__m128i *)p, v_low_16(a));
}

static inline void v_store_16_as_8(void *p, v_int a)
{
    a = v_and(a, v_set_16(0xff));
    __m128i low = _mm256_castsi256_si128(a), high = _mm256_extracti128_si256(a, 1);
    _mm_storeu_si128((__m128i *)p, _mm_packus_epi16(low, high));
}

/* One bit of memory per 16-bit lane to the sign bit of the lane, other bits undefined. */
static inline v_int v_load_signs_16(const uint8_t *p)
{
    const v_int left = _mm256_setr_epi16((short)0x8000, 16384, 8192, 4096, 2048, 1024, 512, 256,
                                         128, 64, 32, 16, 8, 4, 2, 1);
    uint16_t bits;
    memcpy(&bits, p, sizeof bits);
    return _mm256_mullo_epi16(v_set_16(bits), left);
}

/* And back: sign bits of lanes to memory. */
static inline void v_store_signs_16(uint8_t *p, v_int a)
{
    /* Saturation to bytes keeps the sign. */
    __m128i low = _mm256_castsi256_si128(a), high = _mm256_extracti128_si256(a, 1);
    uint16_t mask = (uint16_t)_mm_movemask_epi8(_mm_packs_epi16(low, high));
    memcpy(p, &mask, sizeof mask);
}

#endif
