/* SPDX-License-Identifier: MIT */
/* Low latency on the device: results, and one launch a call or two. */
#include "ep/cuda/ll.h"

#include <stdlib.h>
#include <string.h>

/* ---------------------------------------------------------------- handles */

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
    device->fetched = true;
    own->ll = ll;
    own->core = core;
    own->ids = (int32_t *)own->block->memory;
    own->position = (int32_t *)(own->block->memory + bytes);
    own->core->ll = &own->core_shape;
    own->core->slot = slot;
    own->core->epoch = b->serial;
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

/* ---------------------------------------------------------------- launches */

static void describe_shape(epc_buffer *b, const epc_ll *ll, int slot, epc_flight *flight,
                           epc_ll_params *p)
{
    memset(p, 0, sizeof *p);
    epc_fill_comm(b, &p->comm);
    p->report = flight->report;
    p->serial = flight->serial;
    p->timeout_ns = b->buffer->group->timeout_ms * 1000000;
    p->slot = slot;
    p->hidden = (int32_t)ll->shape.hidden;
    p->topk = ll->shape.topk;
    p->num_experts = (int32_t)ll->shape.num_experts;
    p->num_local = ll->num_local;
    p->max_local = ll->max_local;
    p->max_tokens = (int32_t)ll->shape.max_tokens;
    p->words = ll->words;
    p->expert_rows = (int32_t)ll->shape.expert_rows;
    p->overflow_fails = epc_ll_overflow_fails(b, &ll->shape);
    p->head_bytes = (int32_t)epc_ll_head_bytes(ll->shape.hidden);
    p->quantise = ll->shape.wire == EP_E4M3;
    p->scale_kind = ll->shape.scale;
    p->scale_count = ll->scale_count;
    p->row_bytes = ll->row_bytes;
    p->area = ll->area;
    for (int r = 0; r < b->num_ranks; r++)
        p->area_of[r] = b->places[ll->place[r] * EPC_MAX_RANKS + (uint32_t)r] + ll->offset[r] +
                        slot * ll->area.bytes;
    p->expert_rank = ll->table->rank;
    p->expert_local = ll->table->local;
    p->expert_order = ll->table->order;
    p->first_expert = ll->table->first;
    p->count = ll->slot[slot].count;
    p->verify = b->buffer->config.verify;
    p->overlap = b->bulk;
    p->flip = epc_flip_now(b);
}

static ep_status start_kernel(int which, const epc_ll_params *p, int blocks, size_t shared,
                              void *stream)
{
    return epi_gpu_check(epc_ll_launch(which, p, blocks, shared, stream), "cudaLaunchKernel");
}

/* The receiving half of a call, on the stream of whoever asks for it. */
ep_status epc_run_second(epc_flight *flight, void *stream)
{
    epc_second *second = flight->second;
    epc_buffer *b = flight->owner;
    bool captured = flight->serial == 0;
    if (stream != flight->stream && !captured)
        EPI_TRY(epi_gpu_stream_wait_event(stream, flight->done));
    if (b->has_last && b->last_stream != stream && !captured)
        EPI_TRY(epi_gpu_stream_wait_event(stream, b->last_done));
    EPI_TRY(start_kernel(second->kernel, &second->params, second->blocks, second->shared, stream));
    free(second);
    flight->second = NULL;
    flight->stream = stream;
    if (captured)
        return EP_OK;
    EPI_TRY(epi_gpu_event_record(flight->done, stream));
    b->last_stream = stream;
    b->has_last = true;
    return epi_gpu_event_record(b->last_done, stream);
}

/* Where a dispatch keeps what it counts with: in shared memory, or where that has no room for it,
   on the device. */
typedef struct ll_room {
    size_t send, receive; /* shared memory of the halves */
} ll_room;

static ep_status place_tables(epc_buffer *b, epc_ll_params *p, int blocks, ll_room *room)
{
    size_t most = (size_t)b->gpu.max_shared - 12 * 1024, grid = (size_t)blocks;
    size_t bits = ((size_t)p->num_experts + grid - 1) / grid * (size_t)p->words * 4;
    size_t tables = epc_ll_tables_bytes(b->num_ranks, p->num_local, p->words);
    uint8_t *memory = NULL;
    p->many = bits > most || tables > most;
    *room = (ll_room){bits, tables};
    if (!p->many)
        return EP_OK;
    tables = epc_padded(epc_ll_tables_bytes(b->num_ranks, p->num_local, EPC_MARKS(p->words)));
    *room = (ll_room){bits > most ? 0 : bits, tables > most ? 0 : tables};
    size_t far_bits = epc_padded(bits > most ? grid * bits : 0);
    size_t far_tables = tables > most ? grid * tables : 0;
    if (far_bits + far_tables)
        EPI_TRY(epc_use_scratch(b, far_bits + far_tables, &memory));
    p->far_bits = far_bits ? (uint32_t *)memory : NULL;
    p->far_tables = far_tables ? (int32_t *)(memory + far_bits) : NULL;
    p->far_table_bytes = (int64_t)tables;
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

/* A kernel, its blocks and their shared memory. */
typedef struct launch {
    int kernel, blocks;
    size_t shared;
} launch;

/* The whole call at once, or its first half now and its second when a hook asks for it. */
static ep_status launch_call(epc_flight *flight, const epc_ll_params *p, launch whole, launch first,
                             launch second, bool hook)
{
    if (!hook)
        return start_kernel(whole.kernel, p, whole.blocks, whole.shared, flight->stream);
    epc_second *later = malloc(sizeof *later);
    if (!later)
        return epi_fail(EP_ERR_MEMORY, "%s: out of memory", flight->call);
    *later = (epc_second){
        .params = *p, .kernel = second.kernel, .blocks = second.blocks, .shared = second.shared};
    ep_status status = start_kernel(first.kernel, p, first.blocks, first.shared, flight->stream);
    if (status != EP_OK)
        free(later);
    else
        flight->second = later;
    return status;
}

/* ---------------------------------------------------------------- dispatch */

static ep_tensor device_tensor(const epc_buffer *b, void *data, ep_dtype dtype, int ndim,
                               int64_t n0, int64_t n1, int64_t n2)
{
    ep_tensor t = EP_TENSOR_NONE;
    t.data = data;
    t.dtype = dtype;
    t.ndim = ndim;
    t.shape[0] = n0;
    t.shape[1] = ndim > 1 ? n1 : 0;
    t.shape[2] = ndim > 2 ? n2 : 0;
    t.stride[ndim - 1] = 1;
    for (int i = ndim - 2; i >= 0; i--)
        t.stride[i] = t.stride[i + 1] * t.shape[i + 1];
    t.device = EP_DEVICE_CUDA;
    t.device_index = b->device;
    return t;
}

static void fill_recv(epc_buffer *b, int slot, bool by_column, ep_handle *handle, ep_ll_recv *out)
{
    const epc_ll *ll = b->ll;
    const epc_ll_slot *own = &ll->slot[slot];
    int64_t local = ll->num_local, room = ll->shape.expert_rows, columns = ll->scale_count;
    ep_ll_recv recv = EP_LL_RECV_INIT;
    recv.x = device_tensor(b, own->x, (ep_dtype)ll->shape.wire, 3, local, room, ll->shape.hidden);
    if (columns) {
        recv.scales =
            device_tensor(b, own->scales, ll->shape.scale == EP_SCALE_UE8M0 ? EP_UE8M0X4 : EP_F32,
                          3, local, room, columns);
        if (by_column) {
            recv.scales.stride[1] = 1;
            recv.scales.stride[2] = room;
        }
    }
    recv.count = device_tensor(b, own->count, EP_I32, 1, local, 0, 0);
    recv.dropped = device_tensor(b, own->dropped, EP_I32, 1, local, 0, 0);
    recv.source_token = device_tensor(b, own->source_token, EP_I32, 2, local, room, 0);
    recv.source_range = device_tensor(b, own->range, EP_I64, 2, local, b->num_ranks, 0);
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
    describe_shape(b, ll, slot, flight, &p);
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
    ll_room room;
    EPI_TRY(place_tables(b, &p, blocks, &room));
    room.receive = plan_movers(b, &p, room.receive);
    size_t most = room.send > room.receive ? room.send : room.receive;
    return launch_call(flight, &p, (launch){EPC_LL_DISPATCH, blocks, most},
                       (launch){EPC_LL_SEND, blocks, room.send},
                       (launch){EPC_LL_RECEIVE, blocks, room.receive}, hook);
}

static ep_status prepare_dispatch(epc_buffer *b, epc_flight *flight,
                                  const ep_ll_dispatch_args *args, int *blocks)
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
    if (shape.expert_rows * table->num_local > INT32_MAX)
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "%s: max_expert_rows is %lld for %d experts; on CUDA their product must be "
                        "below 2147483648",
                        flight->call, (long long)shape.expert_rows, table->num_local);
    return epc_ll_prepare_memory(b, &shape, table, flight->serial == 0);
}

ep_status epc_ll_dispatch_call(ep_buffer *buffer, const ep_ll_dispatch_args *args, ep_ll_recv *recv,
                               ep_event **event)
{
    epc_buffer *b = epc_of(buffer);
    const char *call = "ep_ll_dispatch";
    bool hook = event && args->completion == EP_COMPLETE_BY_HOOK;
    epc_flight *flight;
    ep_handle *handle = NULL;
    int blocks = 0, slot = 0;
    ep_status status = epc_begin(b, call, args->stream, args->previous, &flight);
    if (status != EP_OK)
        return epc_reject(buffer, call, status);
    status = prepare_dispatch(b, flight, args, &blocks);
    if (status == EP_OK) {
        slot = (int)(b->ll->calls & 1);
        if (b->ll->slot[slot].result)
            status = epi_fail(
                EP_ERR_STATE,
                "%s: two results are alive; release the older with ep_ll_recv_release first", call);
    }
    if (status == EP_OK)
        status = new_ll_handle(b, args, slot, &handle);
    if (status == EP_OK)
        status = dispatch_with(b, flight, args, slot, handle, blocks, hook);
    if (status != EP_OK) {
        if (handle)
            epc_core.handle_release(handle);
        epc_cancel(flight);
        return epc_reject(buffer, call, status);
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

/* ---------------------------------------------------------------- refusals */

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
    describe_shape(b, b->ll, slot, flight, &p);
    p.refused = why;
    int kernel = combine ? EPC_LL_COMBINE_BOTH : EPC_LL_DISPATCH;
    ll_room room = {0, 0};
    if (!combine)
        EPI_TRY(place_tables(b, &p, 1, &room));
    return start_kernel(kernel, &p, 1, room.receive, flight->stream);
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

/* ---------------------------------------------------------------- combine */

static ep_tensor send_buffer(const epc_buffer *b, const struct epc_ll_handle *own)
{
    const epc_ll *ll = own->ll;
    uint8_t *area = ll->areas->memory + own->core->slot * ll->area.bytes;
    return device_tensor(b, area + ll->area.y, EP_BF16, 3, ll->num_local, ll->shape.expert_rows,
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
    describe_shape(b, own->ll, own->core->slot, flight, &p);
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
    return launch_call(flight, &p, (launch){EPC_LL_COMBINE_BOTH, blocks, shared},
                       (launch){EPC_LL_OUTPUTS, p.y ? blocks : 1, 0},
                       (launch){EPC_LL_COMBINE, blocks, shared}, hook);
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
    if (status == EP_OK)
        status = combine_with(b, flight, own, args, blocks, hook);
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
