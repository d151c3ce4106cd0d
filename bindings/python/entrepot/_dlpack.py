# SPDX-License-Identifier: MIT
"""Tensors of torch over memory of the library, by DLPack: its quickest way in.

The capsule's structure is kept, with the ep_tensor whose shape it points to and
the memory's owner, until torch lets go of it, on whatever thread.
"""

import atexit
import ctypes
import struct
import sys
from typing import Any, Dict, Tuple

from ._abi import Tensor

_CPU, _CUDA = 1, 2  # DLDeviceType
_NAME = b"dltensor"
#: DLManagedTensor.
_BLOCK = struct.Struct("@PiiiBBHPPQPP")
_DELETER = 56
_SHAPE, _STRIDE = Tensor.shape.offset, Tensor.stride.offset
_pack = _BLOCK.pack_into

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]

_Block = ctypes.c_char * _BLOCK.size
_address_of = ctypes.addressof
_held: Dict[int, Tuple[Any, Any, Any]] = {}


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _delete(address: int) -> None:
    _held.pop(address, None)


_delete_address = ctypes.cast(_delete, ctypes.c_void_p).value


@atexit.register
def _forget_deleter() -> None:
    """What torch frees after the interpreter has ended must not call it, and finds its block."""
    for block, _, _ in list(_held.values()):
        struct.pack_into("@P", block, _DELETER, 0)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(_held))


def _find_importer(capsule: Any) -> Any:
    """torch's way in for a capsule; the public function first looks what it was given."""
    global _from_dlpack
    torch = sys.modules["torch"]
    _from_dlpack = getattr(torch._C, "_from_dlpack", None) or torch.utils.dlpack.from_dlpack
    return _from_dlpack(capsule)


_from_dlpack: Any = _find_importer


def tensor_over(
    structure: Any, offset: int, fields: Tuple[int, ...], dtype: Tuple[int, int], owner: Any
) -> Any:
    """A tensor of torch that keeps `owner` alive.

    Args:
        structure, offset: where an ep_tensor stands, whose shape and strides are read in place.
        fields: of it.
        dtype: DLPack's type code and bits.
    """
    code, bits = dtype
    at = _address_of(structure) + offset
    block = _Block()
    address = _address_of(block)
    device = _CUDA if fields[11] else _CPU
    _pack(
        block,
        0,
        fields[0],
        device,
        fields[12],
        fields[2],
        code,
        bits,
        1,
        at + _SHAPE,
        at + _STRIDE,
        0,
        0,
        _delete_address,
    )
    _held[address] = (block, structure, owner)
    try:
        return _from_dlpack(_new_capsule(address, _NAME, None))
    except BaseException:
        _held.pop(address, None)
        raise
