# SPDX-License-Identifier: MIT
"""Tensors of torch over memory of the library, by DLPack: its quickest way in.

The capsule's structure and the arrays that it points to lie in one block, which
is kept with the memory's owner until torch lets go of it, on whatever thread.
"""

import atexit
import ctypes
import struct
from typing import Any, Dict, Sequence, Tuple

_CPU, _CUDA = 1, 2  # DLDeviceType
_NAME = b"dltensor"
#: DLManagedTensor, then the shape and the strides.
_BLOCK = struct.Struct("@PiiiBBHPPQPP4q4q")
_SHAPE, _STRIDE, _DELETER = 64, 96, 56
_pack = _BLOCK.pack_into

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_Block = ctypes.c_char * _BLOCK.size
_held: Dict[int, Tuple[Any, Any]] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address: int) -> None:
    _held.pop(address, None)


_delete_address = ctypes.cast(_delete, ctypes.c_void_p).value


@atexit.register
def _forget_deleter() -> None:
    """What torch frees after the interpreter has ended must not call it."""
    for block, _ in list(_held.values()):
        struct.pack_into("@P", block, _DELETER, 0)


_PAD = tuple((0,) * (4 - n) for n in range(5))


def importer(torch: Any) -> Any:
    """torch's way in for a capsule; the public function first looks what it was given."""
    return getattr(torch._C, "_from_dlpack", None) or torch.utils.dlpack.from_dlpack


def tensor_over(
    from_dlpack: Any,
    pointer: int,
    dtype: Tuple[int, int],
    shape: Sequence[int],
    stride: Sequence[int],
    cuda_index: int,
    owner: Any,
) -> Any:
    """A tensor that keeps `owner` alive.

    Args:
        from_dlpack: of importer().
        dtype: DLPack's type code and bits.
        stride: in elements.
        cuda_index: -1: host memory.
    """
    n = len(shape)
    block = _Block()
    address = ctypes.addressof(block)
    device, index = (_CPU, 0) if cuda_index < 0 else (_CUDA, cuda_index)
    code, bits = dtype
    pad = _PAD[n]
    _pack(
        block,
        0,
        pointer,
        device,
        index,
        n,
        code,
        bits,
        1,
        address + _SHAPE,
        address + _STRIDE,
        0,
        0,
        _delete_address,
        *shape,
        *pad,
        *stride,
        *pad,
    )
    _held[address] = (block, owner)
    try:
        return from_dlpack(_new_capsule(address, _NAME, None))
    except BaseException:
        _held.pop(address, None)
        raise
