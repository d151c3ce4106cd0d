/* SPDX-License-Identifier: MIT */
/* Low-latency calls that this rank refuses. */
#include "ep/cuda/ll.h"

/* Of the result that the others combine: the one alive; of two the older, if it has not been. */
static int slot_of_combine(const epc_ll *ll)
{
    int newest = (int)((ll->calls - 1) & 1), older = !newest;
    if (!ll->slot[older].result)
        return newest;
    return ll->slot[newest].result && ll->slot[older].summed ? newest : older;
}

/* Both halves of a call that moves nothing and tells the others to stop waiting. */
static ep_status launch_refusal(epc_buffer *b, epc_flight *flight, bool combine, uint32_t why)
{
    epc_ll_params p;
    int slot = combine ? slot_of_combine(b->ll) : (int)(b->ll->calls & 1);
    epc_ll_describe(b, b->ll, slot, flight, &p);
    p.refused = why;
    int kernel = combine ? EPC_LL_COMBINE_BOTH : EPC_LL_DISPATCH;
    epc_ll_room room = {0, 0};
    if (!combine)
        EPI_TRY(epc_ll_place_tables(b, &p, 1, &room));
    return epc_ll_start(kernel, &p, 1, room.receive, flight->stream);
}

ep_status epc_ll_refuse(epc_buffer *b, bool combine, ep_status status)
{
    epc_flight *flight;
    if (!b->ll) { /* the others are setting memory up */
        if (!combine)
            epc_ll_refuse_memory(b, status);
        return status;
    }
    uint32_t why = epc_reason_publish(b, status, ep_last_error());
    EPI_TRY(epc_begin_refusal(b, &flight));
    ep_status launched = launch_refusal(b, flight, combine, why);
    if (launched != EP_OK) {
        epc_cancel(flight);
        return launched;
    }
    if (!combine)
        b->ll->calls++;
    flight->claimed = true;
    return epc_launched(flight, NULL);
}
