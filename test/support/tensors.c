/* SPDX-License-Identifier: MIT */
#include "support/tensors.h"

#include "support/formats.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POISON 0xa5

void *test_zeros(int64_t n, size_t size)
{
    void *memory = calloc((size_t)n + 1, size);
    if (!memory) {
        fprintf(stderr, "the test is out of memory\n");
        abort();
    }
    return memory;
}

static char *at(const ep_tensor *tensor, int64_t row, int64_t column)
{
    int64_t index = row * tensor->stride[0] + (tensor->ndim > 1 ? column * tensor->stride[1] : 0);
    return (char *)tensor->data + index * (int64_t)ep_dtype_size(tensor->dtype);
}

static void fill(ep_tensor *tensor, const void *dense)
{
    size_t size = ep_dtype_size(tensor->dtype), row = size * (size_t)tensor->shape[1];
    for (int64_t i = 0; dense && i < tensor->shape[0]; i++) {
        const char *from = (const char *)dense + (size_t)i * row;
        if (tensor->stride[1] == 1) {
            memcpy(at(tensor, i, 0), from, row);
            continue;
        }
        for (int64_t j = 0; j < tensor->shape[1]; j++)
            memcpy(at(tensor, i, j), from + (size_t)j * size, size);
    }
}

static ep_tensor poisoned(ep_dtype dtype, int64_t rows, int64_t columns, int64_t elements)
{
    size_t bytes = (size_t)elements * ep_dtype_size(dtype);
    ep_tensor tensor = ep_tensor_2d(test_zeros((int64_t)bytes, 1), dtype, rows, columns);
    memset(tensor.data, POISON, bytes);
    return tensor;
}

ep_tensor tensor_new(ep_dtype dtype, int64_t rows, int64_t columns, int64_t gap, const void *dense)
{
    ep_tensor tensor = poisoned(dtype, rows, columns, rows * (columns + gap));
    tensor.stride[0] = columns + gap;
    fill(&tensor, dense);
    return tensor;
}

ep_tensor tensor_new_transposed(ep_dtype dtype, int64_t rows, int64_t columns, const void *dense)
{
    ep_tensor tensor = poisoned(dtype, rows, columns, rows * columns);
    tensor.stride[0] = 1;
    tensor.stride[1] = rows;
    fill(&tensor, dense);
    return tensor;
}

static void *narrow(ep_dtype dtype, const int64_t *ids, int64_t n)
{
    int32_t *words = test_zeros(n, sizeof(int64_t));
    if (dtype == EP_I64)
        memcpy(words, ids, (size_t)n * sizeof *ids);
    for (int64_t i = 0; dtype == EP_I32 && i < n; i++)
        words[i] = (int32_t)ids[i];
    return words;
}

ep_tensor tensor_new_ids(ep_dtype dtype, int64_t rows, int64_t columns, int64_t gap,
                         const int64_t *ids)
{
    void *dense = narrow(dtype, ids, rows * columns);
    ep_tensor tensor = tensor_new(dtype, rows, columns, gap, dense);
    free(dense);
    return tensor;
}

void tensor_free(ep_tensor *tensor)
{
    free(tensor->data);
    *tensor = (ep_tensor)EP_TENSOR_NONE;
}

static int all_poison(const void *memory, size_t bytes)
{
    const uint8_t *byte = memory;
    for (size_t i = 0; i < bytes; i++)
        if (byte[i] != POISON)
            return 0;
    return 1;
}

int tensor_gaps_intact(const ep_tensor *tensor)
{
    size_t size = ep_dtype_size(tensor->dtype);
    size_t gap = (size_t)(tensor->stride[0] - tensor->shape[1]) * size;
    for (int64_t i = 0; i < tensor->shape[0]; i++)
        if (!all_poison(at(tensor, i, 0) + (size_t)tensor->shape[1] * size, gap))
            return 0;
    return 1;
}

int tensor_untouched(const ep_tensor *tensor)
{
    return all_poison(tensor->data, (size_t)(tensor->shape[0] * tensor->stride[0]) *
                                        ep_dtype_size(tensor->dtype));
}

static int shape_differs(const char *name, const ep_tensor *got, ep_dtype dtype, int64_t rows,
                         int64_t columns)
{
    int ndim = columns < 0 ? 1 : 2;
    if (got->dtype == dtype && got->ndim == ndim && got->shape[0] == rows &&
        (ndim == 1 || got->shape[1] == columns))
        return 0;
    fprintf(stderr, "%s: is %s, %d dims [%lld, %lld]; expected %s, %d dims [%lld, %lld]\n", name,
            ep_dtype_string(got->dtype), got->ndim, (long long)got->shape[0],
            (long long)got->shape[1], ep_dtype_string(dtype), ndim, (long long)rows,
            (long long)columns);
    return 1;
}

static uint64_t code(ep_dtype dtype, const void *element)
{
    uint64_t value = 0;
    memcpy(&value, element, ep_dtype_size(dtype));
    return value;
}

int tensor_differs(const char *name, const ep_tensor *got, ep_dtype dtype, int64_t rows,
                   int64_t columns, const void *want, const struct ref_row *row)
{
    if (shape_differs(name, got, dtype, rows, columns))
        return 1;
    size_t size = ep_dtype_size(dtype);
    int64_t width = columns < 0 ? 1 : columns;
    for (int64_t i = 0; i < rows; i++) {
        const char *expected = (const char *)want + (size_t)(i * width) * size;
        if (row && row[i].source < 0)
            continue;
        if (width > 1 && got->stride[1] == 1 &&
            memcmp(at(got, i, 0), expected, (size_t)width * size) == 0)
            continue;
        for (int64_t j = 0; j < width; j++) {
            const char *a = at(got, i, j), *b = expected + (size_t)j * size;
            if (format_same(dtype, a, b))
                continue;
            fprintf(stderr, "%s[%lld][%lld]: is 0x%llx, expected 0x%llx (%s)\n", name, (long long)i,
                    (long long)j, (unsigned long long)code(dtype, a),
                    (unsigned long long)code(dtype, b), ep_dtype_string(dtype));
            return 1;
        }
    }
    return 0;
}

int tensor_ids_differ(const char *name, const ep_tensor *got, ep_dtype dtype, int64_t rows,
                      int64_t columns, const int64_t *want)
{
    void *dense = narrow(dtype, want, rows * columns);
    int differs = tensor_differs(name, got, dtype, rows, columns, dense, NULL);
    free(dense);
    return differs;
}

int tensor_given(const char *name, const ep_tensor *got)
{
    if (got->data == NULL && got->ndim == 0)
        return 0;
    fprintf(stderr, "%s: is given where it does not apply\n", name);
    return 1;
}
