/* SPDX-License-Identifier: MIT */
/*
 * Element formats as tests see them: written from the formats' definitions with
 * frexp, ldexp and rint, and sharing nothing with src/codec.
 */
#ifndef EP_TEST_FORMATS_H
#define EP_TEST_FORMATS_H

#include "entrepot/codec.h"

/* Value of element i of an array of BF16, F16, F32 or E4M3. */
double format_load(ep_dtype dtype, const void *array, int64_t i);

/* Stores `value` rounded once, to nearest even. E4M3 saturates, the others overflow to infinity. */
void format_store(ep_dtype dtype, void *array, int64_t i, double value);

/* Whether two elements are the same bits, or both NaN where the dtype is a float. */
int format_same(ep_dtype dtype, const void *a, const void *b);

/* Words of scales (F32 or UE8M0X4) of one row of `hidden` E4M3 elements. */
int64_t format_scale_words(ep_scale kind, int64_t hidden);
ep_dtype format_scale_dtype(ep_scale kind);

/* One row of a float dtype to E4M3 with its scales, as docs and numerics define it. */
void format_quantise(ep_dtype dtype, const void *row, int64_t hidden, ep_scale kind, uint8_t *codes,
                     void *scales);

#endif
