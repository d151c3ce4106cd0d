/* SPDX-License-Identifier: MIT */
/* Which path runs: the best that the processor has, or what EP_ISA names. */
#include "codec/rows.h"

#include "codec/paths.h"

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const struct epi_codec *_Atomic chosen;

#if defined(__x86_64__)
static bool has_avx2(void)
{
    unsigned a, b, c = 0, d;
    /* F16C has no name in __builtin_cpu_supports of older compilers. */
    bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

const struct epi_codec *epi_codec_of(enum epi_isa isa)
{
    if (isa == EPI_ISA_SCALAR)
        return &epi_codec_scalar;
#if defined(__x86_64__)
    if (isa == EPI_ISA_AVX2 && has_avx2())
        return &epi_codec_avx2;
    if (isa == EPI_ISA_AVX512 && has_avx512())
        return &epi_codec_avx512;
#endif
    return NULL;
}

static const struct epi_codec *best(void)
{
    int isa = EPI_ISA_COUNT - 1;
    while (!epi_codec_of(isa))
        isa--;
    return epi_codec_of(isa);
}

const struct epi_codec *epi_codec_named(const char *name, char *note, size_t note_bytes)
{
    static const char *const names[EPI_ISA_COUNT] = {"scalar", "avx2", "avx512"};
    const struct epi_codec *codec = best();
    note[0] = '\0';
    if (!name || !*name)
        return codec;
    for (int isa = 0; isa < EPI_ISA_COUNT; isa++) {
        if (strcmp(name, names[isa]) == 0) {
            if (epi_codec_of(isa))
                return epi_codec_of(isa);
            snprintf(note, note_bytes, "EP_ISA=%s: this processor lacks it; using %s", name,
                     codec->name);
            return codec;
        }
    }
    snprintf(note, note_bytes, "EP_ISA=%.32s is not scalar, avx2 or avx512; using %s", name,
             codec->name);
    return codec;
}

const struct epi_codec *epi_codec(void)
{
    const struct epi_codec *codec = atomic_load_explicit(&chosen, memory_order_acquire);
    if (!codec) {
        /* Threads that race here all find the same answer. */
        char note[EPI_ISA_NOTE_BYTES];
        codec = epi_codec_named(getenv("EP_ISA"), note, sizeof note);
        atomic_store_explicit(&chosen, codec, memory_order_release);
    }
    return codec;
}

bool epi_codec_select(enum epi_isa isa)
{
    const struct epi_codec *codec = epi_codec_of(isa);
    if (codec)
        atomic_store_explicit(&chosen, codec, memory_order_release);
    return codec != NULL;
}
