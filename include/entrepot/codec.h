/* SPDX-License-Identifier: MIT */
/*
 * Codecs: the narrow element formats that rows travel in.
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

#ifdef __cplusplus
}
#endif
#endif
