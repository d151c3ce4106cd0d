/* SPDX-License-Identifier: MIT */
/* Verify mode of low latency: checksums of tokens and of expert outputs beside them in the area of
   their rank; whoever reads a row compares. */
#ifndef EPI_EP_CUDA_LL_VERIFY_CUH
#define EPI_EP_CUDA_LL_VERIFY_CUH

#include "ep/cuda/checksum.cuh"
#include "ep/cuda/ll_call.cuh"
#include "ep/cuda/combine.cuh"

static __device__ void epc_ll_flip(const epc_ll_params *p, uint8_t *row, int64_t bytes, int64_t i)
{
    if (i == p->flip - 1 && epc_lane() == 0)
        row[bytes / 2] ^= 4;
}

/* Of all tokens in this rank's area; by one block, before they are announced. */
static __device__ __noinline__ void epc_ll_seal_tokens(const epc_ll_params *p)
{
    uint8_t *area = epc_area_at(p, p->comm.rank);
    for (int t = epc_warp(); t < p->num_tokens; t += (int)blockDim.x / EPC_WARP) {
        uint8_t *row = area + p->area.rows + t * p->row_bytes;
        const uint32_t *scales =
            (const uint32_t *)(area + p->area.scales) + (int64_t)t * p->scale_count;
        uint64_t sum = epc_sum_row(row, p->row_bytes, scales, 1, p->scale_count, t);
        if (epc_lane() == 0)
            ((uint64_t *)(area + p->area.sums))[t] = sum;
        epc_ll_flip(p, row, p->row_bytes, t);
    }
    __threadfence_system();
    __syncthreads();
}

/* A row of the result, which the calling warp has written. */
static __device__ void epc_ll_check_row(const epc_ll_params *p, int source, int token, int local,
                                        int64_t row)
{
    const uint64_t *sums = (const uint64_t *)(epc_area_at(p, source) + p->area.sums);
    int64_t first = p->scales_by_column ? (int64_t)local * p->scale_count * p->expert_rows + row -
                                              (int64_t)local * p->expert_rows
                                        : row * p->scale_count;
    __syncwarp();
    uint64_t sum = epc_sum_row(p->recv_x + row * p->row_bytes, p->row_bytes, p->recv_scales + first,
                               p->scales_by_column ? p->expert_rows : 1, p->scale_count, token);
    if (epc_lane() == 0 && sum != epc_word64(epc_load8(&sums[token])))
        epc_fail_call(p->comm.state, EPC_FAIL_CORRUPT, (uint32_t)row, (uint32_t)source,
                      EPC_CORRUPT_TOKEN, (uint32_t)token, 0);
}

/* ---------------------------------------------------------------- outputs */

/* Of an output at `row` of a rank's y; encoded ones have their heads beside them. */
static __device__ uint64_t epc_ll_sum_output(const epc_ll_params *p, int rank, const uint8_t *y,
                                             int64_t row)
{
    return epc_sum_row(y, (int64_t)p->hidden * 2, epc_heads_at(p, rank, row), 1,
                       p->encode ? p->head_bytes / 4 : 0, (int32_t)row);
}

static __device__ __forceinline__ uint64_t *epc_y_sums_at(const epc_ll_params *p, int rank)
{
    return (uint64_t *)(epc_area_at(p, rank) + p->area.y_sums);
}

/* Of all outputs of this rank, where they are read; by one block, before they are announced. */
static __device__ __noinline__ void epc_ll_seal_outputs(const epc_ll_params *p)
{
    int me = p->comm.rank, item = epc_warp(), before = 0;
    const uint32_t *f = p->field;
    uint8_t *y = epc_memory_at(&p->comm, me, f[EPC_Y_PLACE],
                               epc_join(f[EPC_Y_OFFSET_LO], f[EPC_Y_OFFSET_HI]));
    for (int l = 0; l < p->num_local; before += p->count[l], l++)
        for (; item < before + p->count[l]; item += (int)blockDim.x / EPC_WARP) {
            int64_t row = (int64_t)l * p->expert_rows + item - before;
            uint8_t *at = y + row * f[EPC_Y_STRIDE];
            uint64_t sum = epc_ll_sum_output(p, me, at, row);
            if (epc_lane() == 0)
                epc_y_sums_at(p, me)[row] = sum;
            epc_ll_flip(p, at, (int64_t)p->hidden * 2, row);
        }
    __threadfence_system();
    __syncthreads();
}

/* Outputs that this block's tokens are made of, as this rank reads them. */
static __device__ __noinline__ void epc_ll_check_outputs(const epc_ll_params *p,
                                                         epc_combine_rows rows)
{
    for (int i = epc_warp();; i += (int)blockDim.x / EPC_WARP) {
        int t = i / p->topk * (int)gridDim.x + (int)blockIdx.x;
        if (t >= p->num_tokens)
            break;
        epc_entry entry = epc_entries_of(&rows, t)[i % p->topk];
        if (entry < 0)
            continue;
        int rank = (int)(entry >> 32);
        int64_t row = (uint32_t)entry;
        uint64_t sum = epc_ll_sum_output(p, rank, epc_row_at(rows.from, entry), row);
        if (epc_lane() == 0 && sum != epc_word64(epc_load8(&epc_y_sums_at(p, rank)[row])))
            epc_fail_call(p->comm.state, EPC_FAIL_CORRUPT, (uint32_t)row, (uint32_t)rank,
                          EPC_CORRUPT_OUTPUTS, (uint32_t)t, 0);
    }
}

#endif
