/* SPDX-License-Identifier: MIT */
#include "support/fuzz.h"

#include "support/random.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct input {
    uint8_t *data;
    size_t size, max;
};

/* What the crash handler writes out. */
static char crash_path[128];
static const struct input *current;

static void on_crash(int signal_number)
{
    /* System calls only: the heap may be broken. */
    int file = open(crash_path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (file >= 0 && write(file, current->data, current->size) == (ssize_t)current->size) {
        static const char note[] = "run the test again with this file as argument: ";
        ssize_t written = write(2, note, sizeof note - 1);
        written += write(2, crash_path, strlen(crash_path));
        written += write(2, "\n", 1);
        (void)written;
    }
    signal(signal_number, SIG_DFL);
    raise(signal_number);
}

static void catch_crashes(const char *name, const struct input *input)
{
    static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT};
    current = input;
    snprintf(crash_path, sizeof crash_path, "/tmp/ep-fuzz-%s-%d", name, (int)getpid());
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++)
        signal(signals[i], on_crash);
}

static void insert(struct input *input, size_t at, const void *bytes, size_t size)
{
    if (size > input->max - input->size)
        size = input->max - input->size;
    memmove(input->data + at + size, input->data + at, input->size - at);
    memcpy(input->data + at, bytes, size);
    input->size += size;
}

static void erase(struct input *input, size_t at, size_t size)
{
    if (size > input->size - at)
        size = input->size - at;
    memmove(input->data + at, input->data + at + size, input->size - at - size);
    input->size -= size;
}

static size_t count(const char *const *list)
{
    size_t n = 0;
    while (list && list[n])
        n++;
    return n;
}

/* Copies a piece of the input itself elsewhere: repeats and reorders what is valid. */
static void repeat_piece(struct rng *rng, struct input *input, size_t at)
{
    uint8_t piece[64];
    size_t from = rng_below(rng, input->size + 1), size = rng_below(rng, sizeof piece + 1);
    if (size > input->size - from)
        size = input->size - from;
    memcpy(piece, input->data + from, size);
    insert(input, at, piece, size);
}

static void mutate(struct rng *rng, const struct fuzz_target *target, struct input *input)
{
    static const char *const numbers[] = {"0",          "-1",          "9223372036854775808",
                                          "2147483648", "1e999",       "nan",
                                          "0x10",       "-9999999999", "4294967296"};
    size_t at = rng_below(rng, input->size + 1), words = count(target->words);
    uint8_t byte = (uint8_t)rng_next(rng);
    switch (rng_below(rng, 8)) {
    case 0: /* flip a bit */
        if (at < input->size)
            input->data[at] ^= (uint8_t)(1u << (byte & 7));
        break;
    case 1: /* any byte */
        if (at < input->size)
            input->data[at] = byte;
        break;
    case 2:
        insert(input, at, &byte, 1);
        break;
    case 3:
        erase(input, at, 1 + rng_below(rng, 16));
        break;
    case 4: /* cut short */
        input->size = at;
        break;
    case 5:
        repeat_piece(rng, input, at);
        break;
    case 6: {
        const char *number = numbers[rng_below(rng, sizeof numbers / sizeof *numbers)];
        insert(input, at, number, strlen(number));
        break;
    }
    default:
        if (words > 0) {
            const char *word = target->words[rng_below(rng, words)];
            insert(input, at, word, strlen(word));
        }
        break;
    }
}

static void load_seed(struct rng *rng, const struct fuzz_target *target, struct input *input)
{
    size_t texts = count(target->seeds), blobs = 0;
    while (target->blobs && target->blobs[blobs].size)
        blobs++;
    input->size = 0;
    if (texts + blobs == 0)
        return;
    size_t pick = rng_below(rng, texts + blobs);
    if (pick < texts)
        insert(input, 0, target->seeds[pick], strlen(target->seeds[pick]));
    else
        insert(input, 0, target->blobs[pick - texts].data, target->blobs[pick - texts].size);
}

/* Each input lies in a block of exactly its size, so that a sanitizer sees any read past it. */
static int run_one(const struct fuzz_target *target, const struct input *input)
{
    uint8_t *exact = malloc(input->size ? input->size : 1);
    if (!exact)
        return 1;
    memcpy(exact, input->data, input->size);
    int result = target->one_input(exact, input->size);
    free(exact);
    return result;
}

static int run_file(const struct fuzz_target *target, const char *path, struct input *input)
{
    FILE *file = fopen(path, "rb");
    if (!file) {
        perror(path);
        return 1;
    }
    input->size = fread(input->data, 1, input->max, file);
    fclose(file);
    return run_one(target, input);
}

static int run_mutations(const struct fuzz_target *target, struct input *input)
{
    uint64_t seed = rng_env_seed(1);
    int64_t runs = rng_env_number("EP_FUZZ_RUNS", 20000);
    for (int64_t i = 0; i < runs; i++) {
        struct rng rng;
        rng_seed(&rng, seed * 1000003u + (uint64_t)i);
        load_seed(&rng, target, input);
        for (uint64_t n = rng_below(&rng, 6); n > 0; n--)
            mutate(&rng, target, input);
        if (run_one(target, input) != 0) {
            fprintf(stderr, "%s: input %lld of EP_TEST_SEED=%llu failed\n", target->name,
                    (long long)i, (unsigned long long)seed);
            raise(SIGABRT);
        }
    }
    printf("%s: %lld inputs from seed %llu\n", target->name, (long long)runs,
           (unsigned long long)seed);
    return 0;
}

int fuzz_run(const struct fuzz_target *target, int argc, char **argv)
{
    struct input input = {malloc(target->max_size + 1), 0, target->max_size};
    int failed = 0;
    if (!input.data)
        return 1;
    catch_crashes(target->name, &input);
    for (int i = 1; i < argc; i++)
        failed |= run_file(target, argv[i], &input);
    if (argc <= 1)
        failed = run_mutations(target, &input);
    free(input.data);
    return failed;
}
