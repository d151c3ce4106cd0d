/* SPDX-License-Identifier: MIT */
/* Verify mode of combine: rows as this rank reads them against their owners' checksums, and every
   sum a second time, element by element. */
#ifndef EPI_EP_CUDA_COMBINE_VERIFY_CUH
#define EPI_EP_CUDA_COMBINE_VERIFY_CUH

#include "ep/cuda/checksum.cuh"
#include "ep/cuda/combine.cuh"

/* A warp takes a row. */
static __device__ void epc_check_sources(const epc_combine_params *p, const epc_header *headers,
                                         const epc_combine_sources *from, int warp, int warps)
{
    int64_t bytes = (int64_t)p->hidden * (p->dtype == EPC_F32 ? 4 : 2);
    int64_t items = (int64_t)p->num_tokens * p->width;
    for (int64_t item = warp; item < items; item += warps) {
        epc_entry entry = p->entries[item];
        if (entry < 0)
            continue;
        int rank = (int)(entry >> 32);
        const uint32_t *header = headers[rank];
        const uint64_t *sums = (const uint64_t *)epc_memory_at(
            &p->comm, rank, header[EPC_F_SUMS], (int64_t)header[EPC_F_SUMS_AT] * EPC_ALIGN);
        uint64_t sum = epc_sum_bytes(epc_row_at(from, entry), bytes);
        if (epc_lane() == 0 && sum != epc_word64(epc_load8(&sums[(uint32_t)entry])))
            epc_fail_call(p->comm.state, EPC_FAIL_CORRUPT, (uint32_t)entry, (uint32_t)rank,
                          EPC_CORRUPT_OUTPUTS, (uint32_t)(item / p->width), 0);
    }
}

/* One element of a token's sum, by the definition. */
static __device__ float epc_reference_sum(const epc_combine_rows *rows, int dtype, int t, int h)
{
    const epc_entry *entries = rows->entries + (int64_t)t * rows->width;
    bool any = false;
    for (int j = 0; j < rows->width; j++)
        any |= entries[j] >= 0;
    float sum = epc_first_sum(rows, any);
    for (int j = 0; j < rows->width; j++) {
        float weight = rows->weights ? rows->weights[t * rows->weight_stride + j] : 1;
        if (entries[j] >= 0)
            sum = fmaf(weight, epc_load_element(epc_row_at(rows->from, entries[j]), dtype, h), sum);
    }
    for (int b = 0; b < 2; b++)
        if (rows->bias[b])
            sum += epc_load_element(rows->bias[b] + t * rows->bias_stride[b], dtype, h);
    return sum;
}

static __device__ void epc_check_sums(const epc_combine_params *p, const epc_combine_sources *from,
                                      int warp, int warps)
{
    epc_combine_rows rows = epc_rows_of(p, from);
    for (int t = warp; t < p->num_tokens; t += warps) {
        const uint8_t *out = p->out + t * p->out_stride;
        bool same = true;
        for (int h = epc_lane(); h < p->hidden; h += EPC_WARP) {
            uint32_t want = 0, have;
            epc_store_element((uint8_t *)&want, p->dtype, 0,
                              epc_reference_sum(&rows, p->dtype, t, h));
            have = p->dtype == EPC_F32 ? __ldcg((const uint32_t *)out + h)
                                       : __ldcg((const uint16_t *)out + h);
            same &= want == have;
        }
        if (!__all_sync(EPC_ALL, same) && epc_lane() == 0)
            epc_fail_call(p->comm.state, EPC_FAIL_CORRUPT, 0, (uint32_t)p->comm.rank,
                          EPC_CORRUPT_SUM, (uint32_t)t, 0);
    }
}

/* By all blocks, also those whose headers did not come: a token's sum may be another block's. */
static __device__ __noinline__ void epc_verify_combine(const epc_combine_params *p,
                                                       const epc_call *call,
                                                       const epc_header *headers,
                                                       const epc_combine_sources *from, bool begun)
{
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x);
    int warp = epc_warp() * (int)gridDim.x + (int)blockIdx.x;
    if (begun)
        epc_check_sources(p, headers, from, warp, warps);
    epc_grid_barrier(call);
    if (begun && !p->dot && epc_load_gpu(&call->state->fail) == EPC_OK)
        epc_check_sums(p, from, warp, warps);
}

#endif
