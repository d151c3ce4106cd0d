/* SPDX-License-Identifier: MIT */
/*
 * Element formats against references that share no code with them: values are
 * computed with ldexp in double, and a rounding is the nearest of all codes by
 * exact distance, ties to the even code.
 */
#include "codec/scalar.h"

#include "support/random.h"
#include "support/test.h"

#include <float.h>
#include <math.h>

/* A sign-magnitude format: exponent and mantissa bits, bias; codes are ordered by magnitude. */
struct format {
    int exponent_bits, mantissa_bits, bias;
    uint32_t largest; /* code of the largest finite magnitude */
    double (*decode)(uint32_t code);
    uint32_t (*encode)(float value);
    uint32_t sign, nan;
    int saturates; /* instead of overflowing to the code after the largest, infinity */
};

static double decode_bf16(uint32_t code)
{
    return epi_from_bf16((uint16_t)code);
}
static uint32_t encode_bf16(float value)
{
    return epi_to_bf16(value);
}
static double decode_f16(uint32_t code)
{
    return epi_from_f16((uint16_t)code);
}
static uint32_t encode_f16(float value)
{
    return epi_to_f16(value);
}
static double decode_e4m3(uint32_t code)
{
    return epi_from_e4m3((uint8_t)code);
}
static uint32_t encode_e4m3(float value)
{
    return epi_to_e4m3(value);
}

static const struct format bf16 = {8, 7, 127, 0x7f7f, decode_bf16, encode_bf16, 0x8000, 0x7fff, 0};
static const struct format f16 = {5, 10, 15, 0x7bff, decode_f16, encode_f16, 0x8000, 0x7fff, 0};
static const struct format e4m3 = {4, 3, 7, 0x7e, decode_e4m3, encode_e4m3, 0x80, 0x7f, 1};

/* Magnitude of a code; also that of the code after the largest, as if the format went on. */
static double value_of(const struct format *f, uint32_t code)
{
    int exponent = (int)(code >> f->mantissa_bits);
    double mantissa = code & ((1u << f->mantissa_bits) - 1);
    if (exponent == 0)
        return ldexp(mantissa, 1 - f->bias - f->mantissa_bits);
    return ldexp(mantissa + (1 << f->mantissa_bits), exponent - f->bias - f->mantissa_bits);
}

static uint32_t nearest(const struct format *f, float value)
{
    double magnitude = fabs((double)value);
    uint32_t low = 0, high = f->largest + 1, sign = signbit(value) ? f->sign : 0;
    if (isnan(value))
        return f->nan;
    if (magnitude >= value_of(f, high))
        return sign | (f->saturates ? f->largest : high);
    while (high - low > 1) {
        uint32_t middle = (low + high) / 2;
        if (value_of(f, middle) <= magnitude)
            low = middle;
        else
            high = middle;
    }
    double below = magnitude - value_of(f, low), above = value_of(f, high) - magnitude;
    uint32_t code = below < above || (below == above && low % 2 == 0) ? low : high;
    return sign | (f->saturates && code > f->largest ? f->largest : code);
}

static void check(const struct format *f, float value)
{
    uint32_t got = f->encode(value), want = nearest(f, value);
    if (got != want)
        fail_msg("%a encodes to 0x%x, not 0x%x", (double)value, got, want);
}

static void check_around(const struct format *f, float value)
{
    check(f, value);
    check(f, -value);
    check(f, nextafterf(value, INFINITY));
    check(f, -nextafterf(value, INFINITY));
    check(f, nextafterf(value, -INFINITY));
}

static void every_code(const struct format *f)
{
    for (uint32_t code = 0; code <= f->largest; code++) {
        assert_true(f->decode(code) == value_of(f, code));
        assert_true(f->decode(code | f->sign) == -value_of(f, code));
        assert_true(!signbit(f->decode(code)) && signbit(f->decode(code | f->sign)));
        check_around(f, (float)value_of(f, code));
        /* Every midpoint between codes has few enough bits to be a float. */
        check_around(f, (float)((value_of(f, code) + value_of(f, code + 1)) / 2));
    }
    for (uint32_t code = f->largest + 1; code < f->sign; code++) {
        double value = f->decode(code);
        assert_true(!f->saturates && code == f->largest + 1 ? isinf(value) : isnan(value));
        assert_int_equal(f->encode((float)value), isnan(value) ? f->nan : code);
        assert_int_equal(f->encode(-(float)value), isnan(value) ? f->nan : code | f->sign);
    }
    check(f, INFINITY);
    check(f, -INFINITY);
    check(f, FLT_MAX);
    check(f, -FLT_MAX);
    check(f, FLT_TRUE_MIN);
    check(f, -FLT_TRUE_MIN);
    check(f, NAN);
    check(f, epi_float(0xff800001u));
}

static void random_values(const struct format *f, uint64_t seed)
{
    struct rng rng;
    rng_seed(&rng, rng_env_seed(seed));
    for (int i = 0; i < 200000; i++)
        check(f, epi_float((uint32_t)rng_next(&rng)));
}

static void bf16_codes(void **state)
{
    (void)state;
    every_code(&bf16);
    random_values(&bf16, 1);
}

static void f16_codes(void **state)
{
    (void)state;
    every_code(&f16);
    random_values(&f16, 2);
}

static void e4m3_codes(void **state)
{
    (void)state;
    every_code(&e4m3);
    random_values(&e4m3, 3);
}

static void e4m3_of_every_bf16_and_f16(void **state)
{
    (void)state;
    for (uint32_t code = 0; code < 65536; code++) {
        check(&e4m3, epi_from_bf16((uint16_t)code));
        check(&e4m3, epi_from_f16((uint16_t)code));
    }
}

static void check_scale(float amax)
{
    float bounded = amax > 1e-4f ? amax : 1e-4f;
    struct epi_scale s = epi_scale_f32(amax), p = epi_scale_pow2(amax);
    assert_true(s.scale == (float)((double)bounded / 448));
    assert_true(s.inverse == (float)(448 / (double)bounded));
    /* The least power of two that is not below the scale. */
    int exponent;
    double fraction = frexp((double)s.scale, &exponent);
    double up = ldexp(1.0, fraction == 0.5 ? exponent - 1 : exponent);
    assert_true((double)p.scale == up && (double)p.inverse == 1 / up);
    assert_int_equal(epi_to_ue8m0(p.scale), (int)log2(up) + 127);
    assert_true(epi_from_ue8m0(epi_to_ue8m0(p.scale)) == p.scale);
    /* Nothing in the block can exceed the largest code. */
    assert_true((double)amax * p.inverse <= 448);
}

static void scales(void **state)
{
    (void)state;
    struct rng rng;
    rng_seed(&rng, rng_env_seed(4));
    for (uint32_t code = 0; code < 0x7f80; code++)
        check_scale(epi_from_bf16((uint16_t)code));
    for (int i = 0; i < 100000; i++)
        check_scale(epi_float((uint32_t)rng_below(&rng, EPI_F32_INF)));
    for (int e = -22; e < 119; e++) {
        check_scale(ldexpf(448, e));
        check_scale(nextafterf(ldexpf(448, e), 0));
        check_scale(nextafterf(ldexpf(448, e), INFINITY));
    }
    assert_true(isinf(epi_scale_f32(INFINITY).scale) && epi_scale_f32(INFINITY).inverse == 0);
    assert_true(isinf(epi_scale_pow2(INFINITY).scale) && epi_scale_pow2(INFINITY).inverse == 0);
    assert_int_equal(epi_to_ue8m0(INFINITY), 255);
    for (int e = 0; e < 255; e++)
        assert_true((double)epi_from_ue8m0((uint8_t)e) == ldexp(1.0, e - 127));
    assert_true(isnan(epi_from_ue8m0(255)));
}

static void amax_passes_over_nan(void **state)
{
    (void)state;
    assert_true(epi_amax(2, -3) == 3);
    assert_true(epi_amax(2, NAN) == 2);
    assert_true(epi_amax(2, -INFINITY) == INFINITY);
    assert_int_equal(epi_bits(epi_amax(0, -0.0f)), 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(bf16_codes), cmocka_unit_test(f16_codes),
        cmocka_unit_test(e4m3_codes), cmocka_unit_test(e4m3_of_every_bf16_and_f16),
        cmocka_unit_test(scales),     cmocka_unit_test(amax_passes_over_nan),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
