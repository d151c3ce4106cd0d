# SPDX-License-Identifier: MIT
"""Accelerators that the library can use."""

from ctypes import byref, c_int32

from ._lib import lib
from ._tensor import CUDA

_count = -1


def num_gpus() -> int:
    """GPUs that calls on CUDA tensors can run on; 0 without the CUDA module, driver or GPU."""
    global _count
    if _count < 0:
        count = c_int32()
        _count = count.value if lib.ep_device_count(CUDA, byref(count)) == 0 else 0
    return _count
