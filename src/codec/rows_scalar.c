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

static void quantise(const void *x, ep_dtype dtype, size_t hidden, ep_scale kind, uint8_t *q,
                     void *scales, bool streaming)
{
    (void)streaming;
    if (kind == EP_SCALE_UE8M0)
        memset(scales, 0, epi_scale_bytes(kind, hidden));
    for (size_t start = 0; start < hidden; start += EPI_SCALE_BLOCK) {
        size_t end = hidden - start < EPI_SCALE_BLOCK ? hidden : start + EPI_SCALE_BLOCK;
        float amax = 0;
        for (size_t i = start; i < end; i++)
            amax = epi_amax(amax, load(dtype, x, i));
        struct epi_scale s = epi_scale_of(kind, amax);
        epi_scale_store(kind, scales, start / EPI_SCALE_BLOCK, s.scale);
        for (size_t i = start; i < end; i++)
            q[i] = epi_to_e4m3(load(dtype, x, i) * s.inverse);
    }
}

static void dequantise(const uint8_t *q, const void *scales, ep_scale kind, size_t hidden,
                       ep_dtype dtype, void *out)
{
    for (size_t i = 0; i < hidden; i++) {
        float factor = epi_scale_load(kind, scales, i / EPI_SCALE_BLOCK);
        store(dtype, out, i, epi_from_e4m3(q[i]) * factor);
    }
}

static float sum(ep_dtype dtype, const void *const *rows, const float *weights, size_t n, size_t i)
{
    float acc = 0;
    for (size_t r = 0; r < n; r++) {
        float value = load(dtype, rows[r], i);
        if (weights)
            acc = fmaf(weights[r], value, acc);
        else
            acc = r ? acc + value : value;
    }
    return acc;
}

static void reduce(ep_dtype dtype, const void *const *rows, const float *weights, size_t n,
                   const void *bias0, const void *bias1, size_t hidden, void *out)
{
    const void *biases[2] = {bias0, bias1};
    for (size_t i = 0; i < hidden; i++) {
        float acc = sum(dtype, rows, weights, n, i);
        bool empty = n == 0;
        for (int b = 0; b < 2; b++) {
            if (biases[b]) {
                float value = load(dtype, biases[b], i);
                acc = empty ? value : acc + value;
                empty = false;
            }
        }
        store(dtype, out, i, acc);
    }
}

static void scale(ep_dtype dtype, const void *x, float w, size_t hidden, void *out)
{
    for (size_t i = 0; i < hidden; i++)
        store(dtype, out, i, w * load(dtype, x, i));
}

static float dot(ep_dtype dtype, const void *a, const void *b, size_t hidden)
{
    float lanes[16] = {0};
    for (size_t i = 0; i < hidden; i++)
        lanes[i % 16] = fmaf(load(dtype, a, i), load(dtype, b, i), lanes[i % 16]);
    return epi_dot_tree(lanes);
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
