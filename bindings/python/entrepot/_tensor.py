# SPDX-License-Identifier: MIT
"""Tensors in and out.

In: NumPy arrays (with ml_dtypes for bfloat16 and float8), torch tensors, and
anything with __dlpack__ or else the buffer protocol. Out: arrays of the kind
that came in, NumPy ones for buffers, as views of memory whose owner they keep
alive.
"""

import ctypes
import sys
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import ml_dtypes
import numpy as np

from ._abi import TENSOR_PACK, DeviceType, DType, Tensor
from ._dlpack import tensor_over

CPU, CUDA = int(DeviceType.DEVICE_CPU), int(DeviceType.DEVICE_CUDA)
BF16, F32, E4M3, I32, I64 = (
    int(DType.BF16),
    int(DType.F32),
    int(DType.E4M3),
    int(DType.I32),
    int(DType.I64),
)
U8, UE8M0X4 = int(DType.U8), int(DType.UE8M0X4)

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float8_e4m3fn = np.dtype(ml_dtypes.float8_e4m3fn)

_FROM_NUMPY: Dict[Any, int] = {
    bfloat16: BF16,
    np.dtype(np.float16): int(DType.F16),
    np.dtype(np.float32): F32,
    float8_e4m3fn: E4M3,
    np.dtype(np.int32): I32,
    np.dtype(np.int64): I64,
    np.dtype(np.uint8): int(DType.U8),
    np.dtype(np.bool_): int(DType.U8),
    np.dtype(np.float64): int(DType.F64),
}
TO_NUMPY: Dict[int, "np.dtype[Any]"] = {
    **{code: dtype for dtype, code in _FROM_NUMPY.items() if dtype != np.bool_},
    UE8M0X4: np.dtype(np.int32),
}
_TORCH_NAMES = {
    "bfloat16": BF16,
    "float16": int(DType.F16),
    "float32": F32,
    "float8_e4m3fn": E4M3,
    "int32": I32,
    "int64": I64,
    "uint8": int(DType.U8),
    "bool": int(DType.U8),
    "float64": int(DType.F64),
}
# torch.from_numpy knows no bfloat16 or float8: they cross as integers of their size.
_CARRIER: Dict[Any, "np.dtype[Any]"] = {
    bfloat16: np.dtype(np.int16),
    float8_e4m3fn: np.dtype(np.uint8),
}
_from_torch: Dict[Any, int] = {}
_to_torch: Dict[int, Any] = {}


def torch_module() -> Any:
    """torch, if the caller has imported it; a caller without it has no torch tensors."""
    return sys.modules.get("torch")


def is_torch(obj: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(obj, torch.Tensor)


def _torch_tables(torch: Any) -> None:
    for name, code in _TORCH_NAMES.items():
        dtype = getattr(torch, name, None)  # float8 came with torch 2.1
        if dtype is not None:
            _from_torch[dtype] = code
            if name != "bool":
                _to_torch[code] = dtype
    _to_torch[UE8M0X4] = torch.int32


def torch_dtype(code: int) -> Any:
    """The torch dtype of an ep_dtype."""
    if not _to_torch:
        _torch_tables(torch_module())
    return _to_torch[code]


def dtype_code(dtype: Any) -> int:
    """The ep_dtype of a NumPy or torch dtype."""
    torch = torch_module()
    if torch is not None and isinstance(dtype, torch.dtype):
        if not _from_torch:
            _torch_tables(torch)
        code = _from_torch.get(dtype)
    else:
        code = _FROM_NUMPY.get(np.dtype(dtype))
    if code is None:
        raise TypeError(f"{dtype} is no element type of this library")
    return code


class Kind(NamedTuple):
    """What array library results are made with, and where they lie."""

    torch: bool
    device: int  # an ep_device_type
    device_index: int


NUMPY = Kind(False, CPU, 0)
TORCH_CPU = Kind(True, CPU, 0)


_torch_cuda: Dict[int, Kind] = {}


def torch_cuda(index: int) -> Kind:
    """Of torch tensors on a GPU."""
    kind = _torch_cuda.get(index)
    if kind is None:
        kind = _torch_cuda[index] = Kind(True, CUDA, index)
    return kind


def current_stream(index: int) -> int:
    """torch's current stream of a GPU, as a pointer."""
    torch = sys.modules["torch"]
    try:  # several times as quick as the object
        return torch._C._cuda_getCurrentRawStream(index)
    except AttributeError:
        return torch.cuda.current_stream(index).cuda_stream


def kind_of(obj: Any) -> Kind:
    """Kind of the results that a call with `obj` returns."""
    if type(obj) is np.ndarray:
        return NUMPY
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(obj, torch.Tensor):
        return TORCH_CPU if not obj.is_cuda else torch_cuda(obj.get_device())
    if not hasattr(obj, "__dlpack_device__"):
        _array_of(obj)
        return NUMPY
    device, index = _dlpack_device(obj)
    return Kind(False, device, index)


# ------------------------------------------------------------------------ in


class _DLTensor(ctypes.Structure):
    """Layout of DLPack, versions 0 and 1 (github.com/dmlc/dlpack)."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_DL_TYPES = {
    (4, 16): BF16,
    (2, 16): int(DType.F16),
    (2, 32): F32,
    (2, 64): int(DType.F64),
    (10, 8): E4M3,
    (0, 32): I32,
    (0, 64): I64,
    (1, 8): int(DType.U8),
    (6, 8): int(DType.U8),
}
_TO_DLPACK = {code: dl for dl, code in _DL_TYPES.items()}
_TO_DLPACK.update({E4M3: (1, 8), U8: (1, 8), UE8M0X4: (0, 32)})
_DL_DEVICES = {1: CPU, 2: CUDA, 3: CPU, 13: CUDA}  # 3: pinned host, 13: managed

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def _dlpack_device(obj: Any) -> Tuple[int, int]:
    device, index = obj.__dlpack_device__()
    if int(device) not in _DL_DEVICES:
        raise TypeError(f"DLPack device type {int(device)} is neither CPU nor CUDA")
    return _DL_DEVICES[int(device)], int(index)


class Described(NamedTuple):
    """A tensor as the library sees it; `keep` owns the memory."""

    data: int
    dtype: int
    shape: Tuple[int, ...]
    stride: Tuple[int, ...]
    device: int
    device_index: int
    keep: Any


def _array_of(obj: Any) -> np.ndarray:
    """The array over the memory of an object that has the buffer protocol."""
    what = f"a {type(obj).__name__} is no tensor"
    try:
        array = np.asarray(memoryview(obj))
    except TypeError:
        raise TypeError(
            f"{what}: neither a NumPy array nor a torch tensor, and it has neither __dlpack__ "
            "nor a buffer"
        ) from None
    except (ValueError, BufferError) as error:
        raise TypeError(f"{what}: its buffer cannot be read: {error}") from error
    if array.ndim == 0:
        raise TypeError(f"{what} but a single number")
    return array


def _describe_dlpack(obj: Any) -> Described:
    device, index = _dlpack_device(obj)
    # The capsule is only looked at, never consumed: dropping it gives the memory back.
    capsule = obj.__dlpack__()
    tensor = _DLTensor.from_address(_capsule_pointer(capsule, b"dltensor"))
    dtype = _DL_TYPES.get((tensor.code, tensor.bits))
    if dtype is None or tensor.lanes != 1:
        raise TypeError(f"DLPack type code {tensor.code} of {tensor.bits} bits is no tensor type")
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    if tensor.strides:
        stride = tuple(tensor.strides[i] for i in range(tensor.ndim))
    else:
        stride = row_major(shape)
    data = (tensor.data or 0) + tensor.byte_offset
    return Described(data, dtype, shape, stride, device, index, capsule)


def row_major(shape: Tuple[int, ...]) -> Tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= size
    return tuple(reversed(stride))


def describe(obj: Any, name: str = "tensor") -> Described:
    """Looks at a tensor without copying it."""
    if type(obj) is np.ndarray or isinstance(obj, np.ndarray):
        dtype = _FROM_NUMPY.get(obj.dtype)
        if dtype is None:
            raise TypeError(f"{name}: an array of {obj.dtype} cannot be sent")
        size, strides = obj.itemsize, obj.strides
        if len(strides) == 2:  # unrolled: most tensors have two dimensions
            first, second = strides
            stride: Tuple[int, ...] = (first // size, second // size)
            whole = not (first % size or second % size)
        else:
            stride = tuple([s // size for s in strides])
            whole = all([not s % size for s in strides])
        if not whole:
            raise ValueError(f"{name}: strides {strides} are no multiple of {size} bytes")
        data = obj.__array_interface__["data"][0]
        return Described(data, dtype, obj.shape, stride, CPU, 0, obj)
    if is_torch(obj):
        dtype = _from_torch.get(obj.dtype)
        if dtype is None:
            _torch_tables(torch_module())
            dtype = _from_torch.get(obj.dtype)
            if dtype is None:
                raise TypeError(f"{name}: a tensor of {obj.dtype} cannot be sent")
        if obj.is_cuda:
            return Described(
                obj.data_ptr(), dtype, obj.shape, obj.stride(), CUDA, obj.device.index, obj
            )
        return Described(obj.data_ptr(), dtype, obj.shape, obj.stride(), CPU, 0, obj)
    if hasattr(obj, "__dlpack_device__"):
        return _describe_dlpack(obj)
    return describe(_array_of(obj), name)


_pack, _unpack = TENSOR_PACK.pack_into, TENSOR_PACK.unpack_from
_ZERO4 = (0, 0, 0, 0)


def put(args: Any, field: Any, obj: Any, keep: List[Any]) -> Tuple[int, ...]:
    """Writes a tensor into a field of an argument structure; returns its shape."""
    # Only torch's dtypes are in the table, so that whatever has one is a tensor of torch.
    dtype = _from_torch.get(getattr(obj, "dtype", None))
    if dtype is None:
        described = describe(obj)
        fill(args, field.offset, described)
        keep.append(described.keep)
        return described.shape
    keep.append(obj)
    shape = obj.shape
    n = len(shape)
    device, index = (CUDA, obj.get_device()) if obj.is_cuda else (CPU, 0)
    if n == 2:  # unrolled: most tensors have two dimensions
        rows, columns = shape
        step, unit = obj.stride()
        if rows and columns:
            at, to = obj.data_ptr(), field.offset
            _pack(args, to, at, dtype, 2, rows, columns, 0, 0, step, unit, 0, 0, device, index)
            return shape
    elif n <= 4 and 0 not in shape:
        at, pad = obj.data_ptr(), _ZERO4[n:]
        _pack(
            args, field.offset, at, dtype, n, *shape, *pad, *obj.stride(), *pad, device, index
        )
        return shape
    fill(args, field.offset, describe(obj))
    return shape


def put_output(args: Any, field: Any, obj: Any, keep: List[Any], name: str) -> None:
    """put() of a tensor that the call writes."""
    put(args, field, obj, keep)
    array = keep[-1]  # also that over a buffer
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        raise ValueError(f"{name} is read-only: the call writes it")


def fill(target: Any, offset: int, view: Described, dtype: Optional[int] = None) -> None:
    """Writes a described tensor as the ep_tensor at `offset` of a structure."""
    n = len(view.shape)
    if n > 4:
        raise ValueError(f"a tensor of {n} dimensions; at most 4 are possible")
    stride = view.stride
    if 0 in view.shape:
        stride = row_major(view.shape)  # an empty array may have any
    TENSOR_PACK.pack_into(
        target,
        offset,
        view.data,
        dtype or view.dtype,
        n,
        *view.shape,
        *_ZERO4[n:],
        *stride,
        *_ZERO4[n:],
        view.device,
        view.device_index,
    )


# ----------------------------------------------------------------------- out


class _Memory(ctypes.Array):
    """Foreign memory with an owner. Its length only bounds views; nothing is read by it."""

    _type_ = ctypes.c_char
    _length_ = 1 << 46
    owner: Any


class _CudaMemory:
    """Device memory with an owner, in the form that torch and CuPy import."""

    def __init__(self, pointer: int, dtype: "np.dtype[Any]", shape: Any, strides: Any, owner: Any):
        self.owner = owner
        self.__cuda_array_interface__ = {
            "data": (pointer, False),
            "typestr": dtype.str,
            "shape": tuple(shape),
            "strides": None if strides is None else tuple(strides),
            "version": 3,
            "stream": None,
        }


def _numpy_view(
    pointer: int, dtype: "np.dtype[Any]", shape: Any, strides: Any, owner: Any
) -> np.ndarray:
    memory = _Memory.from_address(pointer)
    memory.owner = owner
    return np.ndarray(shape, dtype, memory, 0, strides)  # type: ignore[arg-type]


def view(tensor: Tensor, kind: Kind, owner: Any) -> Any:
    """An array over memory of the library; None if the tensor is not given."""
    return view_at(tensor, 0, kind, owner)


def view_at(structure: Any, offset: int, kind: Kind, owner: Any) -> Any:
    """view() of the ep_tensor at `offset` of a structure."""
    fields = _unpack(structure, offset)
    data, code, n = fields[:3]
    if n == 0:
        return None
    shape = fields[3 : 3 + n]
    if 0 in shape:
        return empty(shape, code, kind)
    if kind.torch:
        out = tensor_over(structure, offset, fields, _TO_DLPACK[code], owner)
        # float8 crosses as bytes: not every torch imports it.
        return out.view(torch_dtype(code)) if code == E4M3 else out
    stride = fields[7 : 7 + n]
    dtype = TO_NUMPY[code]
    size = dtype.itemsize
    strides = None if n == 1 else [s * size for s in stride]
    if kind.device == CPU:
        return _numpy_view(data, dtype, shape, strides, owner)
    return _CudaMemory(data, _CARRIER.get(dtype, dtype), shape, strides, owner)


def empty(shape: Any, dtype: int, kind: Kind) -> Any:
    """An uninitialised array of the caller's own library."""
    if kind.torch:
        torch = torch_module()
        device = "cpu" if kind.device == CPU else torch.device("cuda", kind.device_index)
        # torch reads sizes one by one sooner than a tuple of them
        return torch.empty(*shape, dtype=torch_dtype(dtype), device=device)
    if kind.device != CPU:
        raise TypeError("results in device memory are made with torch; import torch, or give `out`")
    return np.empty(shape, TO_NUMPY[dtype])


def empty_like(like: Any, shape: Any, dtype: int, kind: Kind) -> Any:
    """empty() beside a tensor of that dtype and kind, which torch makes sooner."""
    if kind.torch and _from_torch.get(like.dtype) == dtype:
        return like.new_empty(*shape)
    return empty(shape, dtype, kind)


def torch_view_of(array: np.ndarray) -> Any:
    """The torch tensor over a NumPy array's memory."""
    carrier = _CARRIER.get(array.dtype)
    torch = torch_module()
    if carrier is None:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(carrier)).view(torch_dtype(_FROM_NUMPY[array.dtype]))
