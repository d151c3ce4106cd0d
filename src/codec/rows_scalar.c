/* SPDX-License-Identifier: MIT */
/* The scalar path: the reference for the others, and what other processors run. */
#include "codec/paths.h"
#include "codec/scalar.h"

#include <math.h>
#include <stdatomic.h>

static float load(ep_dtype dtype, const void *row, size_t i)
{
    uint16_t code;
    float value;
    if (dtype == EP_F32) {
        memcpy(&value, (const char *)row + i * sizeof value, sizeof value);
        return value;
    }
    memcpy(&code, (const char *)row + i * sizeof code, sizeof code);
    return dtype == EP_BF16 ? epi_from_bf16(code) : epi_from_f16(code);
}

static void store(ep_dtype dtype, void *row, size_t i, float value)
{
    if (dtype == EP_F32) {
        value = epi_to_f32(value);
        memcpy((char *)row + i * sizeof value, &value, sizeof value);
        return;
    }
    uint16_t code = dtype == EP_BF16 ? epi_to_bf16(value) : epi_to_f16(value);
    memcpy((char *)row + i * sizeof code, &code, sizeof code);
}

static void copy(void *dst, const void *src, size_t bytes, bool streaming)
{
    (void)streaming;
    if (bytes)
        memcpy(dst, src, bytes);
}

static void fence(void)
{
    atomic_thread_fence(memory_order_release);
}

void epi_quantise_block_scalar(const void *x, ep_dtype dtype, size_t n, ep_scale kind, uint8_t *q,
                               void *scales, size_t k)
{
    float amax = 0;
    for (size_t i = 0; i < n; i++)
        amax = epi_amax(amax, load(dtype, x, i));
    struct epi_scale s = epi_scale_of(kind, amax);
    epi_scale_store(kind, scales, k, s.scale);
    for (size_t i = 0; i < n; i++)
        q[i] = epi_to_e4m3(load(dtype, x, i) * s.inverse);
}

static void quantise(const void *x, ep_dtype dtype, size_t hidden, ep_scale kind, uint8_t *q,
                     void *scales, bool streaming)
{
    (void)streaming;
    if (kind == EP_SCALE_UE8M0)
        memset(scales, 0, epi_scale_bytes(kind, hidden));
    for (size_t i = 0; i < hidden; i += EPI_SCALE_BLOCK) {
        const char *block = (const char *)x + i * (dtype == EP_F32 ? 4 : 2);
        size_t n = hidden - i < EPI_SCALE_BLOCK ? hidden - i : EPI_SCALE_BLOCK;
        epi_quantise_block_scalar(block, dtype, n, kind, q + i, scales, i / EPI_SCALE_BLOCK);
    }
}

void epi_dequantise_scalar(const uint8_t *q, const void *scales, ep_scale kind, size_t first,
                           size_t hidden, ep_dtype dtype, void *out)
{
    for (size_t i = first; i < hidden; i++) {
        float factor = epi_scale_load(kind, scales, i / EPI_SCALE_BLOCK);
        store(dtype, out, i, epi_from_e4m3(q[i]) * factor);
    }
}

static void dequantise(const uint8_t *q, const void *scales, ep_scale kind, size_t hidden,
                       ep_dtype dtype, void *out)
{
    epi_dequantise_scalar(q, scales, kind, 0, hidden, dtype, out);
}

void epi_reduce_scalar(ep_dtype dtype, const struct epi_terms *t, size_t first, size_t hidden,
                       void *out)
{
    for (size_t i = first; i < hidden; i++) {
        float acc = 0;
        for (size_t r = 0; r < t->n; r++) {
            float value = load(dtype, t->rows[r], i);
            if (t->weights)
                acc = fmaf(t->weights[r], value, acc);
            else
                acc = r ? acc + value : value;
        }
        for (int b = 0; b < t->biases; b++) {
            float value = load(dtype, t->bias[b], i);
            acc = b || t->n ? acc + value : value;
        }
        store(dtype, out, i, acc);
    }
}

static void reduce(ep_dtype dtype, const void *const *rows, const float *weights, size_t n,
                   const void *bias0, const void *bias1, size_t hidden, void *out)
{
    struct epi_terms t = epi_terms_of(rows, weights, n, bias0, bias1);
    epi_reduce_scalar(dtype, &t, 0, hidden, out);
}

static void scale(ep_dtype dtype, const void *x, float w, size_t hidden, void *out)
{
    for (size_t i = 0; i < hidden; i++)
        store(dtype, out, i, w * load(dtype, x, i));
}

float epi_dot_rest(ep_dtype dtype, const void *a, const void *b, size_t n, float lanes[16])
{
    for (size_t i = 0; i < n; i++)
        lanes[i % 16] = fmaf(load(dtype, a, i), load(dtype, b, i), lanes[i % 16]);
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return epi_to_f32(lanes[0]);
}

static float dot(ep_dtype dtype, const void *a, const void *b, size_t hidden)
{
    float lanes[16] = {0};
    return epi_dot_rest(dtype, a, b, hidden, lanes);
}

static void convert(ep_dtype from, const void *x, ep_dtype to, size_t n, void *out)
{
    for (size_t i = 0; i < n; i++)
        store(to, out, i, load(from, x, i));
}

const struct epi_codec epi_codec_scalar = {
    .name = "scalar",
    .copy = copy,
    .fence = fence,
    .quantise = quantise,
    .dequantise = dequantise,
    .reduce = reduce,
    .scale = scale,
    .dot = dot,
    .convert = convert,
    .logfmt_encode = epi_logfmt_encode_scalar,
    .logfmt_decode = epi_logfmt_decode_scalar,
};
