# SPDX-License-Identifier: MIT
"""What calls return: handles, received rows, received low-latency batches."""

import ctypes
from ctypes import byref
from typing import Any, Callable, List, NamedTuple, Optional

import numpy as np

from . import _abi
from ._abi import DType
from ._lib import check, lib
from ._owner import Owner
from ._tensor import CPU, NUMPY, Kind, view

_I32 = int(DType.I32)


class Made(NamedTuple):
    """Of the dispatch that made a handle."""

    num_tokens: int
    topk: int
    by_expert: bool


class Handle:
    """What a dispatch settled: for combine, cached dispatch and backward.

    Its arrays are NumPy views of host memory that live as long as the handle.
    """

    def __init__(self, owner: Owner, pointer: int, rows: int, made: "Made"):
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

    def __del__(self) -> None:
        pointer, self.pointer = self.pointer, None
        if pointer:
            self._owner.release(lib.ep_handle_release, pointer)


class _Region:
    """Memory of one result; given back when the last view of it is gone."""

    def __init__(self, owner: Owner, recv: Any, release: Callable[[Any], None]):
        self._owner = owner
        owner.adopt()
        self.recv = recv
        self.before: Optional[Callable[[], None]] = None
        self._release: Optional[Callable[[Any], None]] = release

    def release(self) -> None:
        release, self._release = self._release, None
        if release is not None:
            if self.before is not None:
                self.before()
            self._owner.release(release, self.recv)

    def __del__(self) -> None:
        self.release()


def _release_recv(recv: _abi.Recv) -> None:
    lib.ep_recv_release(byref(recv))


def _release_ll_recv(recv: _abi.LlRecv) -> None:
    lib.ep_ll_recv_release(byref(recv))


class _Field:
    """A tensor of a result, made when it is first looked at."""

    def __init__(self, doc: str):
        self.__doc__ = doc

    def __set_name__(self, _: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, _: Optional[type] = None) -> Any:
        if instance is None:
            return self
        region = instance._region
        value = view(getattr(region.recv, self._name), instance._kind, region)
        instance.__dict__[self._name] = value
        return value


class Received:
    """What a rank received from a dispatch.

    The arrays are views of the rank's window, of the same library as the
    input; the memory is given back when the last of them is gone.
    """

    x = _Field("[rows, H] received rows")
    scales = _Field("[rows, ceil(H/128)] float32, or [rows, ceil(H/512)] int32 of four exponents")
    topk_idx = _Field("[rows, K] local expert ids, -1 where the expert is elsewhere")
    topk_weights = _Field("[rows, K] float32, 0 where topk_idx is -1")
    source_token = _Field("[rows] int32 index of the token at its source")
    source_offset = _Field("[R + 1] int32 first row of each source rank")
    expert_offset = _Field("[L + 1] int32 first row of each expert's group, rows by expert only")

    def __init__(
        self,
        owner: Owner,
        recv: _abi.Recv,
        kind: Kind,
        handle: Optional[Handle],
        made: Optional[Made],
    ):
        self._region = _Region(owner, recv, _release_recv)
        self._kind = kind
        if handle is None and made is not None:
            handle = Handle(owner, recv.handle, recv.x.shape[0], made)
        self.handle: Any = handle  #: for combine, cached dispatch and backward
        #: rows that hold a token
        self.num_rows: int = recv.num_rows

    def before_release(self, function: Callable[[], None]) -> None:
        """Has a function called when the memory is given back."""
        self._region.before = function

    @property
    def tokens_per_expert(self) -> List[int]:
        """Rows of each local expert, rounded up to the alignment."""
        recv = self._region.recv
        tokens = recv.tokens_per_expert
        count = tokens.shape[0] if tokens.ndim else 0
        if recv.host_tokens_per_expert:
            return host_list(recv.host_tokens_per_expert, count)
        if tokens.device == CPU:
            return host_list(tokens.data, count)
        return view(tokens, self._kind, self._region).tolist()


def host_list(pointer: int, count: int) -> List[int]:
    """int32 values in host memory."""
    return (ctypes.c_int32 * count).from_address(pointer)[:] if count else []


class LlReceived:
    """A received low-latency batch: views of memory that serves the next call but one."""

    x = _Field("[L, S, H]; the first count[l] rows of expert l hold tokens")
    scales = _Field("[L, S, ceil(H/128)] float32, or [L, S, ceil(H/512)] int32 of four exponents")
    count = _Field("[L] int32 rows of each local expert")
    source_token = _Field("[L, S] int32 token index at its source")
    source_range = _Field("[L, R] int64 first row << 32 | rows, of each source rank")
    dropped = _Field("[L] int32 rows dropped")

    def __init__(self, owner: Owner, recv: _abi.LlRecv, kind: Kind):
        self._region = _Region(owner, recv, _release_ll_recv)
        self._owner = owner
        self._kind = kind
        self.handle: Optional[int] = recv.handle

    def retire(self) -> None:
        """Lets the next call but one use the memory, although arrays of it may still be held:
        they then show rows of other calls. The result can no longer be combined."""
        if self.handle is not None:
            self.handle = None
            with self._owner.lock:
                lib.ep_ll_recv_retire(byref(self._region.recv))

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
