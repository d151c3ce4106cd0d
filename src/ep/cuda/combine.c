/* SPDX-License-Identifier: MIT */
/* Combine on the device, and the backward of dispatch, which is one. */
#include "ep/cuda/internal.h"

#include <stdlib.h>
#include <string.h>

/* Pieces of rows that the ring's threads can add up, 16 bytes each. */
size_t epc_plan_ring(const epc_buffer *b, int hidden, ep_dtype dtype, size_t taken, int32_t *bulk,
                     int32_t *pieces, int32_t *piece_bytes, int32_t *slots)
{
    int64_t row = hidden * (int64_t)ep_dtype_size(dtype), most = 16 * (EPC_THREADS - 32);
    *bulk = b->bulk && row % 16 == 0;
    if (!*bulk)
        return 0;
    int64_t parts = (row + most - 1) / most, piece = ((row + parts - 1) / parts + 127) / 128 * 128;
    int64_t room = ((int64_t)b->gpu.max_shared - 12 * 1024 - (int64_t)taken) / piece;
    *pieces = (int32_t)((row + piece - 1) / piece);
    *piece_bytes = (int32_t)piece;
    *slots = (int32_t)(room < 64 ? room : 64);
    return (size_t)*slots * (size_t)piece;
}

/* Each warp's ring takes an equal share of shared memory. */
static size_t plan_streams(const epc_buffer *b, epc_combine_params *p)
{
    int64_t row = p->hidden * (int64_t)ep_dtype_size((ep_dtype)p->dtype);
    size_t room = (size_t)b->gpu.max_shared - 12 * 1024, warps = EPC_STREAM_WARPS;
    p->piece_bytes = EPC_STREAM_PIECE;
    p->pieces = (int32_t)((row + EPC_STREAM_PIECE - 1) / EPC_STREAM_PIECE);
    p->slots = (int32_t)(room / warps / EPC_STREAM_SLOT);
    return warps * (size_t)p->slots * EPC_STREAM_SLOT;
}

/*
 * How rows are brought. Over links a ring of each warp takes 304 us where one of the block takes
 * 452 (two H100, 16 SMs). Where ranks share memory it is the other way about: 945 and 762 us (eight
 * ranks on an H200).
 */
static size_t plan_rows(const epc_buffer *b, epc_combine_params *p)
{
    size_t shared = epc_plan_ring(b, p->hidden, (ep_dtype)p->dtype, 0, &p->bulk, &p->pieces,
                                  &p->piece_bytes, &p->slots);
    p->streams = p->bulk && epc_over_links(b);
    return p->streams ? plan_streams(b, p) : shared;
}

static void describe(const epc_combine_call_args *args, epc_combine_params *p)
{
    const ep_handle *handle = args->handle;
    const epc_handle *device = handle->device;
    p->dtype = (int32_t)args->y.dtype;
    p->hidden = (int32_t)args->y.shape[1];
    p->num_tokens = (int32_t)handle->num_tokens;
    p->topk = p->width = handle->topk;
    p->entries = device->entries;
    p->by_expert = handle->layout == EP_ROWS_BY_EXPERT;
    if (args->weighted) {
        p->weights = epc_given(&args->topk_weights) ? args->topk_weights.data : device->weights;
        p->weight_stride =
            epc_given(&args->topk_weights) ? args->topk_weights.stride[0] : handle->topk;
    }
    size_t element = ep_dtype_size(args->y.dtype);
    for (int i = 0; i < 2; i++) {
        p->bias[i] = args->bias[i].data;
        p->bias_stride[i] = args->bias[i].stride[0] * (int64_t)element;
    }
    p->out = args->out.data;
    p->out_stride = args->out.stride[0] * (int64_t)element;
    if (epc_given(&args->out_weights)) {
        p->out_weights = args->out_weights.data;
        p->out_weight_stride = args->out_weights.stride[0];
    }
    if (epc_given(&args->dot)) {
        p->dot = args->dot.data;
        p->dot_stride = args->dot.stride[0] * (int64_t)element;
    }
}

static void agree(const epc_buffer *b, const epc_combine_call_args *args, epc_combine_params *p)
{
    const ep_handle *handle = args->handle;
    uint32_t *f = p->field;
    f[EPC_F_OP] = EPC_OP_COMBINE;
    f[EPC_F_HIDDEN] = (uint32_t)p->hidden;
    f[EPC_F_DTYPE] = (uint32_t)p->dtype;
    f[EPC_F_TOPK] = (uint32_t)handle->topk;
    f[EPC_F_EXPERTS] = (uint32_t)handle->num_experts;
    f[EPC_F_LAYOUT] = (uint32_t)p->by_expert;
    f[EPC_F_WEIGHTS] = epc_given(&args->row_weights);
    f[EPC_F_HANDLE] = ((const epc_handle *)handle->device)->call;
    f[EPC_F_MASK] = epc_mask_word(b);
}

/* Verify mode: checksums of the rows of y, where peers find them. */
static ep_status seal(const epc_buffer *b, epc_flight *flight, const epc_combine_call_args *args,
                      const epc_exposed *y, const epc_exposed *sums, int blocks,
                      epc_combine_params *p)
{
    epc_seal_params seal = {.y = y->memory,
                            .stride = (int64_t)y->stride,
                            .rows = args->y.shape[0],
                            .row_bytes = args->y.shape[1] * (int64_t)ep_dtype_size(args->y.dtype),
                            .sums = (uint64_t *)sums->memory,
                            .flip = epc_flip_now(b)};
    p->verify = 1;
    p->sums_place = sums->place;
    p->sums_offset = sums->offset;
    return epi_gpu_check(epc_seal_rows_launch(&seal, blocks, flight->stream), "cudaLaunchKernel");
}

static ep_status expose(epc_buffer *b, epc_flight *flight, const epc_combine_call_args *args,
                        int blocks, epc_combine_params *p)
{
    const ep_tensor *tensors[2] = {&args->y, &args->row_weights};
    epc_exposed exposed[2] = {{0}}, sums = {0};
    bool verify = b->buffer->config.verify;
    EPI_TRY(epc_expose(flight, args->handle->device, tensors, epc_given(&args->row_weights) ? 2 : 1,
                       verify ? (size_t)args->y.shape[0] * sizeof(uint64_t) : 0, exposed, &sums));
    if (exposed[0].stride > UINT32_MAX)
        return epi_fail(EP_ERR_UNSUPPORTED,
                        "%s: y.stride[0] is %zu bytes; on CUDA it must be at most 4294967295",
                        args->call, exposed[0].stride);
    p->place = exposed[0].place;
    p->offset = exposed[0].offset;
    p->stride = (uint32_t)exposed[0].stride;
    p->place2 = exposed[1].place;
    p->offset2 = exposed[1].offset;
    p->stride2 = (uint32_t)(exposed[1].stride / sizeof(float));
    return verify ? seal(b, flight, args, &exposed[0], &sums, blocks, p) : EP_OK;
}

static ep_status launch(epc_buffer *b, epc_flight *flight, const epc_combine_call_args *args)
{
    epc_combine_params p;
    int blocks;
    memset(&p, 0, sizeof p);
    EPI_TRY(epc_choose_blocks(b, args->call, args->num_sms, &blocks));
    describe(args, &p);
    agree(b, args, &p);
    size_t shared = plan_rows(b, &p);
    EPI_TRY(expose(b, flight, args, blocks, &p));
    epc_fill_comm(b, &p.comm);
    p.serial = flight->serial;
    p.report = flight->report;
    p.timeout_ns = b->buffer->group->timeout_ms * 1000000;
    return epi_gpu_check(epc_combine_launch(&p, blocks, shared, flight->stream),
                         "cudaLaunchKernel");
}

ep_status epc_combine_run(ep_buffer *buffer, const epc_combine_call_args *args, ep_event **event)
{
    epc_buffer *b = epc_of(buffer);
    epc_flight *flight;
    ep_status status = epc_begin(b, args->call, args->stream, args->previous, &flight);
    if (status != EP_OK)
        return epc_reject(buffer, args->call, status);
    status = launch(b, flight, args);
    if (status != EP_OK) {
        epc_cancel(flight);
        return epc_reject(buffer, args->call, status);
    }
    flight->normal = true;
    flight->first_half = args->first_half;
    flight->handle = args->handle;
    atomic_fetch_add(&flight->handle->holders, 1);
    return epc_launched(flight, event);
}

ep_status epc_combine_call(ep_buffer *buffer, const ep_combine_args *args, ep_event **event)
{
    bool by_expert = args->handle->layout == EP_ROWS_BY_EXPERT;
    epc_combine_call_args run = {.call = "ep_combine",
                                 .y = args->y,
                                 .bias = {args->bias[0], args->bias[1]},
                                 .out = args->out,
                                 .out_weights = args->out_weights,
                                 .weighted = by_expert,
                                 .handle = args->handle,
                                 .previous = args->previous,
                                 .stream = args->stream,
                                 .num_sms = args->num_sms};
    if (by_expert)
        run.topk_weights = args->topk_weights;
    else
        run.row_weights = args->topk_weights;
    return epc_combine_run(buffer, &run, event);
}

ep_status epc_dispatch_backward_call(ep_buffer *buffer, const ep_dispatch_backward_args *args,
                                     ep_event **event)
{
    epc_combine_call_args run = {.call = "ep_dispatch_backward",
                                 .y = args->grad_recv_x,
                                 .out = args->grad_x,
                                 .row_weights = args->grad_recv_weights,
                                 .out_weights = args->grad_topk_weights,
                                 .handle = args->handle,
                                 .previous = args->previous,
                                 .stream = args->stream,
                                 .num_sms = args->num_sms};
    return epc_combine_run(buffer, &run, event);
}
