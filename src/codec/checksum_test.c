/* SPDX-License-Identifier: MIT */
/* The row checksum sees every change that a broken transfer can make. */
#include "codec/rows.h"
#include "support/random.h"
#include "support/test.h"

#include <stdlib.h>
#include <string.h>

enum { BYTES = 1000 };

static unsigned char data[BYTES + 64];

static void fill(void)
{
    struct rng rng;
    rng_seed(&rng, 31);
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)rng_next(&rng);
}

static void every_bit(void **state)
{
    (void)state;
    fill();
    for (size_t bytes = 1; bytes <= BYTES; bytes += bytes < 140 ? 1 : 215) {
        uint64_t whole = epi_checksum(data, bytes);
        for (size_t bit = 0; bit < bytes * 8; bit++) {
            data[bit / 8] ^= (unsigned char)(1u << bit % 8);
            assert_true(epi_checksum(data, bytes) != whole);
            data[bit / 8] ^= (unsigned char)(1u << bit % 8);
        }
        assert_true(epi_checksum(data, bytes) == whole);
    }
}

static int compare(const void *a, const void *b)
{
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return left < right ? -1 : left > right;
}

/* Fails if two of the sums are equal. */
static void all_differ(uint64_t *sums, size_t n)
{
    qsort(sums, n, sizeof *sums, compare);
    for (size_t i = 1; i < n; i++)
        assert_true(sums[i - 1] != sums[i]);
}

/* The sign bits of any two of the words: changes that cancel in weaker sums. */
static void two_signs(void **state)
{
    (void)state;
    enum { WORDS = 96 };
    static uint64_t row[WORDS], sums[WORDS * WORDS];
    size_t n = 0;
    for (size_t i = 0; i < WORDS; i++)
        for (size_t j = 0; j < i; j++) {
            row[i] ^= UINT64_C(1) << 63;
            row[j] ^= UINT64_C(1) << 63;
            sums[n++] = epi_checksum(row, sizeof row);
            row[i] = row[j] = 0;
        }
    sums[n++] = epi_checksum(row, sizeof row);
    all_differ(sums, n);
}

/* The same words in another order. */
static void order(void **state)
{
    (void)state;
    enum { WORDS = 64 };
    uint64_t row[WORDS];
    static uint64_t sums[WORDS * WORDS];
    size_t n = 0;
    for (size_t i = 0; i < WORDS; i++)
        row[i] = i;
    sums[n++] = epi_checksum(row, sizeof row);
    for (size_t i = 0; i < WORDS; i++)
        for (size_t j = 0; j < i; j++) {
            row[i] = j;
            row[j] = i;
            sums[n++] = epi_checksum(row, sizeof row);
            row[i] = i;
            row[j] = j;
        }
    all_differ(sums, n);
}

static void lengths_and_alignment(void **state)
{
    (void)state;
    static const unsigned char zeros[BYTES];
    uint64_t sums[BYTES + 1];
    for (size_t bytes = 0; bytes <= BYTES; bytes++)
        sums[bytes] = epi_checksum(zeros, bytes);
    all_differ(sums, BYTES + 1);
    fill();
    uint64_t want = epi_checksum(data, 500);
    for (size_t off = 1; off < 64; off++) {
        memmove(data + off, data + off - 1, 500);
        assert_true(epi_checksum(data + off, 500) == want);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_bit),
        cmocka_unit_test(two_signs),
        cmocka_unit_test(order),
        cmocka_unit_test(lengths_and_alignment),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
