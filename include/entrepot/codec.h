/* SPDX-License-Identifier: MIT */
/*
 * Codecs: the narrow element formats that rows travel in, for callers that make
 * or read such rows themselves. dispatch and combine use the same kernels.
 *
 * Rows lie one after another without gaps, at any alignment, in CPU memory that
 * the caller owns; sizes count elements unless they say bytes. Inputs and
 * outputs must not overlap. Every function is safe from any thread, keeps
 * nothing of its arguments and, when it fails, has written nothing.
 *
 * Results have the same bits whichever instruction set runs, and on a GPU.
 * Roundings are to nearest even; every NaN becomes 0x7fff (BF16, F16),
 * 0x7fffffff (F32) or 0x7f (E4M3), as in a GPU's conversions. The default
 * floating-point environment is assumed: subnormals are kept.
 */
#ifndef ENTREPOT_CODEC_H
#define ENTREPOT_CODEC_H

#include "entrepot/tensor.h"

#ifdef __cplusplus
extern "C" {
#endif

/** Form of the scales of E4M3 rows, one scale per 128 channels. */
typedef enum ep_scale {
    EP_SCALE_F32 = 0,  /**< float32, amax / 448; tensor F32 [rows, ceil(H/128)] */
    EP_SCALE_POW2 = 1, /**< the same rounded up to a power of two, as float32 */
    EP_SCALE_UE8M0 = 2 /**< exponent bytes only; tensor UE8M0X4 [rows, ceil(H/512)] */
} ep_scale;

/** Bytes of the scales of one row; 0 when hidden is not 1..2147483647 or scale is no ep_scale. */
EP_API size_t ep_scale_row_bytes(ep_scale scale, int64_t hidden);

/**
 * Quantises rows to E4M3, one scale per row and 128 channels; the last block of
 * a row may be short.
 *
 *     amax   = max(1e-4, largest |x| of the block that is not NaN)
 *     scale  = amax / 448 in float32, for POW2 and UE8M0 rounded up to 2^e
 *     q      = E4M3(x * (448 / amax)), or E4M3(x * 2^-e); saturates at 448
 *
 * A NaN element becomes NaN. An infinite one makes its whole block dequantise to
 * NaN: scale infinity, exponent byte 255.
 *
 * @param x       [rows, hidden] of dtype BF16, F16 or F32
 * @param rows    0..2147483647
 * @param hidden  1..2147483647
 * @param q       [rows, hidden] E4M3 codes
 * @param scales  rows times ep_scale_row_bytes(scale, hidden) bytes: float32
 *                [rows, ceil(hidden/128)], or for UE8M0 int32 [rows, ceil(hidden/512)]
 *                with the exponent of block k in bits 8*(k%4) of word k/4, unused bits 0
 * @return EP_ERR_ARGUMENT for a bad argument
 *
 * Method: DeepSeek-V3 technical report (arXiv:2412.19437) section 3.3.2.
 */
EP_API ep_status ep_quantise(const void *x, ep_dtype dtype, int64_t rows, int64_t hidden,
                             ep_scale scale, uint8_t *q, void *scales);

/**
 * out = q * scale, rounded once to dtype. Arguments as for ep_quantise; scales of
 * any origin will do.
 *
 * @param out  [rows, hidden] of dtype BF16, F16 or F32
 */
EP_API ep_status ep_dequantise(const uint8_t *q, const void *scales, ep_scale scale, int64_t rows,
                               int64_t hidden, ep_dtype dtype, void *out);

/**
 * Converts an array between any two of BF16, F16 and F32. Overflow gives infinity.
 *
 * @param x      [count] of dtype `from`
 * @param count  0..2^60
 * @param out    [count] of dtype `to`
 * @return EP_ERR_ARGUMENT for a bad argument
 */
EP_API ep_status ep_convert(const void *x, ep_dtype from, int64_t count, ep_dtype to, void *out);

/**
 * Most bytes of one LogFMT-10 row of `hidden` channels, and the distance between
 * rows below; 0 when hidden is not 1..2147483647.
 */
EP_API size_t ep_logfmt_row_bytes(int64_t hidden);

/**
 * Encodes BF16 rows as LogFMT-10: per block of 128 channels a sign and a 9-bit
 * position on a logarithmic grid between the least magnitude (at least largest *
 * 2^-32) and the largest. Chunks of 1024 channels (512 when hidden is not divisible
 * by 1024) in which every block has magnitudes below 1 and not all alike are
 * coded, in 64 % of their bytes; others stay BF16, exactly.
 *
 * @param x       [rows, hidden] BF16
 * @param rows    0..2147483647
 * @param hidden  1..2147483647
 * @param out     rows * ep_logfmt_row_bytes(hidden) bytes; row r begins at byte
 *                r * ep_logfmt_row_bytes(hidden)
 * @param used    [rows] bytes that each row really takes, the others are left
 *                unwritten; NULL if not wanted
 * @return EP_ERR_ARGUMENT for a bad argument
 *
 * Method: "Insights into DeepSeek-V3" (arXiv:2505.09343) section 3.2.
 */
EP_API ep_status ep_logfmt_encode(const uint16_t *x, int64_t rows, int64_t hidden, uint8_t *out,
                                  size_t *used);

/**
 * Decodes rows of ep_logfmt_encode to BF16.
 *
 * @param in    rows * ep_logfmt_row_bytes(hidden) bytes
 * @param used  [rows] as the encoder gave them; NULL: not checked
 * @param out   [rows, hidden] BF16
 * @return EP_ERR_ARGUMENT for a bad argument; EP_ERR_FORMAT when a row's flags do
 *         not make used[r] bytes
 */
EP_API ep_status ep_logfmt_decode(const uint8_t *in, const size_t *used, int64_t rows,
                                  int64_t hidden, uint16_t *out);

/**
 * Instruction set of the kernels in use: "scalar", "avx2" or "avx512". The best
 * one of the processor, unless the environment variable EP_ISA names one at the
 * first call into the library that needs it. A static string.
 */
EP_API const char *ep_codec_isa(void);

/**
 * One sentence when EP_ISA could not be followed (no such name, or the processor
 * lacks it; then the best one runs), else "". A static string.
 */
EP_API const char *ep_codec_isa_note(void);

/**
 * Features of this processor that the kernels can use, separated by blanks, such
 * as "avx2 fma f16c avx512f avx512bw avx512vl avx512dq"; "" when there are none.
 * A static string.
 */
EP_API const char *ep_cpu_features(void);

#ifdef __cplusplus
}
#endif
#endif
