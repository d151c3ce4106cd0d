/* SPDX-License-Identifier: MIT */
/* Low-latency combine on the device. */
#include "ep/cuda/ll.h"

#include <stdlib.h>
#include <string.h>

static ep_tensor send_buffer(const epc_buffer *b, const struct epc_ll_handle *own)
{
    const epc_ll *ll = own->ll;
    uint8_t *area = ll->areas->memory + own->core->slot * ll->area.bytes;
    return epc_tensor(b, area + ll->area.y, EP_BF16, 3, ll->num_local, ll->shape.expert_rows,
                      ll->shape.hidden);
}

/* Whether peers can read y where it is: rows of experts must follow each other. */
static bool readable(const epc_flight *flight, const ep_tensor *y, int *place, int64_t *offset)
{
    int64_t rows = y->shape[0] * y->shape[1];
    size_t bytes = rows ? (size_t)((rows - 1) * y->stride[1] + y->shape[2]) * 2 : 0;
    if ((y->shape[0] > 1 && y->stride[0] != y->shape[1] * y->stride[1]) ||
        y->stride[1] * 2 > UINT32_MAX)
        return false;
    return bytes == 0 || epc_locate(flight->owner, y->data, bytes, place, offset) ||
           epc_export(flight, y->data, bytes, place, offset);
}

/* Outputs that are copied or encoded to the area: from elsewhere, or encoded where they are. */
static ep_status check_overlap(const epc_buffer *b, const struct epc_ll_handle *own,
                               const ep_tensor *y)
{
    ep_tensor area = send_buffer(b, own);
    bool same = y->data == area.data && y->stride[1] == area.stride[1] &&
                (y->shape[0] < 2 || y->stride[0] == area.stride[0]);
    const uint8_t *start = area.data, *at = y->data;
    int64_t bytes = area.shape[0] * area.stride[0] * 2;
    if (same || at >= start + bytes || at + y->shape[0] * y->stride[0] * 2 <= start)
        return EP_OK;
    return epi_fail(
        EP_ERR_ARGUMENT,
        "ep_ll_combine: y lies in the send buffer with strides (%lld, %lld); there they "
        "must be those of ep_ll_combine_buffer (%lld, %lld)",
        (long long)y->stride[0], (long long)y->stride[1], (long long)area.stride[0],
        (long long)area.stride[1]);
}

/* y as the other ranks will find it. */
static ep_status place_outputs(const epc_flight *flight, const struct epc_ll_handle *own,
                               const ep_ll_combine_args *args, epc_ll_params *p)
{
    const epc_buffer *b = flight->owner;
    const epc_ll *ll = own->ll;
    int place = 0;
    int64_t offset = 0, stride = args->y.stride[1] * 2;
    p->encode = args->wire == EP_COMBINE_LOGFMT10;
    bool in_area = args->y.data == send_buffer(b, own).data,
         in_place = !p->encode && readable(flight, &args->y, &place, &offset);
    if (!in_place) {
        EPI_TRY(check_overlap(b, own, &args->y));
        p->y = args->y.data;
        p->y_expert_stride = args->y.stride[0] * 2;
        p->y_row_stride = args->y.stride[1] * 2;
        place = (int)ll->place[b->rank];
        offset = ll->offset[b->rank] + own->core->slot * ll->area.bytes + ll->area.y;
        stride = ll->shape.hidden * 2;
    }
    p->outside = in_place && !in_area;
    p->field[EPC_Y_PLACE] = (uint32_t)place;
    p->field[EPC_Y_OFFSET_LO] = (uint32_t)offset;
    p->field[EPC_Y_OFFSET_HI] = (uint32_t)((uint64_t)offset >> 32);
    p->field[EPC_Y_STRIDE] = (uint32_t)stride;
    p->field[EPC_Y_ENCODED] = (uint32_t)p->encode;
    return EP_OK;
}

/* Lists of entries: of a block's tokens in its shared memory, or of all on the device where that
   would leave the ring little. *shared: bytes of the former. */
static ep_status place_entries(epc_buffer *b, epc_ll_params *p, int blocks, size_t *shared)
{
    size_t tokens = ((size_t)p->num_tokens + (size_t)blocks - 1) / (size_t)blocks;
    size_t bytes = tokens * (size_t)p->topk * sizeof(epc_entry);
    uint8_t *scratch;
    *shared = (bytes + 127) / 128 * 128;
    if (bytes <= 16 * 1024)
        return EP_OK;
    *shared = 0;
    EPI_TRY(epc_use_scratch(b, bytes * (size_t)blocks, &scratch));
    p->entries = (epc_entry *)scratch;
    return EP_OK;
}

static ep_status combine_with(epc_buffer *b, epc_flight *flight, const struct epc_ll_handle *own,
                              const ep_ll_combine_args *args, int blocks, bool hook)
{
    epc_ll_params p;
    epc_ll_describe(b, own->ll, own->core->slot, flight, &p);
    p.num_tokens = (int32_t)own->core->num_tokens;
    p.ids = args->topk_idx.data;
    p.id_stride = args->topk_idx.stride[0];
    p.id_bytes = args->topk_idx.dtype == EP_I64 ? 8 : 4;
    p.saved_ids = own->ids;
    p.position = own->position;
    p.weights = args->topk_weights.data;
    p.weight_stride = args->topk_weights.stride[0];
    p.out = args->out.data;
    p.out_stride = args->out.stride[0] * 2;
    p.wait_cost = args->wait_cost.data;
    p.wait_cost_stride = args->wait_cost.stride[0];
    EPI_TRY(place_outputs(flight, own, args, &p));
    size_t entries;
    EPI_TRY(place_entries(b, &p, blocks, &entries));
    size_t shared = entries + epc_plan_ring(b, p.hidden, EP_BF16, entries, &p.bulk, &p.pieces,
                                            &p.piece_bytes, &p.slots);
    return epc_ll_launch_call(flight, &p, (epc_ll_kernel){EPC_LL_COMBINE_BOTH, blocks, shared},
                              (epc_ll_kernel){EPC_LL_OUTPUTS, p.y ? blocks : 1, 0},
                              (epc_ll_kernel){EPC_LL_COMBINE, blocks, shared}, hook);
}

ep_status epc_ll_combine_call(ep_buffer *buffer, const ep_ll_combine_args *args, ep_event **event)
{
    epc_buffer *b = epc_of(buffer);
    struct epc_ll_handle *own = ((epc_handle *)args->handle->device)->ll;
    bool hook = event && args->completion == EP_COMPLETE_BY_HOOK;
    epc_flight *flight;
    int blocks = 0;
    ep_status status = epc_begin(b, "ep_ll_combine", args->stream, args->previous, &flight);
    if (status != EP_OK)
        return epc_reject(buffer, "ep_ll_combine", status);
    if (!own->ll) /* learnt since the arguments were checked */
        status = epi_fail(EP_ERR_STATE, "ep_ll_combine: the dispatch of this result failed");
    if (status == EP_OK)
        status = epc_choose_blocks(b, flight->call, args->num_sms, &blocks);
    if (status == EP_OK) {
        own->ll->captured |= flight->slot == EPC_CAPTURED;
        status = combine_with(b, flight, own, args, blocks, hook);
    }
    if (status != EP_OK) {
        epc_cancel(flight);
        return epc_reject(buffer, "ep_ll_combine", status);
    }
    own->ll->slot[own->core->slot].combined = own->ll->slot[own->core->slot].summed = true;
    flight->handle = args->handle;
    atomic_fetch_add(&flight->handle->holders, 1);
    return epc_launched(flight, event);
}

ep_status epc_ll_combine_buffer_call(ep_buffer *buffer, ep_handle *handle, ep_tensor *y)
{
    *y = send_buffer(epc_of(buffer), ((epc_handle *)handle->device)->ll);
    return EP_OK;
}
