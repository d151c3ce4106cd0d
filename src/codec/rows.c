/* SPDX-License-Identifier: MIT */
/* Which path runs: the best that the processor has, or what EP_ISA names. */
#include "codec/rows.h"

#include "codec/paths.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

static const struct epi_codec *_Atomic chosen; /* NULL until somebody asks */
static pthread_once_t once = PTHREAD_ONCE_INIT;
static char isa_note[EPI_ISA_NOTE_BYTES];
static char features[64];

#if defined(__x86_64__)
static bool has_f16c(void)
{
    /* F16C has no name in __builtin_cpu_supports of older compilers. */
    unsigned a, b, c = 0, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C) && __builtin_cpu_supports("avx");
}

static bool has_avx2(void)
{
    return has_f16c() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

static bool has_avx512(void)
{
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static void list_features(void)
{
    const struct {
        const char *name;
        bool present;
    } all[] = {
        {"avx2", __builtin_cpu_supports("avx2")},
        {"fma", __builtin_cpu_supports("fma")},
        {"f16c", has_f16c()},
        {"avx512f", __builtin_cpu_supports("avx512f")},
        {"avx512bw", __builtin_cpu_supports("avx512bw")},
        {"avx512vl", __builtin_cpu_supports("avx512vl")},
        {"avx512dq", __builtin_cpu_supports("avx512dq")},
    };
    size_t used = 0;
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i].present)
            used += (size_t)snprintf(features + used, sizeof features - used, "%s%s",
                                     used ? " " : "", all[i].name);
}
#else
static void list_features(void)
{
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

static void choose(void)
{
    const struct epi_codec *none = NULL;
    const struct epi_codec *codec = epi_codec_named(getenv("EP_ISA"), isa_note, sizeof isa_note);
    list_features();
    /* What epi_codec_select chose before stands. */
    atomic_compare_exchange_strong(&chosen, &none, codec);
}

const struct epi_codec *epi_codec(void)
{
    const struct epi_codec *codec = atomic_load_explicit(&chosen, memory_order_acquire);
    if (codec)
        return codec;
    pthread_once(&once, choose);
    return atomic_load_explicit(&chosen, memory_order_acquire);
}

const char *ep_codec_isa(void)
{
    return epi_codec()->name;
}

const char *ep_codec_isa_note(void)
{
    pthread_once(&once, choose);
    return isa_note;
}

const char *ep_cpu_features(void)
{
    pthread_once(&once, choose);
    return features;
}

bool epi_codec_select(enum epi_isa isa)
{
    const struct epi_codec *codec = epi_codec_of(isa);
    if (codec)
        atomic_store_explicit(&chosen, codec, memory_order_release);
    return codec != NULL;
}
