/* SPDX-License-Identifier: MIT */
/*
 * Rates of the row kernels, one line per kernel and path, over batches of rows
 * that do and do not fit the caches. Prints a table; times nothing in tests.
 *
 * usage: codec_bench [hidden [rows]]
 */
#include "codec/rows.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TERMS 5
#define SMALL_ROWS 16
#define WINDOW 32   /* rows timed together */
#define SECONDS 0.1 /* per figure */

struct bench {
    size_t hidden, rows;
    uint16_t *x, *y; /* [rows, hidden] BF16 */
    uint8_t *q;      /* [rows, hidden] or encoded rows */
    float *scales;   /* [rows, ceil(hidden/128)] */
    const struct epi_codec *codec;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Every kernel does row r of the batch and returns the bytes of its inputs. */
typedef size_t kernel(struct bench *b, size_t r);

static size_t row_copy(struct bench *b, size_t r)
{
    b->codec->copy(b->y + r * b->hidden, b->x + r * b->hidden, b->hidden * 2, false);
    return b->hidden * 2;
}

static size_t row_copy_stream(struct bench *b, size_t r)
{
    b->codec->copy(b->y + r * b->hidden, b->x + r * b->hidden, b->hidden * 2, true);
    return b->hidden * 2;
}

static size_t quantise(struct bench *b, size_t r, ep_scale kind, bool streaming)
{
    b->codec->quantise(b->x + r * b->hidden, EP_BF16, b->hidden, kind, b->q + r * b->hidden,
                       b->scales + r * ((b->hidden + 127) / 128), streaming);
    return b->hidden * 2;
}

static size_t row_quantise(struct bench *b, size_t r)
{
    return quantise(b, r, EP_SCALE_F32, false);
}

static size_t row_quantise_stream(struct bench *b, size_t r)
{
    return quantise(b, r, EP_SCALE_F32, true);
}

static size_t row_quantise_ue8m0(struct bench *b, size_t r)
{
    return quantise(b, r, EP_SCALE_UE8M0, false);
}

static size_t row_dequantise(struct bench *b, size_t r)
{
    b->codec->dequantise(b->q + r * b->hidden, b->scales + r * ((b->hidden + 127) / 128),
                         EP_SCALE_F32, b->hidden, EP_BF16, b->y + r * b->hidden);
    return b->hidden;
}

static size_t reduce(struct bench *b, size_t r, const float *weights)
{
    const void *rows[TERMS];
    for (size_t i = 0; i < TERMS; i++)
        rows[i] = b->x + (r * 7 + i * (b->rows / TERMS)) % b->rows * b->hidden;
    b->codec->reduce(EP_BF16, rows, weights, TERMS, NULL, NULL, b->hidden, b->y + r * b->hidden);
    return TERMS * b->hidden * 2;
}

static size_t row_reduce(struct bench *b, size_t r)
{
    return reduce(b, r, NULL);
}

static size_t row_reduce_weighted(struct bench *b, size_t r)
{
    static const float weights[TERMS] = {0.3f, 0.25f, 0.2f, 0.15f, 0.1f};
    return reduce(b, r, weights);
}

static size_t row_scale(struct bench *b, size_t r)
{
    b->codec->scale(EP_BF16, b->x + r * b->hidden, 0.3f, b->hidden, b->y + r * b->hidden);
    return b->hidden * 2;
}

static size_t row_dot(struct bench *b, size_t r)
{
    volatile float kept = b->codec->dot(EP_BF16, b->x + r * b->hidden,
                                        b->x + (r + b->rows / 2) % b->rows * b->hidden, b->hidden);
    (void)kept;
    return b->hidden * 4;
}

static size_t row_checksum(struct bench *b, size_t r)
{
    volatile uint64_t kept = epi_checksum(b->x + r * b->hidden, b->hidden * 2);
    (void)kept;
    return b->hidden * 2;
}

static size_t row_encode(struct bench *b, size_t r)
{
    b->codec->logfmt_encode(b->x + r * b->hidden, b->hidden,
                            b->q + r * epi_logfmt_row_bytes(b->hidden));
    return b->hidden * 2;
}

static size_t row_decode(struct bench *b, size_t r)
{
    const uint8_t *row = b->q + r * epi_logfmt_row_bytes(b->hidden);
    b->codec->logfmt_decode(row, b->hidden, b->y + r * b->hidden);
    return epi_logfmt_used_bytes(row, b->hidden);
}

static const struct {
    const char *name;
    kernel *run;
} kernels[] = {
    {"copy", row_copy},
    {"copy streaming", row_copy_stream},
    {"quantise", row_quantise},
    {"quantise streaming", row_quantise_stream},
    {"quantise UE8M0", row_quantise_ue8m0},
    {"dequantise", row_dequantise},
    {"reduce 5", row_reduce},
    {"reduce 5 weighted", row_reduce_weighted},
    {"scale", row_scale},
    {"dot", row_dot},
    {"checksum", row_checksum},
    {"logfmt encode", row_encode},
    {"logfmt decode", row_decode},
};

/*
 * GB/s of input bytes over a batch of rows, worked through in order again and
 * again. The best of many short windows: other programs on the machine slow
 * some of them, and what is wanted is the kernel's own rate.
 */
static double rate(struct bench *b, kernel *run, size_t rows)
{
    double best = 0;
    size_t all = b->rows, r = 0;
    b->rows = rows;
    for (double end = now() + SECONDS; now() < end;) {
        double bytes = 0, start = now();
        for (int i = 0; i < WINDOW; i++, r = (r + 1) % rows)
            bytes += (double)run(b, r);
        b->codec->fence();
        double spent = now() - start;
        if (bytes / spent > best)
            best = bytes / spent;
    }
    b->rows = all;
    return best * 1e-9;
}

static void print_kernel(struct bench *b, const char *name, kernel *run)
{
    printf("%-20s", name);
    for (int isa = 0; isa < EPI_ISA_COUNT; isa++) {
        b->codec = epi_codec_of((enum epi_isa)isa);
        if (b->codec)
            printf("  %8.2f %8.2f", rate(b, run, SMALL_ROWS), rate(b, run, b->rows));
        else
            printf("  %8s %8s", "-", "-");
    }
    printf("\n");
}

static int set_up(struct bench *b)
{
    size_t count = b->rows * b->hidden, row_bytes = epi_logfmt_row_bytes(b->hidden);
    b->x = aligned_alloc(64, (count * 2 + 63) / 64 * 64);
    b->y = aligned_alloc(64, (count * 2 + 63) / 64 * 64);
    b->q = aligned_alloc(64, (b->rows * row_bytes + 63) / 64 * 64);
    b->scales = malloc(b->rows * ((b->hidden + 127) / 128) * sizeof(float));
    if (!b->x || !b->y || !b->q || !b->scales)
        return -1;
    uint32_t seed = 1;
    for (size_t i = 0; i < count; i++) {
        seed = seed * 1664525u + 1013904223u;
        /* signs and mantissas at random, magnitudes 2^-8 to 1 */
        b->x[i] = (uint16_t)((seed >> 16 & 0x807f) | (119 + (seed >> 8 & 7)) << 7);
    }
    memset(b->y, 0, count * 2);
    memset(b->q, 0, b->rows * row_bytes);
    return 0;
}

int main(int argc, char **argv)
{
    struct bench b = {.hidden = 7168, .rows = 1024};
    if (argc > 1)
        b.hidden = strtoul(argv[1], NULL, 10);
    if (argc > 2)
        b.rows = strtoul(argv[2], NULL, 10);
    if (b.hidden == 0 || b.hidden > 1u << 20 || b.rows < SMALL_ROWS || b.rows > 1u << 20) {
        fprintf(stderr, "usage: codec_bench [hidden 1..1048576 [rows %d..1048576]]\n", SMALL_ROWS);
        return 2;
    }
    if (set_up(&b)) {
        fprintf(stderr, "codec_bench: not enough memory for %zu rows of %zu\n", b.rows, b.hidden);
        return 3;
    }
    printf("GB/s of input bytes, BF16 rows of %zu; batches of %d and %zu rows\n", b.hidden,
           SMALL_ROWS, b.rows);
    printf("%-20s  %17s  %17s  %17s\n", "", "scalar", "avx2", "avx512");
    for (size_t k = 0; k < sizeof kernels / sizeof *kernels; k++)
        print_kernel(&b, kernels[k].name, kernels[k].run);
    free(b.x);
    free(b.y);
    free(b.q);
    free(b.scales);
    return 0;
}
