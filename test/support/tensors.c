/* SPDX-License-Identifier: MIT */
#include "support/tensors.h"

#include "support/formats.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POISON 0xa5

_Thread_local struct test_device test_device;

static void must(ep_status status)
{
    if (status == EP_OK)
        return;
    fprintf(stderr, "the test's device: %s\n", ep_last_error());
    abort();
}

int test_device_wanted(void)
{
    const char *name = getenv("EP_TEST_DEVICE");
    return name && strcmp(name, "cuda") == 0;
}

const char *test_transport(const char *otherwise)
{
    const char *named = getenv("EP_TEST_TRANSPORT");
    return !test_device_wanted() ? otherwise : named ? named : "shm";
}

ep_status test_device_enter(int rank)
{
    int32_t count = 0;
    if (!test_device_wanted())
        return EP_OK;
    ep_status status = ep_device_count(EP_DEVICE_CUDA, &count);
    int index = count > 0 ? rank % count : 0;
    if (status == EP_OK)
        status = ep_stream_create(EP_DEVICE_CUDA, index, &test_device.stream);
    if (status == EP_OK) {
        test_device.type = EP_DEVICE_CUDA;
        test_device.index = index;
    }
    return status;
}

void test_device_leave(void)
{
    if (test_device.type != EP_DEVICE_CPU)
        ep_stream_destroy(test_device.type, test_device.index, test_device.stream);
    test_device = (struct test_device){0};
}

/* Ranks that are threads must neither allocate nor free device memory while another's kernel waits
   for them: freed memory is kept, by size. */
struct spare {
    size_t bytes;
    struct spare *next;
    void *memory;
};
static _Thread_local struct spare *spares, *lent;

static struct spare *find_spare(size_t bytes)
{
    for (struct spare **each = &spares; *each; each = &(*each)->next)
        if ((*each)->bytes == bytes) {
            struct spare *found = *each;
            *each = found->next;
            return found;
        }
    struct spare *fresh = test_zeros(1, sizeof *fresh);
    fresh->bytes = bytes;
    must(ep_device_alloc(test_device.type, test_device.index, bytes, &fresh->memory));
    return fresh;
}

void *test_memory_new(size_t bytes)
{
    if (test_device.type == EP_DEVICE_CPU)
        return aligned_alloc(64, (bytes + 64) & ~(size_t)63);
    size_t rounded = 256;
    while (rounded < bytes)
        rounded *= 2;
    struct spare *spare = find_spare(rounded);
    spare->next = lent;
    lent = spare;
    return spare->memory;
}

void test_memory_free(void *memory)
{
    if (test_device.type == EP_DEVICE_CPU) {
        free(memory);
        return;
    }
    for (struct spare **each = &lent; *each; each = &(*each)->next)
        if ((*each)->memory == memory) {
            struct spare *back = *each;
            *each = back->next;
            back->next = spares;
            spares = back;
            return;
        }
}

void test_memory_write(void *to, const void *from, size_t bytes)
{
    if (test_device.type == EP_DEVICE_CPU)
        memcpy(to, from, bytes);
    else
        must(ep_device_copy(test_device.type, test_device.index, to, from, bytes,
                            test_device.stream));
}

static size_t extent(const ep_tensor *tensor)
{
    int64_t elements = 1;
    for (int i = 0; i < tensor->ndim; i++) {
        if (tensor->shape[i] == 0)
            return 0;
        elements += (tensor->shape[i] - 1) * tensor->stride[i];
    }
    return (size_t)elements * ep_dtype_size(tensor->dtype);
}

/* The tensor as the host can read it, `bytes` of it; `copy` is to be freed. */
static ep_tensor on_host(const ep_tensor *tensor, size_t bytes, void **copy)
{
    ep_tensor host = *tensor;
    *copy = NULL;
    if (tensor->device == EP_DEVICE_CPU)
        return host;
    host.device = EP_DEVICE_CPU;
    host.data = *copy = test_zeros((int64_t)bytes, 1);
    must(ep_device_copy(tensor->device, tensor->device_index, *copy, tensor->data, bytes,
                        test_device.stream));
    return host;
}

/* Moves a tensor made in host memory to the test's device. */
static ep_tensor placed(ep_tensor tensor, size_t bytes)
{
    if (test_device.type == EP_DEVICE_CPU)
        return tensor;
    void *host = tensor.data;
    tensor.data = test_memory_new(bytes);
    test_memory_write(tensor.data, host, bytes);
    tensor.device = test_device.type;
    tensor.device_index = test_device.index;
    free(host);
    return tensor;
}

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
    return placed(tensor, (size_t)(rows * (columns + gap)) * ep_dtype_size(dtype));
}

ep_tensor tensor_new_transposed(ep_dtype dtype, int64_t rows, int64_t columns, const void *dense)
{
    ep_tensor tensor = poisoned(dtype, rows, columns, rows * columns);
    tensor.stride[0] = 1;
    tensor.stride[1] = rows;
    fill(&tensor, dense);
    return placed(tensor, (size_t)(rows * columns) * ep_dtype_size(dtype));
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
    if (tensor->device == EP_DEVICE_CPU)
        free(tensor->data);
    else
        test_memory_free(tensor->data);
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

static size_t whole(const ep_tensor *tensor)
{
    return (size_t)(tensor->shape[0] * tensor->stride[0]) * ep_dtype_size(tensor->dtype);
}

int tensor_gaps_intact(const ep_tensor *tensor)
{
    void *copy;
    ep_tensor host = on_host(tensor, whole(tensor), &copy);
    size_t size = ep_dtype_size(host.dtype);
    size_t gap = (size_t)(host.stride[0] - host.shape[1]) * size;
    int intact = 1;
    for (int64_t i = 0; i < host.shape[0]; i++)
        intact &= all_poison(at(&host, i, 0) + (size_t)host.shape[1] * size, gap);
    free(copy);
    return intact;
}

int tensor_untouched(const ep_tensor *tensor)
{
    void *copy;
    ep_tensor host = on_host(tensor, whole(tensor), &copy);
    int untouched = all_poison(host.data, whole(&host));
    free(copy);
    return untouched;
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

static int elements_differ(const char *name, const ep_tensor *got, ep_dtype dtype, int64_t rows,
                           int64_t columns, const void *want, const struct ref_row *row)
{
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

int tensor_differs(const char *name, const ep_tensor *got, ep_dtype dtype, int64_t rows,
                   int64_t columns, const void *want, const struct ref_row *row)
{
    void *copy;
    if (shape_differs(name, got, dtype, rows, columns))
        return 1;
    ep_tensor host = on_host(got, extent(got), &copy);
    int differs = elements_differ(name, &host, dtype, rows, columns, want, row);
    free(copy);
    return differs;
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
