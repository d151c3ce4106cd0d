/* SPDX-License-Identifier: MIT */
/* After a failure: all ranks that are left count their calls on from the same numbers. */
#include "ep/cuda/internal.h"

#include <stdlib.h>
#include <string.h>

enum {
    CALLS,
    SERIAL,
    EPOCH,
    LL_DISPATCH,
    LL_COMBINE = LL_DISPATCH + 2,
    NUM_COUNTS = LL_COMBINE + 2
};

typedef struct counts {
    uint32_t value[NUM_COUNTS];
} counts;

static counts counts_of(const epc_buffer *b, const epc_state *state)
{
    counts c = {{[CALLS] = b->calls, [SERIAL] = b->serial, [EPOCH] = state->epoch}};
    for (int i = 0; i < 2; i++) {
        c.value[LL_DISPATCH + i] = state->ll_epoch[i];
        c.value[LL_COMBINE + i] = state->ll_combine[i];
    }
    return c;
}

/* The furthest of any rank, modulo 2^32. */
static ep_status find_furthest(const epc_buffer *b, counts *own)
{
    const ep_group *group = b->buffer->group;
    counts *all = calloc((size_t)b->num_ranks, sizeof *all);
    if (!all)
        return epi_fail(EP_ERR_MEMORY, "ep_group_recover: out of memory");
    ep_status status = epc_core.allgather(b->buffer->group, own, all, sizeof *own);
    for (int r = 0; status == EP_OK && r < b->num_ranks; r++)
        for (int i = 0; !group->masked[r] && i < NUM_COUNTS; i++)
            if ((int32_t)(all[r].value[i] - own->value[i]) > 0)
                own->value[i] = all[r].value[i];
    free(all);
    return status;
}

/* All other ranks' words in this rank's window, as if each had done with the last call. Their
   kernels have ended; the next ones begin when every rank has come so far. */
static ep_status settle_flags(epc_buffer *b, const counts *c)
{
    size_t bytes = (size_t)b->num_ranks * EPC_NUM_FLAGS * sizeof(uint32_t);
    uint32_t *flags = calloc(1, bytes), *all = calloc((size_t)b->num_ranks, sizeof *all);
    ep_status status =
        flags && all ? EP_OK : epi_fail(EP_ERR_MEMORY, "ep_group_recover: out of memory");
    for (int r = 0; r < b->num_ranks && status == EP_OK; r++) {
        uint32_t *own = flags + r * EPC_NUM_FLAGS;
        own[EPC_FLAG_DONE] = c->value[EPOCH];
        for (int i = 0; i < 2; i++) {
            uint32_t *of_slot = own + EPC_FLAG_LL + i * EPC_LL_FLAGS;
            of_slot[EPC_LL_ROWS] = of_slot[EPC_LL_PULLED] = c->value[LL_DISPATCH + i];
            of_slot[EPC_LL_Y] = of_slot[EPC_LL_READ] = c->value[LL_COMBINE + i];
        }
    }
    if (status == EP_OK)
        status = epi_gpu_put(b->segments[0].memory, flags, bytes);
    if (status == EP_OK)
        status = epc_core.allgather(b->buffer->group, &(uint32_t){0}, all, sizeof *all);
    free(flags);
    free(all);
    return status;
}

ep_status epc_align(epc_buffer *b)
{
    epc_state state;
    EPI_TRY(epc_end_all(b));
    epc_ll_drop(b);
    EPI_TRY(epi_gpu_get(&state, b->comm.state, sizeof state));
    counts c = counts_of(b, &state);
    EPI_TRY(find_furthest(b, &c));
    memset(&state, 0, sizeof state);
    state.epoch = c.value[EPOCH];
    for (int i = 0; i < 2; i++) {
        state.ll_epoch[i] = c.value[LL_DISPATCH + i];
        state.ll_combine[i] = c.value[LL_COMBINE + i];
        state.ll_failed[i] = c.value[LL_DISPATCH + i];
    }
    b->calls = c.value[CALLS];
    b->serial = c.value[SERIAL];
    b->lost = 0;
    b->half_failed = EP_OK;
    EPI_TRY(epi_gpu_put(b->comm.state, &state, sizeof state));
    EPI_TRY(settle_flags(b, &c));
    epc_settle(b, b->serial + 1, epc_other_ranks(b)); /* their kernels have ended */
    return EP_OK;
}
