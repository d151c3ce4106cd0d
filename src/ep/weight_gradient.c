/* SPDX-License-Identifier: MIT */
/* Backward of combine by expert: the gradient of each weight is a dot product with the row it
 * weighed. */
#include "ep/dispatch.h"

#include "base/error.h"
#include "codec/rows.h"

#include <stdlib.h>

static ep_status row_of(const epi_dispatch *d, int64_t link, uint8_t *scratch, const void **row)
{
    int source = d->handle->send_rank[link];
    int32_t at = d->handle->send_row[link];
    if (!epi_reader_must_fetch(&d->op, source)) {
        *row = epi_reader_row(&d->op, &d->exposed, source, at);
        return EP_OK;
    }
    epi_remote_read read;
    *row = scratch;
    return epi_reader_fetch(&d->op, source, &at, 1, &scratch, d->shape.row, &read);
}

ep_status epi_dispatch_weight_gradient(epi_dispatch *d)
{
    const ep_handle *handle = d->handle;
    const ep_tensor *grad = &d->x, *out = &d->grad_topk_weights;
    const struct epi_codec *codec = epi_codec();
    for (int64_t t = 0; t < handle->num_tokens; t++) {
        const uint8_t *grad_row = (const uint8_t *)grad->data +
                                  (size_t)(t * grad->stride[0]) * ep_dtype_size(grad->dtype);
        float *weights = (float *)out->data + t * out->stride[0];
        for (int k = 0; k < handle->topk; k++) {
            int64_t link = t * handle->topk + k;
            const void *row;
            weights[k] = 0;
            if (handle->send_rank[link] < 0)
                continue;
            EPI_TRY(row_of(d, link, d->scratch, &row));
            weights[k] = codec->dot(grad->dtype, grad_row, row, (size_t)grad->shape[1]);
        }
    }
    return EP_OK;
}
