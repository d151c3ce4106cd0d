/* SPDX-License-Identifier: MIT */
/*
 * Fuzzing of everything parsed from outside. One source serves two builds: as a
 * test it mutates its seeds a fixed number of times from a fixed seed; built
 * with EP_LIBFUZZER it is a libFuzzer target.
 *
 *     static int one_input(const uint8_t *data, size_t size) { ...; return 0; }
 *     static const char *const seeds[] = {"rank=1", NULL};
 *     static const struct fuzz_target target = {"env", one_input, seeds, words, 4096};
 *     FUZZ_MAIN(target)
 *
 * EP_FUZZ_RUNS and EP_TEST_SEED of the environment lengthen and vary the test;
 * files named on the command line are run once each, to repeat a finding.
 */
#ifndef EP_TEST_FUZZ_H
#define EP_TEST_FUZZ_H

#include <stddef.h>
#include <stdint.h>

struct fuzz_target {
    const char *name;
    int (*one_input)(const uint8_t *data, size_t size); /* must survive any input */
    const char *const *seeds;                           /* valid inputs as text, NULL at the end */
    const char *const *words; /* tokens to splice in, NULL at the end; NULL: none */
    size_t max_size;
    const struct fuzz_blob { /* valid inputs that are not text, size 0 at the end; NULL: none */
        const void *data;
        size_t size;
    } * blobs;
};

/* Runs the target; exit status of the program. A crash prints how to repeat it. */
int fuzz_run(const struct fuzz_target *target, int argc, char **argv);

#ifdef EP_LIBFUZZER
#define FUZZ_MAIN(target)                                        \
    int LLVMFuzzerTestOneInput(const uint8_t *, size_t);         \
    int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) \
    {                                                            \
        return (target).one_input(data, size);                   \
    }
#else
#define FUZZ_MAIN(target)                       \
    int main(int argc, char **argv)             \
    {                                           \
        return fuzz_run(&(target), argc, argv); \
    }
#endif

#endif
