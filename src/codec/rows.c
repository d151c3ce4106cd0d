/* SPDX-License-Identifier: MIT */
/* Which path runs: the best that the processor has, or what EP_ISA names. */
#include "codec/paths.h"

#include <stdatomic.h>
#include <string.h>

static const struct epi_codec *_Atomic chosen;

static enum epi_isa best_isa(void)
{
    return EPI_ISA_SCALAR;
}

const struct epi_codec *epi_codec_of(enum epi_isa isa)
{
    return isa == EPI_ISA_SCALAR ? &epi_codec_scalar : NULL;
}

const struct epi_codec *epi_codec(void)
{
    const struct epi_codec *codec = atomic_load_explicit(&chosen, memory_order_acquire);
    if (!codec) {
        codec = epi_codec_of(best_isa());
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
