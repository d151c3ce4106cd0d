/* SPDX-License-Identifier: MIT */
/* The public codec functions: checks, then row kernels. */
#include "entrepot/codec.h"

#include "base/error.h"
#include "codec/rows.h"

#define MAX_SIZE INT32_MAX
#define MAX_COUNT (INT64_C(1) << 60)

static bool is_float(ep_dtype dtype)
{
    return dtype == EP_BF16 || dtype == EP_F16 || dtype == EP_F32;
}

static bool is_scale(ep_scale scale)
{
    return scale == EP_SCALE_F32 || scale == EP_SCALE_POW2 || scale == EP_SCALE_UE8M0;
}

static ep_status check_dtype(const char *call, const char *name, ep_dtype dtype)
{
    if (!is_float(dtype))
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is %s (%d); it must be BF16, F16 or F32", call,
                        name, ep_dtype_string(dtype), (int)dtype);
    return EP_OK;
}

static ep_status check_scale(const char *call, ep_scale scale)
{
    if (!is_scale(scale))
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: scale is %d; it must be EP_SCALE_F32, EP_SCALE_POW2 or EP_SCALE_UE8M0",
                        call, (int)scale);
    return EP_OK;
}

static ep_status check_shape(const char *call, int64_t rows, int64_t hidden)
{
    if (hidden < 1 || hidden > MAX_SIZE)
        return epi_fail(EP_ERR_ARGUMENT, "%s: hidden is %lld; it must be 1..%d", call,
                        (long long)hidden, MAX_SIZE);
    if (rows < 0 || rows > MAX_SIZE || rows > MAX_COUNT / hidden)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: rows is %lld; it must be 0..%d, and at most 2^60 / hidden", call,
                        (long long)rows, MAX_SIZE);
    return EP_OK;
}

/* A pointer may only be NULL when nothing is read or written there. */
static ep_status check_pointer(const char *call, const char *name, const void *pointer,
                               int64_t count)
{
    if (!pointer && count)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is NULL", call, name);
    return EP_OK;
}

size_t ep_scale_row_bytes(ep_scale scale, int64_t hidden)
{
    if (!is_scale(scale) || hidden < 1 || hidden > MAX_SIZE)
        return 0;
    return epi_scale_bytes(scale, (size_t)hidden);
}

ep_status ep_quantise(const void *x, ep_dtype dtype, int64_t rows, int64_t hidden, ep_scale scale,
                      uint8_t *q, void *scales)
{
    EPI_TRY(check_dtype("ep_quantise", "dtype", dtype));
    EPI_TRY(check_scale("ep_quantise", scale));
    EPI_TRY(check_shape("ep_quantise", rows, hidden));
    EPI_TRY(check_pointer("ep_quantise", "x", x, rows));
    EPI_TRY(check_pointer("ep_quantise", "q", q, rows));
    EPI_TRY(check_pointer("ep_quantise", "scales", scales, rows));
    const size_t n = (size_t)hidden, size = ep_dtype_size(dtype);
    const size_t scale_bytes = epi_scale_bytes(scale, n);
    for (size_t r = 0; r < (size_t)rows; r++)
        epi_codec()->quantise((const char *)x + r * n * size, dtype, n, scale, q + r * n,
                              (char *)scales + r * scale_bytes, false);
    return EP_OK;
}

ep_status ep_dequantise(const uint8_t *q, const void *scales, ep_scale scale, int64_t rows,
                        int64_t hidden, ep_dtype dtype, void *out)
{
    EPI_TRY(check_dtype("ep_dequantise", "dtype", dtype));
    EPI_TRY(check_scale("ep_dequantise", scale));
    EPI_TRY(check_shape("ep_dequantise", rows, hidden));
    EPI_TRY(check_pointer("ep_dequantise", "q", q, rows));
    EPI_TRY(check_pointer("ep_dequantise", "scales", scales, rows));
    EPI_TRY(check_pointer("ep_dequantise", "out", out, rows));
    const size_t n = (size_t)hidden, size = ep_dtype_size(dtype);
    const size_t scale_bytes = epi_scale_bytes(scale, n);
    for (size_t r = 0; r < (size_t)rows; r++)
        epi_codec()->dequantise(q + r * n, (const char *)scales + r * scale_bytes, scale, n, dtype,
                                (char *)out + r * n * size);
    return EP_OK;
}

ep_status ep_convert(const void *x, ep_dtype from, int64_t count, ep_dtype to, void *out)
{
    EPI_TRY(check_dtype("ep_convert", "from", from));
    EPI_TRY(check_dtype("ep_convert", "to", to));
    if (count < 0 || count > MAX_COUNT)
        return epi_fail(EP_ERR_ARGUMENT, "ep_convert: count is %lld; it must be 0..2^60",
                        (long long)count);
    EPI_TRY(check_pointer("ep_convert", "x", x, count));
    EPI_TRY(check_pointer("ep_convert", "out", out, count));
    if (count)
        epi_codec()->convert(from, x, to, (size_t)count, out);
    return EP_OK;
}

size_t ep_logfmt_row_bytes(int64_t hidden)
{
    return hidden < 1 || hidden > MAX_SIZE ? 0 : epi_logfmt_row_bytes((size_t)hidden);
}

ep_status ep_logfmt_encode(const uint16_t *x, int64_t rows, int64_t hidden, uint8_t *out,
                           size_t *used)
{
    EPI_TRY(check_shape("ep_logfmt_encode", rows, hidden));
    EPI_TRY(check_pointer("ep_logfmt_encode", "x", x, rows));
    EPI_TRY(check_pointer("ep_logfmt_encode", "out", out, rows));
    const size_t n = (size_t)hidden, distance = epi_logfmt_row_bytes(n);
    for (size_t r = 0; r < (size_t)rows; r++) {
        size_t bytes = epi_codec()->logfmt_encode(x + r * n, n, out + r * distance);
        if (used)
            used[r] = bytes;
    }
    return EP_OK;
}

ep_status ep_logfmt_decode(const uint8_t *in, const size_t *used, int64_t rows, int64_t hidden,
                           uint16_t *out)
{
    EPI_TRY(check_shape("ep_logfmt_decode", rows, hidden));
    EPI_TRY(check_pointer("ep_logfmt_decode", "in", in, rows));
    EPI_TRY(check_pointer("ep_logfmt_decode", "out", out, rows));
    const size_t n = (size_t)hidden, distance = epi_logfmt_row_bytes(n);
    for (size_t r = 0; used && r < (size_t)rows; r++) {
        size_t bytes = epi_logfmt_used_bytes(in + r * distance, n);
        if (bytes != used[r])
            return epi_fail(EP_ERR_FORMAT,
                            "ep_logfmt_decode: used[%zu] is %zu; the flags of that row make %zu", r,
                            used[r], bytes);
    }
    for (size_t r = 0; r < (size_t)rows; r++)
        epi_codec()->logfmt_decode(in + r * distance, n, out + r * n);
    return EP_OK;
}
