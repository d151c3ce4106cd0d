/* SPDX-License-Identifier: MIT */
#include "entrepot/tensor.h"

static const struct {
    const char *name;
    size_t size;
} dtypes[] = {
    [EP_DTYPE_NONE] = {"none", 0}, [EP_BF16] = {"BF16", 2}, [EP_F16] = {"F16", 2},
    [EP_F32] = {"F32", 4},         [EP_E4M3] = {"E4M3", 1}, [EP_I32] = {"I32", 4},
    [EP_I64] = {"I64", 8},         [EP_U8] = {"U8", 1},     [EP_F64] = {"F64", 8},
    [EP_UE8M0X4] = {"UE8M0X4", 4},
};

static int is_dtype(ep_dtype dtype)
{
    return (unsigned)dtype < sizeof dtypes / sizeof *dtypes;
}

size_t ep_dtype_size(ep_dtype dtype)
{
    return is_dtype(dtype) ? dtypes[dtype].size : 0;
}

const char *ep_dtype_string(ep_dtype dtype)
{
    return is_dtype(dtype) ? dtypes[dtype].name : "?";
}
