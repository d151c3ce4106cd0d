/* SPDX-License-Identifier: MIT */
#include "check.h"

#include "check_scratch.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>

#define TOLERANCE 5e-6 /* of the relative squared difference, for BF16 outputs */

/* ------------------------------------------------------------------- E4M3 */

double check_e4m3_value(uint8_t code)
{
    int exponent = code >> 3 & 15, mantissa = code & 7;
    double size = exponent ? ldexp(8 + mantissa, exponent - 10) : ldexp(mantissa, -9);
    if ((code & 0x7f) == 0x7f)
        size = NAN;
    return code & 0x80 ? -size : size;
}

uint8_t check_e4m3_from(double value)
{
    uint8_t sign = signbit(value) ? 0x80 : 0;
    double size = fabs(value);
    int exponent = size > 0 ? ilogb(size) : -6;
    exponent = exponent < -6 ? -6 : exponent;
    double steps = rint(ldexp(size, 3 - exponent)); /* of 2^(exponent - 3), to nearest even */
    if (steps == 16) {
        steps = 8;
        exponent++;
    }
    if (exponent > 8 || (exponent == 8 && steps > 14))
        return sign | 0x7e;
    if (steps < 8) /* subnormal */
        return (uint8_t)(sign | (int)steps);
    return (uint8_t)(sign | (exponent + 7) << 3 | ((int)steps - 8));
}

void check_quantise(const uint16_t *row, int64_t hidden, uint8_t *codes, float *scales)
{
    for (int64_t start = 0; start < hidden; start += 128) {
        int64_t end = start + 128 < hidden ? start + 128 : hidden;
        double amax = 1e-4f;
        for (int64_t h = start; h < end; h++)
            amax = fmax(amax, fabs((double)float_from_bf16(row[h])));
        scales[start / 128] = (float)(amax / 448);
        float inverse = (float)(448 / amax);
        for (int64_t h = start; h < end; h++) {
            float scaled = (float)((double)float_from_bf16(row[h]) * inverse);
            codes[h] = check_e4m3_from(scaled);
        }
    }
}

/* --------------------------------------------------------------- dispatch */

static bool goes_to(const workload *w, const int32_t *ids, int rank)
{
    int64_t local = w->num_experts / w->num_ranks;
    for (int k = 0; k < w->topk; k++) {
        if (ids[k] >= 0 && ids[k] / local == rank)
            return true;
    }
    return false;
}

/* Where a row should have come from, for messages. */
typedef struct place {
    int64_t row;
    int source;
    int64_t token;
} place;

static bool wrong(const place *p, const char *what, char *message)
{
    return check_fail(message, "dispatch: row %" PRId64 " (rank %d, token %" PRId64 "): %s differs",
                      p->row, p->source, p->token, what);
}

static bool check_routing_of_row(const workload *w, int rank, const int32_t *ids,
                                 const float *weights, const ep_recv *recv, const place *p,
                                 char *message)
{
    int64_t local = w->num_experts / w->num_ranks;
    const int32_t *got_ids = (const int32_t *)recv->topk_idx.data + p->row * w->topk;
    const float *got_weights = (const float *)recv->topk_weights.data + p->row * w->topk;
    for (int k = 0; k < w->topk; k++) {
        bool here = ids[k] >= 0 && ids[k] / local == rank;
        if (got_ids[k] != (here ? ids[k] - rank * local : -1))
            return wrong(p, "expert id", message);
        if (got_weights[k] != (here ? weights[k] : 0))
            return wrong(p, "weight", message);
    }
    return true;
}

static bool check_row(const workload *w, bool fp8, check_scratch *s, const ep_recv *recv,
                      const place *p, char *message)
{
    size_t hidden = (size_t)w->hidden, blocks = (hidden + 127) / 128;
    const char *got = (const char *)recv->x.data +
                      (size_t)(p->row * recv->x.stride[0]) * ep_dtype_size(recv->x.dtype);
    workload_row(w, p->source, p->token, s->row);
    if (!fp8)
        return memcmp(got, s->row, hidden * 2) == 0 || wrong(p, "value", message);
    check_quantise(s->row, w->hidden, s->codes, s->scales);
    if (memcmp(got, s->codes, hidden) != 0)
        return wrong(p, "E4M3 code", message);
    const float *got_scales = (const float *)recv->scales.data;
    for (size_t b = 0; b < blocks; b++) {
        size_t at = (size_t)(p->row * recv->scales.stride[0]) + b * (size_t)recv->scales.stride[1];
        if (got_scales[at] != s->scales[b])
            return wrong(p, "scale", message);
    }
    return true;
}

static bool check_rows(const workload *w, int rank, bool fp8, const ep_recv *recv, check_scratch *s,
                       char *message)
{
    place p = {0, 0, 0};
    for (p.source = 0; p.source < w->num_ranks; p.source++) {
        if (!workload_routing(w, p.source, s->ids, s->weights))
            return check_fail(message, "no memory for the reference");
        for (p.token = 0; p.token < w->num_tokens; p.token++) {
            const int32_t *ids = s->ids + p.token * w->topk;
            const float *weights = s->weights + p.token * w->topk;
            if (!goes_to(w, ids, rank))
                continue;
            if (p.row == recv->num_rows)
                return check_fail(message, "dispatch: only %" PRId64 " rows", recv->num_rows);
            const int32_t *tokens = recv->source_token.data;
            if (tokens && tokens[p.row] != p.token)
                return wrong(&p, "source token", message);
            if (!check_routing_of_row(w, rank, ids, weights, recv, &p, message) ||
                !check_row(w, fp8, s, recv, &p, message))
                return false;
            p.row++;
        }
    }
    if (p.row != recv->num_rows)
        return check_fail(message, "dispatch: %" PRId64 " rows instead of %" PRId64, recv->num_rows,
                          p.row);
    return true;
}

bool check_dispatch(const workload *w, int rank, bool fp8, const ep_recv *recv,
                    char message[CHECK_MESSAGE_MAX])
{
    check_scratch s = {0};
    message[0] = 0;
    bool good = check_scratch_alloc(w, &s, message) && check_rows(w, rank, fp8, recv, &s, message);
    check_scratch_free(&s);
    return good;
}

/* ---------------------------------------------------------------- combine */

/* Sums the outputs of all ranks that hold experts of the token. */
static void sum_outputs(const workload *w, const int32_t *ids, const float *weights,
                        check_scratch *s)
{
    int64_t local = w->num_experts / w->num_ranks;
    bool first = true;
    for (int64_t h = 0; h < w->hidden; h++)
        s->sum[h] = 0, s->exact[h] = 0;
    for (int rank = 0; rank < w->num_ranks; rank++) {
        if (!goes_to(w, ids, rank))
            continue;
        float weight = 0;
        for (int k = 0; k < w->topk; k++)
            weight += ids[k] >= 0 && ids[k] / local == rank ? weights[k] : 0;
        for (int64_t h = 0; h < w->hidden; h++) {
            float y = float_from_bf16(bf16_from_float(weight * s->value[h]));
            s->sum[h] = first ? y : s->sum[h] + y;
            s->exact[h] += y;
        }
        first = false;
    }
}

bool check_combine(const workload *w, int rank, bool fp8, const uint16_t *out,
                   char message[CHECK_MESSAGE_MAX])
{
    check_scratch s = {0};
    check_difference d = {0, 0};
    message[0] = 0;
    bool good = check_scratch_alloc(w, &s, message);
    if (good && !workload_routing(w, rank, s.ids, s.weights))
        good = check_fail(message, "no memory for the reference");
    for (int64_t t = 0; good && t < w->num_tokens; t++) {
        check_expert_input(w, rank, t, fp8, &s);
        sum_outputs(w, s.ids + t * w->topk, s.weights + t * w->topk, &s);
        good = check_output(w, t, out + t * w->hidden, &s, &d, message);
    }
    good = good && check_difference_below(&d, TOLERANCE, message);
    check_scratch_free(&s);
    return good;
}
