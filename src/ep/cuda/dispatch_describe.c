/* SPDX-License-Identifier: MIT */
/* What a dispatch's kernel is told of its arguments, and what ranks must agree on. */
#include "ep/cuda/internal.h"

static void describe_x(epc_dispatch *d, const ep_tensor *x, const ep_tensor *scales)
{
    epc_dispatch_params *p = &d->params;
    size_t element = d->wire_dtype == EP_E4M3 && x->dtype == EP_E4M3 ? 1
                     : x->dtype == EP_F32                            ? 4
                                                                     : 2;
    bool quantise = d->wire_dtype == EP_E4M3 && x->dtype != EP_E4M3;
    int per = d->scale == EP_SCALE_UE8M0 ? 512 : 128;
    p->x = x->data;
    p->x_stride = x->stride[0] * (int64_t)element;
    p->num_tokens = (int32_t)x->shape[0];
    p->hidden = (int32_t)x->shape[1];
    p->dtype = (int32_t)x->dtype;
    p->quantise = quantise;
    p->scale_kind = (int32_t)d->scale;
    p->shape.row_bytes = d->wire_dtype == EP_E4M3 ? p->hidden : p->hidden * (int64_t)element;
    p->scale_count = d->wire_dtype == EP_E4M3 ? (p->hidden + per - 1) / per : 0;
    p->shape.scale_bytes = 4 * p->scale_count;
    p->verify = d->flight->owner->buffer->config.verify;
    p->shape.checksum_bytes = p->verify ? sizeof(epc_seal) : 0;
    if (epc_given(scales)) {
        p->scales = scales->data;
        p->scale_row = scales->stride[0];
        p->scale_column = scales->stride[1];
    }
    uint64_t bits = (uint64_t)(uintptr_t)p->x | (uint64_t)p->x_stride |
                    (uint64_t)(p->hidden * (int64_t)element) | (uint64_t)p->shape.row_bytes;
    p->bulk = d->flight->owner->bulk && bits % 16 == 0 && !d->weighted && p->hidden > 0;
    p->load_bytes = p->hidden * (int64_t)element;
}

static void describe_routing(epc_dispatch *d, const ep_dispatch_args *args, const epc_table *table)
{
    epc_dispatch_params *p = &d->params;
    const ep_handle *handle = d->handle;
    p->by_expert = handle->layout == EP_ROWS_BY_EXPERT;
    p->topk = p->width = handle->topk;
    p->num_experts = (int32_t)handle->num_experts;
    p->num_local = handle->num_local;
    p->alignment = handle->alignment;
    p->worst = args->num_worst_tokens;
    if (d->cached)
        return;
    if (!p->worst && d->flight->owner->num_shared < EPC_MAX_SEGMENTS)
        p->spare = d->spare = epc_spare_row(handle->hidden, p->dtype, handle->topk);
    p->expert_rank = table->rank;
    p->expert_local = table->local;
    p->expert_order = table->order;
    p->ids = args->topk_idx.data;
    p->id_stride = args->topk_idx.stride[0];
    p->id_bytes = args->topk_idx.dtype == EP_I64 ? 8 : 4;
    p->shape.id_bytes = p->id_bytes * (p->by_expert ? 1 : p->topk);
    if (epc_given(&args->topk_weights)) {
        p->weights = args->topk_weights.data;
        p->weight_stride = args->topk_weights.stride[0];
        p->shape.weight_bytes = 4 * (p->by_expert ? 1 : p->topk);
    }
}

static void describe_agreement(epc_dispatch *d)
{
    epc_dispatch_params *p = &d->params;
    const epc_handle *handle = d->handle->device;
    uint32_t *f = p->field;
    f[EPC_F_OP] = d->cached ? EPC_OP_CACHED : EPC_OP_DISPATCH;
    f[EPC_F_HIDDEN] = (uint32_t)p->hidden;
    f[EPC_F_DTYPE] = d->wire_dtype == EP_E4M3 ? EP_E4M3 : (uint32_t)p->dtype;
    f[EPC_F_WIRE] = (uint32_t)d->wire_dtype;
    f[EPC_F_SCALE] = d->wire_dtype == EP_E4M3 ? (uint32_t)d->scale : 0;
    f[EPC_F_TOPK] = (uint32_t)p->topk;
    f[EPC_F_EXPERTS] = (uint32_t)p->num_experts;
    f[EPC_F_TABLE] = handle->table;
    f[EPC_F_LAYOUT] = (uint32_t)p->by_expert;
    f[EPC_F_ALIGNMENT] = (uint32_t)p->alignment;
    f[EPC_F_ID_BYTES] = d->cached ? 0 : (uint32_t)p->id_bytes;
    f[EPC_F_WEIGHTS] = p->weights != NULL;
    f[EPC_F_HANDLE] = d->cached ? handle->call : 0;
    f[EPC_F_MASK] = epc_mask_word(d->flight->owner);
}

static void point_at_handle(epc_dispatch *d)
{
    epc_dispatch_params *p = &d->params;
    const epc_handle *device = d->handle->device;
    p->entries = device->entries;
    p->rows_at = device->rows_at;
    p->matrix = device->matrix;
    p->source_offset = device->source_offset;
    p->expert_offset = device->expert_offset;
    p->expert_tokens = device->expert_tokens;
    p->expert_filled = device->expert_filled;
}

void epc_describe_dispatch(epc_dispatch *d, const ep_dispatch_args *args, const epc_table *table)
{
    describe_x(d, &args->x, &args->scales);
    describe_routing(d, args, table);
    point_at_handle(d);
    describe_agreement(d);
    d->params.cached = d->cached;
}
