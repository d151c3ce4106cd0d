# SPDX-License-Identifier: MIT
"""The C structures and enumerations of include/entrepot, mirrored for ctypes.

tests/test_abi.py compiles a program against the headers and compares every
size, offset, enumerator and initialiser with what stands here.
"""

import ctypes
import enum
import functools
import struct
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint64,
    c_void_p,
)
from typing import Any, Callable, Dict, Tuple


class Status(enum.IntEnum):
    """ep_status."""

    OK = 0
    IN_PROGRESS = 1
    ERR_ARGUMENT = 2
    ERR_MEMORY = 3
    ERR_SYSTEM = 4
    ERR_TIMEOUT = 5
    ERR_RANK_DEAD = 6
    ERR_ABORTED = 7
    ERR_MISMATCH = 8
    ERR_CAPACITY = 9
    ERR_CORRUPT = 10
    ERR_STATE = 11
    ERR_UNSUPPORTED = 12
    ERR_DEVICE = 13
    ERR_IO = 14
    ERR_FORMAT = 15


class DType(enum.IntEnum):
    """ep_dtype."""

    DTYPE_NONE = 0
    BF16 = 1
    F16 = 2
    F32 = 3
    E4M3 = 4
    I32 = 5
    I64 = 6
    U8 = 7
    F64 = 8
    UE8M0X4 = 9


class DeviceType(enum.IntEnum):
    """ep_device_type."""

    DEVICE_CPU = 0
    DEVICE_CUDA = 1


class Wire(enum.IntEnum):
    """ep_wire."""

    WIRE_INPUT = 0
    WIRE_FP8 = 1


class Scale(enum.IntEnum):
    """ep_scale."""

    SCALE_F32 = 0
    SCALE_POW2 = 1
    SCALE_UE8M0 = 2


class RowLayout(enum.IntEnum):
    """ep_row_layout."""

    ROWS_BY_TOKEN = 0
    ROWS_BY_EXPERT = 1


class Call(enum.IntEnum):
    """ep_call."""

    CALL_DISPATCH = 0
    CALL_COMBINE = 1
    CALL_DISPATCH_BACKWARD = 2
    CALL_COMBINE_BACKWARD = 3
    CALL_LL_DISPATCH = 4
    CALL_LL_COMBINE = 5


class Completion(enum.IntEnum):
    """ep_completion."""

    COMPLETE_IN_BACKGROUND = 0
    COMPLETE_BY_HOOK = 1


class Overflow(enum.IntEnum):
    """ep_overflow."""

    OVERFLOW_ERROR = 0
    OVERFLOW_DROP = 1


class CombineWire(enum.IntEnum):
    """ep_combine_wire."""

    COMBINE_BF16 = 0
    COMBINE_LOGFMT10 = 1


ENUMS = (
    Status,
    DType,
    DeviceType,
    Wire,
    Scale,
    RowLayout,
    Call,
    Completion,
    Overflow,
    CombineWire,
)

#: One ep_tensor, packed in one call: assigning eleven ctypes fields costs ten times as much.
TENSOR_PACK = struct.Struct("@Pii4q4qii")
AllgatherFn = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_size_t)
AllocFn = CFUNCTYPE(c_void_p, c_void_p, c_size_t)
FreeFn = CFUNCTYPE(None, c_void_p, c_void_p)


class Tensor(Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int),
        ("ndim", c_int32),
        ("shape", c_int64 * 4),
        ("stride", c_int64 * 4),
        ("device", c_int),
        ("device_index", c_int32),
    ]


class _Sized(Structure):
    """A structure that begins with its own size; the rest of a new one is the C initialiser's."""

    _defaults_: dict = {}

    def __init__(self, **values):
        super().__init__(size=ctypes.sizeof(self), **{**self._defaults_, **values})

    #: The same as the class itself, by copying a ready one, which is several times faster.
    fresh: Callable[[], Any]


class GroupConfig(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("rank", c_int32),
        ("num_ranks", c_int32),
        ("ranks_per_node", c_int32),
        ("timeout_ms", c_int64),
        ("transport", c_char_p),
        ("name", c_char_p),
        ("allgather", AllgatherFn),
        ("allgather_context", c_void_p),
        ("world", c_void_p),
        ("rejoin", c_int32),
    ]
    _defaults_ = {"rank": -1, "num_ranks": -1}


class BufferConfig(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("window_bytes", c_size_t),
        ("window_max_bytes", c_size_t),
        ("num_threads", c_int32),
        ("max_experts", c_int32),
        ("verify", c_int32),
        ("device", c_int),
        ("device_index", c_int32),
    ]


class BufferInfo(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("window_bytes", c_size_t),
        ("control_bytes", c_size_t),
        ("used_bytes", c_size_t),
        ("peak_bytes", c_size_t),
        ("num_calls", c_uint64),
    ]


class TraceEvent(Structure):
    _fields_ = [
        ("size", c_size_t),
        ("rank", c_int32),
        ("call", c_uint64),
        ("name", c_char_p),
        ("phase", c_char_p),
        ("begin_ns", c_int64),
        ("end_ns", c_int64),
    ]


TraceFn = CFUNCTYPE(None, c_void_p, POINTER(TraceEvent))


class NormalShape(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("num_ranks", c_int32),
        ("num_tokens", c_int64),
        ("hidden", c_int64),
        ("topk", c_int32),
        ("num_experts", c_int64),
        ("max_experts", c_int64),
        ("dtype", c_int),
        ("scale", c_int),
        ("layout", c_int),
        ("expert_alignment", c_int32),
        ("topk_bytes", c_int32),
    ]
    _defaults_ = {
        "num_ranks": 1,
        "topk": 1,
        "num_experts": 1,
        "dtype": DType.BF16,
        "expert_alignment": 1,
        "topk_bytes": 8,
    }


class NormalSize(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("control_bytes", c_size_t),
        ("row_bytes", c_size_t),
        ("expected_bytes", c_size_t),
        ("worst_bytes", c_size_t),
    ]


class Allocator(Structure):
    _fields_ = [("alloc", AllocFn), ("free", FreeFn), ("context", c_void_p)]


class DispatchArgs(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("x", Tensor),
        ("scales", Tensor),
        ("topk_idx", Tensor),
        ("topk_weights", Tensor),
        ("num_experts", c_int64),
        ("expert_rank", c_void_p),
        ("wire", c_int),
        ("scale", c_int),
        ("layout", c_int),
        ("expert_alignment", c_int32),
        ("num_worst_tokens", c_int64),
        ("handle", c_void_p),
        ("allocator", POINTER(Allocator)),
        ("previous", c_void_p),
        ("stream", c_void_p),
        ("num_sms", c_int32),
    ]
    _defaults_ = {"expert_alignment": 1}


class Recv(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("x", Tensor),
        ("scales", Tensor),
        ("topk_idx", Tensor),
        ("topk_weights", Tensor),
        ("source_token", Tensor),
        ("source_offset", Tensor),
        ("expert_offset", Tensor),
        ("tokens_per_expert", Tensor),
        ("num_rows", c_int64),
        ("handle", c_void_p),
        ("owner", c_void_p),
        ("host_tokens_per_expert", c_void_p),
    ]


class HandleInfo(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("num_ranks", c_int32),
        ("topk", c_int32),
        ("num_tokens", c_int64),
        ("num_rows", c_int64),
        ("hidden", c_int64),
        ("num_experts", c_int64),
        ("num_local_experts", c_int32),
        ("layout", c_int),
        ("rows_between", c_void_p),
        ("send_rank", c_void_p),
        ("send_row", c_void_p),
        ("source_token", c_void_p),
    ]


class CombineArgs(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("y", Tensor),
        ("topk_weights", Tensor),
        ("bias", Tensor * 2),
        ("handle", c_void_p),
        ("out", Tensor),
        ("out_weights", Tensor),
        ("previous", c_void_p),
        ("stream", c_void_p),
        ("num_sms", c_int32),
    ]


class DispatchBackwardArgs(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("grad_recv_x", Tensor),
        ("grad_recv_weights", Tensor),
        ("handle", c_void_p),
        ("grad_x", Tensor),
        ("grad_topk_weights", Tensor),
        ("previous", c_void_p),
        ("stream", c_void_p),
        ("num_sms", c_int32),
    ]


class CombineBackwardArgs(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("grad_out", Tensor),
        ("y", Tensor),
        ("topk_weights", Tensor),
        ("handle", c_void_p),
        ("grad_topk_weights", Tensor),
        ("allocator", POINTER(Allocator)),
        ("previous", c_void_p),
        ("stream", c_void_p),
        ("num_sms", c_int32),
    ]


class LlShape(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("num_ranks", c_int32),
        ("max_tokens", c_int64),
        ("hidden", c_int64),
        ("topk", c_int32),
        ("num_experts", c_int64),
        ("max_expert_rows", c_int64),
        ("wire", c_int),
        ("scale", c_int),
    ]
    _defaults_ = {"num_ranks": 1, "max_tokens": 1, "topk": 1, "num_experts": 1, "wire": DType.BF16}


class LlSize(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("window_bytes", c_size_t),
        ("private_bytes", c_size_t),
        ("address_bytes", c_size_t),
    ]


class LlDispatchArgs(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("x", Tensor),
        ("topk_idx", Tensor),
        ("max_tokens", c_int64),
        ("num_experts", c_int64),
        ("expert_rank", c_void_p),
        ("max_expert_rows", c_int64),
        ("overflow", c_int),
        ("wire", c_int),
        ("scale", c_int),
        ("scales_by_column", c_int32),
        ("expert_tokens", Tensor),
        ("wait_cost", Tensor),
        ("completion", c_int),
        ("previous", c_void_p),
        ("stream", c_void_p),
        ("num_sms", c_int32),
    ]
    _defaults_ = {"max_tokens": 1, "num_experts": 1, "wire": DType.BF16}


class LlRecv(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("x", Tensor),
        ("scales", Tensor),
        ("count", Tensor),
        ("source_token", Tensor),
        ("source_range", Tensor),
        ("dropped", Tensor),
        ("handle", c_void_p),
        ("owner", c_void_p),
    ]


class LlCombineArgs(_Sized):
    _fields_ = [
        ("size", c_size_t),
        ("y", Tensor),
        ("topk_idx", Tensor),
        ("topk_weights", Tensor),
        ("handle", c_void_p),
        ("wire", c_int),
        ("out", Tensor),
        ("wait_cost", Tensor),
        ("completion", c_int),
        ("previous", c_void_p),
        ("stream", c_void_p),
        ("num_sms", c_int32),
    ]


#: C name of each structure, for the comparison with the headers.
STRUCTS = {
    "ep_tensor": Tensor,
    "ep_group_config": GroupConfig,
    "ep_buffer_config": BufferConfig,
    "ep_buffer_info": BufferInfo,
    "ep_trace_event": TraceEvent,
    "ep_normal_shape": NormalShape,
    "ep_normal_size": NormalSize,
    "ep_allocator": Allocator,
    "ep_dispatch_args": DispatchArgs,
    "ep_recv": Recv,
    "ep_handle_info": HandleInfo,
    "ep_combine_args": CombineArgs,
    "ep_dispatch_backward_args": DispatchBackwardArgs,
    "ep_combine_backward_args": CombineBackwardArgs,
    "ep_ll_shape": LlShape,
    "ep_ll_size": LlSize,
    "ep_ll_dispatch_args": LlDispatchArgs,
    "ep_ll_recv": LlRecv,
    "ep_ll_combine_args": LlCombineArgs,
}
for _mirror in STRUCTS.values():
    if issubclass(_mirror, _Sized):
        _mirror.fresh = functools.partial(_mirror.from_buffer_copy, bytes(_mirror()))

_TENSOR = POINTER(Tensor)
_OUT = POINTER(c_void_p)
_EVENT = c_void_p  # ep_event **, or NULL for a call that blocks

#: Functions of the library: result type and argument types.
FUNCTIONS: Dict[str, Tuple[Any, Tuple[Any, ...]]] = {
    "ep_version": (c_char_p, ()),
    "ep_status_string": (c_char_p, (c_int,)),
    "ep_last_error": (c_char_p, ()),
    "ep_dtype_size": (c_size_t, (c_int,)),
    "ep_dtype_string": (c_char_p, (c_int,)),
    "ep_group_create": (c_int, (POINTER(GroupConfig), _OUT)),
    "ep_group_destroy": (None, (c_void_p,)),
    "ep_group_rank": (c_int32, (c_void_p,)),
    "ep_group_num_ranks": (c_int32, (c_void_p,)),
    "ep_group_node": (c_int32, (c_void_p,)),
    "ep_group_num_nodes": (c_int32, (c_void_p,)),
    "ep_group_transport": (c_char_p, (c_void_p,)),
    "ep_group_timeout_ms": (c_int64, (c_void_p,)),
    "ep_group_set_timeout_ms": (c_int, (c_void_p, c_int64)),
    "ep_group_barrier": (c_int, (c_void_p,)),
    "ep_group_allgather": (c_int, (c_void_p, c_void_p, c_void_p, c_size_t)),
    "ep_group_mask": (c_int, (c_void_p, c_int32, c_int32)),
    "ep_group_clear_masks": (c_int, (c_void_p,)),
    "ep_group_query_masks": (c_int, (c_void_p, c_void_p)),
    "ep_group_query_late": (c_int, (c_void_p, c_void_p)),
    "ep_group_recover": (c_int, (c_void_p,)),
    "ep_group_readmit": (c_int, (c_void_p, c_int32)),
    "ep_thread_world_create": (c_int, (c_int32, _OUT)),
    "ep_thread_world_destroy": (None, (c_void_p,)),
    "ep_event_wait": (c_int, (c_void_p,)),
    "ep_event_wait_counts": (c_int, (c_void_p,)),
    "ep_event_query": (c_int, (c_void_p,)),
    "ep_event_stream_wait": (c_int, (c_void_p, c_void_p)),
    "ep_event_release": (None, (c_void_p,)),
    "ep_buffer_create": (c_int, (c_void_p, POINTER(BufferConfig), _OUT)),
    "ep_buffer_destroy": (None, (c_void_p,)),
    "ep_buffer_group": (c_void_p, (c_void_p,)),
    "ep_buffer_alloc": (c_int, (c_void_p, c_size_t, _OUT)),
    "ep_buffer_free": (c_int, (c_void_p, c_void_p)),
    "ep_buffer_query": (c_int, (c_void_p, POINTER(BufferInfo))),
    "ep_buffer_wait_cost": (c_int, (c_void_p, c_void_p, c_int32)),
    "ep_buffer_refuse": (c_int, (c_void_p, c_int, c_char_p)),
    "ep_buffer_wait_matrix": (c_int, (c_void_p, c_void_p, c_int32)),
    "ep_buffer_set_trace": (c_int, (c_void_p, TraceFn, c_void_p)),
    "ep_normal_size_query": (c_int, (POINTER(NormalShape), POINTER(NormalSize))),
    "ep_layout": (
        c_int,
        (_TENSOR, c_int64, c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "ep_layout_on_stream": (
        c_int,
        (_TENSOR, c_int64, c_void_p, c_int32, c_int32)
        + (c_void_p, c_void_p, c_void_p, c_void_p, c_void_p),
    ),
    "ep_dispatch": (c_int, (c_void_p, POINTER(DispatchArgs), POINTER(Recv), _EVENT)),
    "ep_recv_release": (None, (POINTER(Recv),)),
    "ep_handle_query": (c_int, (c_void_p, POINTER(HandleInfo))),
    "ep_handle_release": (None, (c_void_p,)),
    "ep_combine": (c_int, (c_void_p, POINTER(CombineArgs), _EVENT)),
    "ep_dispatch_backward": (c_int, (c_void_p, POINTER(DispatchBackwardArgs), _EVENT)),
    "ep_combine_backward": (
        c_int,
        (c_void_p, POINTER(CombineBackwardArgs), POINTER(Recv), _EVENT),
    ),
    "ep_ll_size_query": (c_int, (POINTER(LlShape), POINTER(LlSize))),
    "ep_ll_dispatch": (c_int, (c_void_p, POINTER(LlDispatchArgs), POINTER(LlRecv), _EVENT)),
    "ep_ll_recv_release": (None, (POINTER(LlRecv),)),
    "ep_ll_recv_retire": (None, (POINTER(LlRecv),)),
    "ep_ll_combine": (c_int, (c_void_p, POINTER(LlCombineArgs), _EVENT)),
    "ep_ll_combine_buffer": (c_int, (c_void_p, c_void_p, _TENSOR)),
    "ep_device_count": (c_int, (c_int, POINTER(c_int32))),
}
