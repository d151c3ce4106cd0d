# SPDX-License-Identifier: MIT
"""What calls return: handles, received rows, received low-latency batches."""

import ctypes
from ctypes import byref
from typing import Any, Callable, List, Optional, Tuple

import numpy as np

from . import _abi
from ._abi import TENSOR_PACK, DType
from ._lib import check, lib
from ._owner import Owner
from ._tensor import CPU, NUMPY, Kind, view, view_at

_I32 = int(DType.I32)


#: Of the dispatch that made a handle: num_tokens, topk, by_expert.
Made = Tuple[int, int, bool]


class Handle:
    """What a dispatch settled: for combine, cached dispatch and backward.

    Its arrays are NumPy views of host memory that live as long as the handle.
    """

    __slots__ = (
        "_owner",
        "pointer",
        "rows",
        "num_tokens",
        "topk",
        "by_expert",
        "_info",
        "__weakref__",
    )

    def __init__(self, owner: Owner, pointer: int, rows: int, made: Made):
        self._owner = owner
        owner.adopt()
        self.pointer: Optional[int] = pointer
        #: rows of the result, unused ones of worst-case mode and padding included
        self.rows = rows
        # Known without asking the library, which may have to wait for a device.
        self.num_tokens, self.topk, self.by_expert = made
        self._info: Optional[_abi.HandleInfo] = None

    @property
    def info(self) -> _abi.HandleInfo:
        """The ep_handle_info."""
        if self._info is None:
            info = _abi.HandleInfo()
            check(lib.ep_handle_query(self.pointer, byref(info)))
            self._info = info
        return self._info

    @property
    def num_rows(self) -> int:
        """Rows this rank received."""
        return self.info.num_rows

    @property
    def num_experts(self) -> int:
        return self.info.num_experts

    def _array(self, pointer: Optional[int], *shape: int) -> np.ndarray:
        tensor = _abi.Tensor(data=pointer, dtype=_I32, ndim=len(shape))
        step = 1
        for i in reversed(range(len(shape))):
            tensor.shape[i], tensor.stride[i] = shape[i], step
            step *= shape[i]
        return view(tensor, NUMPY, self)

    @property
    def rows_between(self) -> np.ndarray:
        """[R, R] int32: rows that rank i sent to rank j."""
        info = self.info
        return self._array(info.rows_between, info.num_ranks, info.num_ranks)

    @property
    def send_rank(self) -> np.ndarray:
        """[T, K] int32 where each token's rows went, -1: nowhere. By token: its ranks ascending,
        then -1; by expert: by top-k place."""
        info = self.info
        return self._array(info.send_rank, self.num_tokens, self.topk)

    @property
    def send_row(self) -> np.ndarray:
        """[T, K] int32 the row there, beside send_rank."""
        info = self.info
        return self._array(info.send_row, self.num_tokens, self.topk)

    @property
    def source_token(self) -> np.ndarray:
        """[rows] int32 index of each row's token at its source."""
        return self._array(self.info.source_token, self.rows)

    # The default is there even where the interpreter ends and this module is gone.
    def __del__(self, release: Any = lib.ep_handle_release) -> None:
        pointer, self.pointer = self.pointer, None
        if pointer:
            self._owner.release(release, pointer)


_X = _abi.Recv.x.offset
_IDX, _WEIGHTS = _abi.Recv.topk_idx.offset, _abi.Recv.topk_weights.offset


class _Region:
    """Memory of one result; given back when the last view of it is gone."""

    __slots__ = ("_owner", "recv", "_before", "_release")

    def __init__(
        self,
        owner: Owner,
        recv: Any,
        release: Callable[[Any], None],
        before: Optional[Callable[[], None]] = None,
    ):
        self._owner = owner
        owner.adopt()
        self.recv = recv
        self._before = before
        self._release = release

    def __del__(self) -> None:
        if self._before is not None:
            self._before()
        self._owner.release(self._release, self.recv)


class _Field:
    """A tensor of a result, made when it is first looked at."""

    def __init__(self, field: Any, doc: str):
        self._offset = field.offset
        self.__doc__ = doc

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, _: Optional[type] = None) -> Any:
        if instance is None:
            return self
        region = instance._region
        value = view_at(region.recv, self._offset, instance._kind, region)
        instance.__dict__[self._name] = value
        return value


# The defaults are there even where the interpreter ends and this module is gone.
def _release_recv(
    recv: Any, release: Any = lib.ep_recv_release, release_handle: Any = lib.ep_handle_release
) -> None:
    release(recv)
    pointer, recv.handle = recv.handle, None  # there where no result took it
    if pointer:
        release_handle(pointer)


class Received:
    """What a rank received from a dispatch.

    The arrays are views of the rank's window, of the same library as the
    input; the memory is given back when the last of them is gone.
    """

    x = _Field(_abi.Recv.x, "[rows, H] received rows")
    scales = _Field(
        _abi.Recv.scales,
        "[rows, ceil(H/128)] float32, or [rows, ceil(H/512)] int32 of four exponents",
    )
    topk_idx = _Field(
        _abi.Recv.topk_idx, "[rows, K] local expert ids, -1 where the expert is elsewhere"
    )
    topk_weights = _Field(_abi.Recv.topk_weights, "[rows, K] float32, 0 where topk_idx is -1")
    source_token = _Field(_abi.Recv.source_token, "[rows] int32 index of the token at its source")
    source_offset = _Field(_abi.Recv.source_offset, "[R + 1] int32 first row of each source rank")
    expert_offset = _Field(
        _abi.Recv.expert_offset,
        "[L + 1] int32 first row of each expert's group, rows by expert only",
    )

    def __init__(
        self,
        region: _Region,
        kind: Kind,
        handle: Optional[Handle],
        made: Optional[Made],
    ):
        self._region, owner, recv = region, region._owner, region.recv
        self._kind = kind
        if handle is None and made is not None:
            rows = TENSOR_PACK.unpack_from(recv, _X)[3]  # sooner than by the structure's fields
            handle = Handle(owner, recv.handle, rows, made)
            recv.handle = None
        self.handle: Any = handle  #: for combine, cached dispatch and backward
        #: rows that hold a token
        self.num_rows: int = recv.num_rows

    def main_tensors(self) -> Tuple[Any, Any, Any]:
        """x, topk_idx and topk_weights, sooner than one by one."""
        region, kind = self._region, self._kind
        recv = region.recv
        return (
            view_at(recv, _X, kind, region),
            view_at(recv, _IDX, kind, region),
            view_at(recv, _WEIGHTS, kind, region),
        )

    @property
    def tokens_per_expert(self) -> List[int]:
        """Rows of each local expert, rounded up to the alignment."""
        recv, offset = self._region.recv, _abi.Recv.tokens_per_expert.offset
        fields = TENSOR_PACK.unpack_from(recv, offset)
        count = fields[3]  # 0 where it is not given
        on_host = recv.host_tokens_per_expert
        if on_host:
            return host_list(on_host, count)
        if fields[11] == CPU:
            return host_list(fields[0], count)
        return view_at(recv, offset, self._kind, self._region).tolist()


def host_list(pointer: int, count: int) -> List[int]:
    """int32 values in host memory."""
    return (ctypes.c_int32 * count).from_address(pointer)[:] if count else []


class LlReceived:
    """A received low-latency batch: views of memory that serves the next call but one."""

    x = _Field(_abi.LlRecv.x, "[L, S, H]; the first count[l] rows of expert l hold tokens")
    scales = _Field(
        _abi.LlRecv.scales,
        "[L, S, ceil(H/128)] float32, or [L, S, ceil(H/512)] int32 of four exponents",
    )
    count = _Field(_abi.LlRecv.count, "[L] int32 rows of each local expert")
    source_token = _Field(_abi.LlRecv.source_token, "[L, S] int32 token index at its source")
    source_range = _Field(
        _abi.LlRecv.source_range, "[L, R] int64 first row << 32 | rows, of each source rank"
    )
    dropped = _Field(_abi.LlRecv.dropped, "[L] int32 rows dropped")

    @staticmethod
    def region_of(owner: Owner, recv: _abi.LlRecv) -> _Region:
        """Owns what a call fills, also where nobody takes it."""
        return _Region(owner, recv, lib.ep_ll_recv_release)

    def __init__(self, region: _Region, kind: Kind):
        self._region = region
        self._owner = region._owner
        self._kind = kind
        self.handle: Optional[int] = region.recv.handle

    def retire(self) -> None:
        """Lets the next call but one use the memory, although arrays of it may still be held:
        they then show rows of other calls. The result can no longer be combined."""
        if self.handle is not None:
            self.handle = None
            with self._owner.lock:
                lib.ep_ll_recv_retire(self._region.recv)

    def copy_from(self, other: "LlReceived") -> None:
        """Makes this result's tensors show what another of the same shape received."""
        counts = other.count.tolist()
        for name in ("count", "source_range", "dropped"):
            getattr(self, name)[...] = getattr(other, name)
        for name in ("x", "scales", "source_token"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine is not None:
                for expert, rows in enumerate(counts):
                    mine[expert, :rows] = theirs[expert, :rows]
