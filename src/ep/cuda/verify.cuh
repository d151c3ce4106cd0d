/* SPDX-License-Identifier: MIT */
/*
 * Verify mode of the normal mode. A sender seals each row: checksum, source and
 * token beside it, made of what it meant to send and not of what it wrote. The
 * receiver looks through its rows in a kernel behind the dispatch's (verify.cu).
 */
#ifndef EPI_EP_CUDA_VERIFY_CUH
#define EPI_EP_CUDA_VERIFY_CUH

#include "ep/cuda/checksum.cuh"
#include "ep/cuda/rows.cuh"

/* Sum of token t's row as it lies on the wire, times `weight` if rows are. `scratch` is the warp's:
   a row, and its scales behind. */
static __device__ uint64_t epc_sum_token(const epc_dispatch_params *p, int t, float weight,
                                         uint8_t *scratch)
{
    const uint8_t *row = p->x + t * p->x_stride;
    const uint32_t *scales = (const uint32_t *)p->scales + t * p->scale_row;
    int64_t step = p->scale_column;
    __syncwarp(); /* the scratch has been read */
    if (p->quantise) {
        uint32_t *made = (uint32_t *)(scratch + (p->shape.row_bytes + 15) / 16 * 16);
        for (int first = 0; first < p->hidden; first += EPC_QUANT_CHANNELS) {
            epc_codes codes = epc_quantise(row, p->dtype, first, p->hidden, p->scale_kind);
            epc_put_codes(&codes, scratch, first, p->hidden);
            epc_put_scales(&codes, made, first, p->hidden, p->scale_kind);
        }
        row = scratch;
        scales = made;
        step = 1;
    } else if (p->weighted) {
        for (int h = epc_lane(); h < p->hidden; h += EPC_WARP)
            epc_store_element(scratch, p->dtype, h, weight * epc_load_element(row, p->dtype, h));
        row = scratch;
    }
    __syncwarp();
    return epc_sum_row(row, p->shape.row_bytes, scales, step, p->scale_count, t);
}

/* Seals of this rank's rows, a token a warp. */
static __device__ __noinline__ void epc_send_seals(const epc_dispatch_params *p,
                                                   const epc_tables *tables)
{
    int warp = epc_warp() * (int)gridDim.x + (int)blockIdx.x;
    int warps = (int)(blockDim.x / EPC_WARP * gridDim.x);
    uint8_t *scratch = p->seal_scratch + (int64_t)warp * p->seal_bytes;
    for (int t = warp; t < p->num_tokens; t += warps)
        for (int first = 0; first < p->width; first += EPC_WARP) {
            epc_fan fan = epc_fan_of(p, tables, t, first);
            uint64_t sum = fan.any && !p->weighted ? epc_sum_token(p, t, 1, scratch) : 0;
            float mine = fan.rank >= 0 && p->row_weight
                             ? p->row_weight[t * p->row_weight_stride + first + epc_lane()]
                             : 1;
            for (unsigned left = fan.any; left; left &= left - 1) {
                int lane = __ffs((int)left) - 1;
                if (p->weighted)
                    sum = epc_sum_token(p, t, __shfl_sync(EPC_ALL, mine, lane), scratch);
                if (epc_lane() == lane) {
                    epc_seal seal = {sum, p->comm.rank, t};
                    tables->targets[fan.rank].seals[fan.row] = seal;
                }
            }
        }
}

#endif
