/* SPDX-License-Identifier: MIT */
#include "support/formats.h"

#include <math.h>
#include <string.h>

/* A binary float format: value = (-1)^s * mantissa * 2^lsb. */
struct format {
    int mantissa_bits; /* stored */
    int exponent_bits;
    int has_infinity;
};

static struct format format_of(ep_dtype dtype)
{
    switch (dtype) {
    case EP_BF16:
        return (struct format){7, 8, 1};
    case EP_F16:
        return (struct format){10, 5, 1};
    case EP_E4M3:
        return (struct format){3, 4, 0};
    default:
        return (struct format){23, 8, 1};
    }
}

static double decode(struct format f, uint32_t code)
{
    uint32_t mantissa = code & ((1u << f.mantissa_bits) - 1);
    uint32_t exponent = code >> f.mantissa_bits & ((1u << f.exponent_bits) - 1);
    uint32_t top = (1u << f.exponent_bits) - 1;
    int bias = (1 << (f.exponent_bits - 1)) - 1;
    double sign = code >> (f.mantissa_bits + f.exponent_bits) & 1 ? -1.0 : 1.0;
    if (f.has_infinity && exponent == top)
        return mantissa ? (double)NAN : sign * (double)INFINITY;
    if (!f.has_infinity && exponent == top && mantissa == (1u << f.mantissa_bits) - 1)
        return (double)NAN;
    if (exponent == 0)
        return sign * ldexp(mantissa, 1 - bias - f.mantissa_bits);
    return sign * ldexp(mantissa + (1u << f.mantissa_bits), (int)exponent - bias - f.mantissa_bits);
}

/* Values of all codes of up to 16 bits, worked out once: tests load millions of elements. */
static double bf16_values[65536], f16_values[65536], e4m3_values[256];

__attribute__((constructor)) static void fill_values(void)
{
    for (uint32_t code = 0; code < 65536; code++) {
        bf16_values[code] = decode(format_of(EP_BF16), code);
        f16_values[code] = decode(format_of(EP_F16), code);
        e4m3_values[code % 256] = decode(format_of(EP_E4M3), code % 256);
    }
}

double format_load(ep_dtype dtype, const void *array, int64_t i)
{
    switch (dtype) {
    case EP_BF16:
        return bf16_values[((const uint16_t *)array)[i]];
    case EP_F16:
        return f16_values[((const uint16_t *)array)[i]];
    case EP_E4M3:
        return e4m3_values[((const uint8_t *)array)[i]];
    default:
        return (double)((const float *)array)[i];
    }
}

static uint32_t encode(struct format f, double value)
{
    int bias = (1 << (f.exponent_bits - 1)) - 1, exponent;
    uint32_t sign = signbit(value) ? 1u << (f.mantissa_bits + f.exponent_bits) : 0;
    uint32_t infinity = ((1u << f.exponent_bits) - 1) << f.mantissa_bits;
    uint32_t ones = (1u << f.mantissa_bits) - 1;
    if (isnan(value))
        return infinity | ones;
    if (value == 0)
        return sign;
    if (isinf(value))
        return sign | (f.has_infinity ? infinity : (infinity | ones) - 1);
    frexp(value, &exponent); /* value = m * 2^exponent, 0.5 <= |m| < 1 */
    int lsb = exponent - 1 - f.mantissa_bits, least = 1 - bias - f.mantissa_bits;
    if (lsb < least)
        lsb = least;
    uint32_t steps = (uint32_t)rint(ldexp(fabs(value), -lsb)); /* rint: nearest, ties to even */
    /* Steps of the least lsb count straight through the subnormals into the normal codes, and a
       mantissa that rounds up carries into the exponent. */
    uint32_t code = steps + ((uint32_t)(lsb - least) << f.mantissa_bits);
    if (f.has_infinity)
        return sign | (code < infinity ? code : infinity);
    uint32_t largest = (infinity | ones) - 1;
    return sign | (code < largest ? code : largest);
}

void format_store(ep_dtype dtype, void *array, int64_t i, double value)
{
    size_t size = ep_dtype_size(dtype);
    uint32_t code = encode(format_of(dtype), value);
    memcpy((char *)array + (size_t)i * size, &code, size);
}

int format_same(ep_dtype dtype, const void *a, const void *b)
{
    if (memcmp(a, b, ep_dtype_size(dtype)) == 0)
        return 1;
    if (dtype != EP_BF16 && dtype != EP_F16 && dtype != EP_F32 && dtype != EP_E4M3)
        return 0;
    return isnan(format_load(dtype, a, 0)) && isnan(format_load(dtype, b, 0));
}

int64_t format_scale_words(ep_scale kind, int64_t hidden)
{
    return kind == EP_SCALE_UE8M0 ? (hidden + 511) / 512 : (hidden + 127) / 128;
}

ep_dtype format_scale_dtype(ep_scale kind)
{
    return kind == EP_SCALE_UE8M0 ? EP_UE8M0X4 : EP_F32;
}

/* float32 quotient: a double quotient rounded again gives the same (53 >= 2 * 24 + 2). */
static float quotient(double a, double b)
{
    return (float)(a / b);
}

static void quantise_block(ep_dtype dtype, const void *row, int64_t first, int64_t end,
                           ep_scale kind, uint8_t *codes, float *scale)
{
    float amax = 1e-4f, factor;
    for (int64_t i = first; i < end; i++)
        amax = fmaxf(amax, (float)fabs(format_load(dtype, row, i)));
    *scale = quotient(amax, 448);
    factor = quotient(448, amax);
    if (kind != EP_SCALE_F32) {
        int exponent; /* of the next power of two: 2^exponent >= scale */
        if (frexp(*scale, &exponent) == 0.5)
            exponent--;
        *scale = (float)ldexp(1, exponent);
        factor = (float)ldexp(1, -exponent);
    }
    for (int64_t i = first; i < end; i++) {
        float product = (float)(format_load(dtype, row, i) * (double)factor);
        format_store(EP_E4M3, codes, i, product);
    }
}

void format_quantise(ep_dtype dtype, const void *row, int64_t hidden, ep_scale kind, uint8_t *codes,
                     void *scales)
{
    memset(scales, 0, (size_t)format_scale_words(kind, hidden) * 4);
    for (int64_t b = 0; b * 128 < hidden; b++) {
        int64_t end = b * 128 + 128 < hidden ? b * 128 + 128 : hidden;
        float scale;
        quantise_block(dtype, row, b * 128, end, kind, codes, &scale);
        if (kind == EP_SCALE_UE8M0)
            ((uint8_t *)scales)[b] = (uint8_t)(ilogbf(scale) + 127);
        else
            memcpy((char *)scales + b * 4, &scale, 4);
    }
}
