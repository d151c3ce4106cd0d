/* SPDX-License-Identifier: MIT */
/* Low-latency dispatch on the device, and its results. */
#include "ep/cuda/ll.h"

#include <stdlib.h>
#include <string.h>

void epc_ll_handle_free(ep_handle *handle)
{
    struct epc_ll_handle *own = ((epc_handle *)handle->device)->ll;
    handle->ll = NULL;
    epc_ll_retire(own);
    epc_give(((epc_handle *)handle->device)->owner, own->block);
    free(own->core);
    free(own);
}

static ep_status new_ll_handle(epc_buffer *b, const ep_ll_dispatch_args *args, int slot,
                               ep_handle **out)
{
    epc_ll *ll = b->ll;
    size_t links = (size_t)(args->x.shape[0] * args->topk_idx.shape[1]),
           bytes = (size_t)epc_ll_align((int64_t)links * 4);
    ep_handle *handle = epc_core.handle_new(b->buffer);
    epc_handle *device = calloc(1, sizeof *device);
    struct epc_ll_handle *own = calloc(1, sizeof *own);
    epi_ll_result *core = calloc(1, sizeof *core);
    ep_status status = handle && device && own && core
                           ? epc_take(b, 2 * bytes, &own->block)
                           : epi_fail(EP_ERR_MEMORY, "ep_ll_dispatch: out of memory");
    if (status != EP_OK) {
        if (handle)
            epc_core.handle_release(handle);
        free(device);
        free(own);
        free(core);
        return status;
    }
    atomic_init(&device->holders, 1);
    device->owner = b;
    device->ll = own;
    pthread_mutex_init(&device->fetching, NULL);
    device->fetched = true;
    own->ll = ll;
    own->core = core;
    own->ids = (int32_t *)own->block->memory;
    own->position = (int32_t *)(own->block->memory + bytes);
    own->core->ll = &own->core_shape;
    own->core->slot = slot;
    own->core->epoch = b->calls;
    own->core->num_tokens = args->x.shape[0];
    own->core->topk = (int)args->topk_idx.shape[1];
    own->core_shape.shape.expert_rows = ll->shape.expert_rows;
    own->core_shape.shape.hidden = ll->shape.hidden;
    handle->device = device;
    handle->ll = own->core;
    handle->num_tokens = args->x.shape[0];
    handle->topk = own->core->topk;
    handle->hidden = ll->shape.hidden;
    handle->num_experts = ll->shape.num_experts;
    handle->num_local = ll->num_local;
    *out = handle;
    return EP_OK;
}

/* How a receive moves rows: through the bulk copy engine where it can. Returns its shared memory,
   of which its tables take `tables` bytes. */
static size_t plan_movers(const epc_buffer *b, epc_ll_params *p, size_t tables)
{
    size_t most = (size_t)b->gpu.max_shared - 12 * 1024;
    size_t before = (tables + 127) / 128 * 128 + EPC_LL_LIST * sizeof(epc_ll_row);
    int64_t parts = (p->row_bytes + EPC_LL_PIECE - 1) / EPC_LL_PIECE;
    size_t piece = (size_t)((p->row_bytes + parts - 1) / parts + 127) / 128 * 128;
    size_t movers = before < most ? (most - before) / (2 * piece) : 0;
    p->bulk = b->bulk && p->row_bytes % 16 == 0 && !p->many && !p->verify &&
              movers >= EPC_LL_LEAST_MOVERS;
    if (!p->bulk)
        return tables;
    p->slots = (int32_t)(movers < EPC_LL_MOST_MOVERS ? movers : EPC_LL_MOST_MOVERS);
    p->pieces = (int32_t)((p->row_bytes + (int64_t)piece - 1) / (int64_t)piece);
    p->piece_bytes = (int32_t)piece;
    return before + (size_t)p->slots * 2 * piece;
}

static void fill_recv(epc_buffer *b, int slot, bool by_column, ep_handle *handle, ep_ll_recv *out)
{
    const epc_ll *ll = b->ll;
    const epc_ll_slot *own = &ll->slot[slot];
    int64_t local = ll->num_local, room = ll->shape.expert_rows, columns = ll->scale_count;
    ep_ll_recv recv = EP_LL_RECV_INIT;
    recv.x = epc_tensor(b, own->x, (ep_dtype)ll->shape.wire, 3, local, room, ll->shape.hidden);
    if (columns) {
        recv.scales =
            epc_tensor(b, own->scales, ll->shape.scale == EP_SCALE_UE8M0 ? EP_UE8M0X4 : EP_F32, 3,
                       local, room, columns);
        if (by_column) {
            recv.scales.stride[1] = 1;
            recv.scales.stride[2] = room;
        }
    }
    recv.count = epc_tensor(b, own->count, EP_I32, 1, local, 0, 0);
    recv.dropped = epc_tensor(b, own->dropped, EP_I32, 1, local, 0, 0);
    recv.source_token = epc_tensor(b, own->source_token, EP_I32, 2, local, room, 0);
    recv.source_range = epc_tensor(b, own->range, EP_I64, 2, local, b->num_ranks, 0);
    recv.handle = handle;
    recv.owner = handle;
    atomic_fetch_add(&handle->holders, 1);
    recv.size = out->size;
    memcpy(out, &recv, recv.size < sizeof recv ? recv.size : sizeof recv);
}

static ep_status dispatch_with(epc_buffer *b, epc_flight *flight, const ep_ll_dispatch_args *args,
                               int slot, ep_handle *handle, int blocks, bool hook)
{
    const epc_ll *ll = b->ll;
    const struct epc_ll_handle *own = ((epc_handle *)handle->device)->ll;
    epc_ll_params p;
    epc_ll_describe(b, ll, slot, flight, &p);
    p.num_tokens = (int32_t)args->x.shape[0];
    p.x = args->x.data;
    p.x_stride = args->x.stride[0] * 2;
    p.ids = args->topk_idx.data;
    p.id_stride = args->topk_idx.stride[0];
    p.id_bytes = args->topk_idx.dtype == EP_I64 ? 8 : 4;
    p.saved_ids = own->ids;
    p.position = own->position;
    p.scales_by_column = args->scales_by_column;
    p.recv_x = ll->slot[slot].x;
    p.recv_scales = ll->slot[slot].scales;
    p.dropped = ll->slot[slot].dropped;
    p.source_token = ll->slot[slot].source_token;
    p.range = ll->slot[slot].range;
    p.expert_tokens = args->expert_tokens.data;
    p.expert_tokens_stride = args->expert_tokens.stride[0];
    p.wait_cost = args->wait_cost.data;
    p.wait_cost_stride = args->wait_cost.stride[0];
    epc_ll_room room;
    EPI_TRY(epc_ll_place_tables(b, &p, blocks, &room));
    room.receive = plan_movers(b, &p, room.receive);
    size_t most = room.send > room.receive ? room.send : room.receive;
    return epc_ll_launch_call(flight, &p, (epc_ll_kernel){EPC_LL_DISPATCH, blocks, most},
                              (epc_ll_kernel){EPC_LL_SEND, blocks, room.send},
                              (epc_ll_kernel){EPC_LL_RECEIVE, blocks, room.receive}, hook);
}

/* Kernels number (token, place) pairs, and rows, in int32. */
static ep_status check_numbers(const char *call, const ep_ll_dispatch_args *args,
                               const epc_ll_shape *shape, const epc_table *table)
{
    int64_t tokens = args->x.shape[0], topk = args->topk_idx.shape[1];
    if (tokens * topk > INT32_MAX)
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "%s: topk_idx is [%lld, %lld]; on CUDA it must have fewer than 2147483648 "
                        "elements",
                        call, (long long)tokens, (long long)topk);
    if (shape->expert_rows * table->num_local > INT32_MAX)
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "%s: max_expert_rows is %lld for %d experts; on CUDA their product must be "
                        "below 2147483648",
                        call, (long long)shape->expert_rows, table->num_local);
    return EP_OK;
}

static ep_status prepare_dispatch(epc_buffer *b, epc_flight *flight,
                                  const ep_ll_dispatch_args *args, int *blocks, bool *told)
{
    epc_table *table;
    epc_ll_shape shape;
    EPI_TRY(epc_choose_blocks(b, flight->call, args->num_sms, blocks));
    EPI_TRY(epc_find_table(b, flight->call, args->num_experts, args->expert_rank, &table));
    memset(&shape, 0, sizeof shape);
    shape.max_tokens = args->max_tokens;
    shape.hidden = args->x.shape[1];
    shape.num_experts = args->num_experts;
    shape.expert_rows =
        args->max_expert_rows ? args->max_expert_rows : args->max_tokens * b->num_ranks;
    shape.table_sum = table->sum;
    shape.topk = (int32_t)args->topk_idx.shape[1];
    shape.wire = args->wire;
    shape.scale = args->wire == EP_E4M3 ? args->scale : 0;
    shape.overflow = args->overflow;
    shape.masked = epc_mask_word(b);
    EPI_TRY(check_numbers(flight->call, args, &shape, table));
    return epc_ll_prepare_memory(b, &shape, table, flight->serial == 0, told);
}

ep_status epc_ll_dispatch_call(ep_buffer *buffer, const ep_ll_dispatch_args *args, ep_ll_recv *recv,
                               ep_event **event)
{
    epc_buffer *b = epc_of(buffer);
    const char *call = "ep_ll_dispatch";
    bool hook = event && args->completion == EP_COMPLETE_BY_HOOK, told = false;
    epc_flight *flight;
    ep_handle *handle = NULL;
    int blocks = 0, slot = 0;
    ep_status status = epc_begin(b, call, args->stream, args->previous, &flight);
    if (status != EP_OK)
        return epc_reject(buffer, call, status);
    status = prepare_dispatch(b, flight, args, &blocks, &told);
    if (status == EP_OK) {
        slot = (int)(b->ll->calls & 1);
        if (b->ll->slot[slot].result)
            status = epi_fail(
                EP_ERR_STATE,
                "%s: two results are alive; release the older with ep_ll_recv_release first", call);
    }
    if (status == EP_OK)
        status = new_ll_handle(b, args, slot, &handle);
    if (status == EP_OK) {
        b->ll->captured |= flight->slot == EPC_CAPTURED;
        status = dispatch_with(b, flight, args, slot, handle, blocks, hook);
    }
    if (status != EP_OK) {
        if (handle)
            epc_core.handle_release(handle);
        epc_cancel(flight);
        return told ? status : epc_reject(buffer, call, status);
    }
    b->ll->calls++;
    b->ll->slot[slot].result = ((epc_handle *)handle->device)->ll;
    b->ll->slot[slot].used = true;
    b->ll->slot[slot].summed = false;
    flight->handle = handle; /* holds it; the result does so too, and the handle ends with both */
    flight->delivers = true;
    fill_recv(b, slot, args->scales_by_column, handle, recv);
    return epc_launched(flight, event);
}

void epc_ll_recv_retire(void *memory)
{
    ep_handle *handle = memory;
    epc_ll_retire(((epc_handle *)handle->device)->ll);
}

void epc_ll_recv_release(void *memory)
{
    epc_ll_recv_retire(memory);
    epc_core.handle_release(memory);
}
