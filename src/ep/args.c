/* SPDX-License-Identifier: MIT */
#include "ep/args.h"

#include "base/error.h"

#include <string.h>

ep_status epi_bad(const char *call, const char *argument, int64_t value, const char *allowed)
{
    return epi_fail(EP_ERR_ARGUMENT, "%s: %s is %lld; it must be %s", call, argument,
                    (long long)value, allowed);
}

ep_status epi_disagree(const char *call, const char *argument, int rank_a, int64_t value_a,
                       int rank_b, int64_t value_b)
{
    return epi_fail(EP_ERR_MISMATCH, "%s: %s differs: %lld on rank %d, %lld on rank %d", call,
                    argument, (long long)value_a, rank_a, (long long)value_b, rank_b);
}

ep_status epi_args_copy(const char *call, const char *argument, void *full, size_t full_size,
                        const void *given)
{
    if (!given)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is NULL", call, argument);
    size_t size;
    memcpy(&size, given, sizeof size);
    if (size < sizeof size || size > 65536)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: %s->size is %zu; it must be sizeof the struct (%zu here): start from "
                        "its _INIT macro",
                        call, argument, size, full_size);
    const uint8_t *bytes = given;
    for (size_t i = full_size; i < size; i++)
        if (bytes[i])
            return epi_fail(EP_ERR_UNSUPPORTED,
                            "%s: %s->size is %zu and uses fields that this library (%s) does not "
                            "know",
                            call, argument, size, ep_version());
    memcpy(full, given, size < full_size ? size : full_size);
    memcpy(full, &full_size, sizeof full_size);
    return EP_OK;
}

ep_status epi_result_copy(const char *call, const char *argument, void *given, const void *full,
                          size_t full_size)
{
    if (!given)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is NULL", call, argument);
    size_t size;
    memcpy(&size, given, sizeof size);
    if (size < sizeof size || size > 65536)
        return epi_fail(EP_ERR_ARGUMENT,
                        "%s: %s->size is %zu; it must be sizeof the struct (%zu here)", call,
                        argument, size, full_size);
    memcpy(given, full, size < full_size ? size : full_size);
    memcpy(given, &size, sizeof size);
    return EP_OK;
}

ep_status epi_check_no_stream(const char *call, const void *stream)
{
    return stream ? epi_fail(EP_ERR_ARGUMENT, "%s: stream is %p; it must be NULL on the CPU", call,
                             stream)
                  : EP_OK;
}

bool epi_tensor_given(const ep_tensor *tensor)
{
    return tensor->ndim != 0 || tensor->data != NULL;
}

static ep_status check_shape(const ep_tensor *tensor, const epi_tensor_rule *rule)
{
    const int64_t want[2] = {rule->rows, rule->columns};
    for (int i = 0; i < rule->ndim; i++) {
        int64_t have = tensor->shape[i];
        if (have < 0 || have > INT32_MAX)
            return epi_fail(EP_ERR_ARGUMENT, "%s: %s.shape[%d] is %lld; it must be 0..2147483647",
                            rule->call, rule->argument, i, (long long)have);
        if (i < 2 && want[i] >= 0 && have != want[i])
            return epi_fail(EP_ERR_ARGUMENT, "%s: %s.shape[%d] is %lld; it must be %lld",
                            rule->call, rule->argument, i, (long long)have, (long long)want[i]);
    }
    return EP_OK;
}

static ep_status check_strides(const ep_tensor *tensor, const epi_tensor_rule *rule)
{
    int last = rule->ndim - 1;
    if (rule->free_strides)
        return EP_OK;
    if (tensor->shape[last] > 1 && tensor->stride[last] != 1)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s.stride[%d] is %lld; it must be 1", rule->call,
                        rule->argument, last, (long long)tensor->stride[last]);
    if (rule->ndim == 2 && tensor->shape[0] > 1 && tensor->stride[0] < tensor->shape[1])
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s.stride[0] is %lld; it must be at least %lld",
                        rule->call, rule->argument, (long long)tensor->stride[0],
                        (long long)tensor->shape[1]);
    return EP_OK;
}

ep_status epi_tensor_check(const ep_tensor *tensor, const epi_tensor_rule *rule)
{
    if (!epi_tensor_given(tensor))
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s is not given", rule->call, rule->argument);
    if (tensor->ndim != rule->ndim)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s.ndim is %d; it must be %d", rule->call,
                        rule->argument, (int)tensor->ndim, rule->ndim);
    if ((unsigned)tensor->dtype >= 32 || !(rule->dtypes >> tensor->dtype & 1))
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s.dtype is %s (%d); it must be %s", rule->call,
                        rule->argument, ep_dtype_string(tensor->dtype), (int)tensor->dtype,
                        rule->dtype_names);
    if (tensor->device != rule->device)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s.device is %d; it must be %d as the buffer's",
                        rule->call, rule->argument, (int)tensor->device, (int)rule->device);
    if (rule->device != EP_DEVICE_CPU && tensor->device_index != rule->device_index)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s.device_index is %d; it must be %d as the buffer's",
                        rule->call, rule->argument, (int)tensor->device_index,
                        (int)rule->device_index);
    EPI_TRY(check_shape(tensor, rule));
    EPI_TRY(check_strides(tensor, rule));
    bool empty = false;
    for (int i = 0; i < rule->ndim; i++)
        empty |= tensor->shape[i] == 0;
    if (!empty && !tensor->data)
        return epi_fail(EP_ERR_ARGUMENT, "%s: %s.data is NULL", rule->call, rule->argument);
    return EP_OK;
}
