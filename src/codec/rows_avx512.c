/* SPDX-License-Identifier: MIT */
/* The row kernels compiled for AVX-512 F, BW, VL and DQ. */
#include "codec/vec_avx512.h"

#include "codec/rows_simd.h"

#include "codec/logfmt_simd.h"

const struct epi_codec epi_codec_avx512 = {
    .name = "avx512",
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
