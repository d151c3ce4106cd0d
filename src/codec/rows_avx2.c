/* SPDX-License-Identifier: MIT */
/* The row kernels compiled for AVX2 with FMA and F16C. */
#include "codec/vec_avx2.h"

#include "codec/rows_simd.h"

#include "codec/logfmt_simd.h"

const struct epi_codec epi_codec_avx2 = {
    .name = "avx2",
    .copy = copy,
    .fence = fence,
    .quantise = quantise,
    .dequantise = dequantise,
    .reduce = reduce,
    .scale = scale,
    .dot = dot,
    .convert = convert,
    .logfmt_encode = encode_row,
    .logfmt_decode = decode_row,
};
