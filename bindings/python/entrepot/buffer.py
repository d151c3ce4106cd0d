# SPDX-License-Identifier: MIT
"""Buffers: dispatch and combine of mixture-of-experts tokens."""

import ctypes
from ctypes import byref, c_void_p
from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

import numpy as np

from . import _abi
from ._abi import Call, CombineArgs, CombineBackwardArgs, DispatchArgs, DispatchBackwardArgs
from ._args import SCALES, choose, contiguous, expert_ranks, put_scales
from ._lib import check, lib, raise_status
from ._owner import Owner
from ._refusal import collective, refuse
from ._reuse import Reuse
from ._tensor import (
    CPU,
    CUDA,
    F32,
    NUMPY,
    TO_NUMPY,
    Kind,
    current_stream,
    describe,
    dtype_code,
    empty,
    empty_like,
    fill,
    kind_of,
    put,
    put_output,
    view,
)
from .event import Event
from .group import Group
from .low_latency import LowLatency
from .results import Handle, Made, Received, _Region, _release_recv

T = TypeVar("T")

_WIRES = {"input": 0, "fp8": 1}
_LAYOUTS = {"token": 0, "expert": 1}
_DEVICES = {"cpu": CPU, "cuda": CUDA}


class BufferInfo(NamedTuple):
    window_bytes: int  #: backed by memory now
    control_bytes: int  #: of them, for notifications and counts
    used_bytes: int  #: of them, held by live results, handles and alloc()
    peak_bytes: int  #: largest used + control so far
    num_calls: int  #: collective calls made so far


class TraceEvent(NamedTuple):
    """One phase of one call of one rank: work of its own, or a wait for peers."""

    rank: int
    call: int  #: its number on the buffer, the same on every rank
    name: str
    phase: str
    begin_ns: int  #: on the machine's monotonic clock
    end_ns: int


class Buffer(LowLatency):
    """This rank's window for received rows, and its view of the peers' windows.

    Making one, and each call but alloc() and query(), is collective: every rank
    makes the same calls in the same order. The interpreter lock is free while a
    call waits. Calls of several Python threads are carried out one at a time.

    Args:
        group: the ranks; kept alive.
        window_bytes: of the window, backed by memory at once; 0: as counts demand it.
        window_max_bytes: bound on its growth, the same on every rank; 0: 64 GiB.
        num_threads: threads that calls may use beside the caller's. With 0, asynchronous
            calls proceed inside Event.wait() and Event.done().
        max_experts: largest num_experts of later calls; 0: the library's default.
        verify: check every received row (slower).
        device: "cpu" or "cuda".
        device_index: which accelerator.
    """

    def __init__(
        self,
        group: Group,
        *,
        window_bytes: int = 0,
        window_max_bytes: int = 0,
        num_threads: int = 0,
        max_experts: int = 0,
        verify: bool = False,
        device: str = "cpu",
        device_index: int = 0,
    ):
        config = _abi.BufferConfig(
            window_bytes=window_bytes,
            window_max_bytes=window_max_bytes,
            num_threads=num_threads,
            max_experts=max_experts,
            verify=verify,
            device=choose(_DEVICES, "device", device),
            device_index=device_index,
        )
        pointer = c_void_p()
        with group._owner.lock:
            group.check(lib.ep_buffer_create(group.pointer, byref(config), byref(pointer)))
        assert pointer.value is not None
        self.group = group
        self._owner = Owner(pointer.value, lib.ep_buffer_destroy, group._owner)
        self.device = device
        self._reuse = Reuse(device_index)

    @property
    def pointer(self) -> int:
        """The ep_buffer; raises once the buffer was closed."""
        pointer = self._owner.pointer
        if pointer is None or self._owner.closing:
            raise ValueError("the buffer was closed")
        return pointer

    def _refuse(self, call: Call, made: int, error: Exception) -> None:
        refuse(self._owner, call, made, error)

    # ------------------------------------------------------------- dispatch

    @collective(Call.CALL_DISPATCH)
    def dispatch(self, x: Any, topk_idx: Any, topk_weights: Any = None, **options: Any) -> Received:
        """Sends each token's row to the ranks of its experts; receives this rank's rows.

        Args:
            x: [T, H] bfloat16, float16, float32, or float8_e4m3fn with `scales`; H % 8 == 0.
            topk_idx: [T, K] int32 or int64 expert ids; -1: no expert.
            topk_weights: [T, K] float32, travels along.
            num_experts: E, required.
            scales: of a float8 x: [T, ceil(H/128)] float32, or [T, ceil(H/512)] int32 holding
                four exponent bytes each; any strides.
            expert_rank: [E] int32 rank of each expert; None: equal blocks.
            wire: "input": rows travel as given; "fp8": quantised to float8 while they are sent.
            scale: form of the scales made for wire="fp8": "f32", "pow2" or "ue8m0".
            layout: "token": one row per (token, rank), by source rank, then token;
                "expert": one row per (token, local expert), grouped by expert.
            expert_alignment: tokens_per_expert, and with layout="expert" the groups, are
                rounded up to it.
            num_worst_tokens: results have exactly that many rows; CapacityError if more come.
            previous: an Event to be done before any tensor is touched.
            stream: of the device; None: torch's current one.
            num_sms: SMs that the call may use; 0: the library's choice. CUDA only.
        """
        return self._dispatch(x, topk_idx, topk_weights, False, **options)

    @collective(Call.CALL_DISPATCH)
    def dispatch_async(
        self, x: Any, topk_idx: Any, topk_weights: Any = None, **options: Any
    ) -> "Event[Received]":
        """dispatch() that returns at once; inputs must stay unchanged until the event is done."""
        return self._dispatch(x, topk_idx, topk_weights, True, **options)

    def _dispatch(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any,
        background: bool,
        *,
        num_experts: int,
        scales: Any = None,
        expert_rank: Any = None,
        wire: str = "input",
        scale: str = "f32",
        layout: str = "token",
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        previous: Optional[Event] = None,
        stream: Optional[int] = None,
        num_sms: int = 0,
        kind: Optional[Kind] = None,
    ) -> Any:
        args = DispatchArgs.fresh()
        keep = [previous]
        put(args, DispatchArgs.x, x, keep)
        if scales is not None:
            put_scales(args, DispatchArgs.scales, scales, keep)
        shape = put(args, DispatchArgs.topk_idx, topk_idx, keep)
        if topk_weights is not None:
            put(args, DispatchArgs.topk_weights, topk_weights, keep)
        args.num_experts = num_experts
        if expert_rank is not None:
            args.expert_rank = expert_ranks(expert_rank, num_experts, keep)
        if wire != "input" or scale != "f32":
            args.wire = choose(_WIRES, "wire", wire)
            args.scale = choose(SCALES, "scale", scale)
        by_expert = layout != "token" and choose(_LAYOUTS, "layout", layout) == 1
        if by_expert:
            args.layout = 1
        if expert_alignment != 1:
            args.expert_alignment = expert_alignment
        if num_worst_tokens:
            args.num_worst_tokens = num_worst_tokens
        shape = shape or (0,)  # one that is wrong is the library's to refuse
        made = (shape[0], shape[-1], by_expert)
        return self._receive(
            lib.ep_dispatch,
            args,
            kind or kind_of(x),
            None,
            made,
            previous,
            stream,
            keep,
            background,
            num_sms,
        )

    @collective(Call.CALL_DISPATCH)
    def dispatch_cached(self, x: Any, handle: Handle, **options: Any) -> Received:
        """dispatch() with the layout of an earlier one: only rows travel.

        Args: x, scales, wire, scale, previous, stream, num_sms as in dispatch().
        """
        return self._dispatch_cached(x, handle, False, **options)

    @collective(Call.CALL_DISPATCH)
    def dispatch_cached_async(self, x: Any, handle: Handle, **options: Any) -> "Event[Received]":
        """dispatch_cached() that returns at once."""
        return self._dispatch_cached(x, handle, True, **options)

    def _dispatch_cached(
        self,
        x: Any,
        handle: Handle,
        background: bool,
        *,
        scales: Any = None,
        wire: str = "input",
        scale: str = "f32",
        previous: Optional[Event] = None,
        stream: Optional[int] = None,
        num_sms: int = 0,
        kind: Optional[Kind] = None,
    ) -> Any:
        args = DispatchArgs.fresh()
        keep = [previous, handle]
        put(args, DispatchArgs.x, x, keep)
        if scales is not None:
            put_scales(args, DispatchArgs.scales, scales, keep)
        if wire != "input" or scale != "f32":
            args.wire = choose(_WIRES, "wire", wire)
            args.scale = choose(SCALES, "scale", scale)
        args.handle = handle.pointer
        return self._receive(
            lib.ep_dispatch,
            args,
            kind or kind_of(x),
            handle,
            None,
            previous,
            stream,
            keep,
            background,
            num_sms,
        )

    def _receive(
        self,
        function: Any,
        args: Any,
        kind: Kind,
        handle: Optional[Handle],
        made: Optional[Made],
        previous: Optional[Event],
        stream: Optional[int],
        keep: List[Any],
        background: bool,
        num_sms: int = 0,
    ) -> Any:
        recv = _abi.Recv.fresh()
        self._order(args, kind, previous, stream, num_sms)
        owner = self._owner
        given_up = self._reuse.give_up if kind.device == CUDA and kind.torch else None

        # Owns what the call fills, also where Ctrl-C ends it.
        region = _Region(owner, recv, _release_recv, given_up)

        def finish() -> Received:
            return Received(region, kind, handle, made)

        if background:
            return self._begin(function, (byref(args), byref(recv)), finish, keep)
        with owner.lock:  # also for what is made of it, before another thread closes the buffer
            owner.calls += 1
            status = function(self.pointer, args, recv, None)
            if status:
                raise_status(status)
            received = Received(region, kind, handle, made)
        if owner.left:
            owner.tidy()
        return received

    def _order(
        self,
        args: Any,
        kind: Kind,
        previous: Optional[Event],
        stream: Optional[int],
        num_sms: int = 0,
    ) -> None:
        """When and where the call may run: after `previous`, and in the order of a stream."""
        if previous is not None:
            args.previous = previous.pointer
        if kind.device == CUDA:
            if kind.torch:
                if stream is None:
                    stream = current_stream(kind.device_index)
                self._reuse.enter(stream)
            args.stream = stream
            if num_sms:
                args.num_sms = num_sms

    def _now(self, function: Any, *arguments: Any, finish: Any = None) -> Any:
        """Makes a call that is done, or in its stream, when it returns. `finish` makes its
        result, before another thread can close the buffer."""
        owner, result = self._owner, None
        if owner.left:
            owner.tidy()
        with owner.lock:
            if owner.pointer is None or owner.closing:
                raise ValueError("the buffer was closed")
            owner.calls += 1
            status = function(owner.pointer, *arguments, None)
            if status:
                raise_status(status)
            if finish is not None:
                result = finish()
        if owner.left:
            owner.tidy()
        return result

    def _begin(
        self,
        function: Any,
        arguments: Tuple[Any, ...],
        finish: Callable[[], T],
        keep: List[Any],
        early: bool = False,
    ) -> "Event[T]":
        """Begins a call and returns its event. `early`: the outputs are known before it is done."""
        owner, event = self._owner, c_void_p()
        result: "Event[T]" = Event(owner, finish, (keep, arguments), early)
        with owner.lock:
            owner.calls += 1
            try:
                status = function(self.pointer, *arguments, byref(event))
            finally:  # also where Ctrl-C ends the call
                result._begun(event.value)
            if status:
                raise_status(status)
        if owner.left:
            owner.tidy()
        return result

    # -------------------------------------------------------------- combine

    @collective(Call.CALL_COMBINE)
    def combine(
        self, y: Any, handle: Handle, topk_weights: Any = None, **options: Any
    ) -> Tuple[Any, Any]:
        """Brings expert outputs back: out[t] = sum of the rows of token t, in float32.

        Args:
            y: [rows, H] bfloat16, float16 or float32, rows as received.
            handle: of the dispatch whose rows these are.
            topk_weights: rows by token: [rows, K] float32, summed along over ranks; rows by
                expert: [T, K] float32 applied to the rows.
            bias: up to two [T, H] of y's dtype, added in float32.
            out: [T, H] of y's dtype; None: a new one.
            previous, stream, num_sms: as in dispatch().

        Returns: out, and [T, K] summed weights where rows are by token and weights are given,
            else None.
        """
        return self._combine(y, handle, topk_weights, False, **options)

    @collective(Call.CALL_COMBINE)
    def combine_async(
        self, y: Any, handle: Handle, topk_weights: Any = None, **options: Any
    ) -> "Event[Tuple[Any, Any]]":
        """combine() that returns at once; y must stay unchanged until the event is done."""
        return self._combine(y, handle, topk_weights, True, **options)

    def _combine(
        self,
        y: Any,
        handle: Handle,
        topk_weights: Any,
        background: bool,
        *,
        bias: Sequence[Any] = (),
        out: Any = None,
        previous: Optional[Event] = None,
        stream: Optional[int] = None,
        num_sms: int = 0,
        kind: Optional[Kind] = None,
    ) -> Any:
        args = CombineArgs.fresh()
        keep = [previous, handle]
        rows = put(args, CombineArgs.y, y, keep)
        kind = kind or kind_of(y)
        if len(bias) > 2:
            raise ValueError(f"bias: {len(bias)} tensors; at most 2 are possible")
        for i, b in enumerate(bias):
            fill(args, CombineArgs.bias.offset + i * _TENSOR_BYTES, describe(b, "bias"))
            keep.append(b)
        if out is None:
            out = empty_like(y, (handle.num_tokens, *rows[1:]), args.y.dtype, kind)
        put_output(args, CombineArgs.out, out, keep, "out")
        out_weights = None
        if topk_weights is not None:
            weights = put(args, CombineArgs.topk_weights, topk_weights, keep)
            if not handle.by_expert:
                out_weights = empty_like(
                    topk_weights, (handle.num_tokens, *weights[1:]), F32, kind
                )
                put(args, CombineArgs.out_weights, out_weights, keep)
        args.handle = handle.pointer
        self._order(args, kind, previous, stream, num_sms)
        if not background:
            self._now(lib.ep_combine, args)
            return out, out_weights
        return self._begin(lib.ep_combine, (byref(args),), lambda: (out, out_weights), keep, True)

    # ------------------------------------------------------------- backward

    @collective(Call.CALL_DISPATCH_BACKWARD)
    def dispatch_backward(
        self, grad_recv_x: Any, handle: Handle, grad_recv_weights: Any = None
    ) -> Tuple[Any, Any]:
        """Gradients of dispatch: of x, and of topk_weights where grad_recv_weights is given."""
        args = DispatchBackwardArgs.fresh()
        keep: List[Any] = [handle]
        rows = put(args, DispatchBackwardArgs.grad_recv_x, grad_recv_x, keep)
        kind = kind_of(grad_recv_x)
        grad_x = empty((handle.num_tokens, *rows[1:]), args.grad_recv_x.dtype, kind)
        put(args, DispatchBackwardArgs.grad_x, grad_x, keep)
        grad_weights = None
        if grad_recv_weights is not None:
            put(args, DispatchBackwardArgs.grad_recv_weights, grad_recv_weights, keep)
            grad_weights = empty((handle.num_tokens, handle.topk), F32, kind)
            put(args, DispatchBackwardArgs.grad_topk_weights, grad_weights, keep)
        args.handle = handle.pointer
        self._order(args, kind, None, None)
        self._now(lib.ep_dispatch_backward, args)
        return grad_x, grad_weights

    @collective(Call.CALL_COMBINE_BACKWARD)
    def combine_backward(
        self, grad_out: Any, handle: Handle, y: Any = None, topk_weights: Any = None
    ) -> Tuple[Any, Any]:
        """Gradients of combine: of the rows, and, with rows by expert and `y` given, of
        topk_weights."""
        args = CombineBackwardArgs.fresh()
        keep: List[Any] = [handle]
        put(args, CombineBackwardArgs.grad_out, grad_out, keep)
        kind = kind_of(grad_out)
        grad_weights = None
        if topk_weights is not None:
            put(args, CombineBackwardArgs.topk_weights, topk_weights, keep)
        if y is not None:
            put(args, CombineBackwardArgs.y, y, keep)
            grad_weights = empty((handle.num_tokens, handle.topk), F32, kind)
            put(args, CombineBackwardArgs.grad_topk_weights, grad_weights, keep)
        args.handle = handle.pointer
        received = self._receive(
            lib.ep_combine_backward, args, kind, handle, None, None, None, keep, False
        )
        return received.x, grad_weights

    # --------------------------------------------------------------- memory

    def alloc(self, shape: Sequence[int], dtype: Any, like: Any = None) -> Any:
        """An array in this rank's window: expert outputs written there are combined without a
        copy. A torch tensor if `like` is one, else a NumPy array. Local; contents undefined."""
        kind = NUMPY if like is None else kind_of(like)
        return self._alloc(tuple(shape), dtype_code(dtype), kind)

    def _alloc(self, shape: Tuple[int, ...], dtype: int, kind: Kind) -> Any:
        size = TO_NUMPY[dtype].itemsize
        for n in shape:
            size *= n
        if size == 0:
            return empty(shape, dtype, kind)
        memory = c_void_p()
        with self._owner.lock:
            check(lib.ep_buffer_alloc(self.pointer, size, byref(memory)))
        assert memory.value is not None
        return view(
            contiguous(memory.value, shape, dtype, kind),
            kind,
            _Allocation(self._owner, memory.value),
        )

    def query(self) -> BufferInfo:
        """Memory of the window, and calls made. Local."""
        info = _abi.BufferInfo()
        with self._owner.lock:
            check(lib.ep_buffer_query(self.pointer, byref(info)))
        return BufferInfo(*(getattr(info, name) for name in BufferInfo._fields))

    # ------------------------------------------------------------ diagnosis

    def wait_cost(self, reset: bool = False) -> np.ndarray:
        """[R] int64 nanoseconds that this rank's calls waited for each rank since the last
        reset. Local."""
        cost = np.zeros(self.group.size, np.int64)
        with self._owner.lock:
            check(lib.ep_buffer_wait_cost(self.pointer, cost.ctypes.data, reset))
        return cost

    def wait_matrix(self, reset: bool = False) -> np.ndarray:
        """[R, R] int64 nanoseconds that rank i waited for rank j. Collective."""
        cost = np.zeros((self.group.size, self.group.size), np.int64)
        with self._owner.lock:
            check(lib.ep_buffer_wait_matrix(self.pointer, cost.ctypes.data, reset))
        return cost

    def set_trace(self, trace: Optional[Callable[[TraceEvent], None]]) -> None:
        """Has `trace` called after every phase of this rank's calls, by the thread that runs the
        call; None ends that. Exceptions in it are printed and otherwise ignored."""

        def call(_context: Any, event: Any) -> None:
            e = event.contents
            trace(  # type: ignore[misc]
                TraceEvent(e.rank, e.call, e.name.decode(), e.phase.decode(), e.begin_ns, e.end_ns)
            )

        function = _abi.TraceFn(call) if trace is not None else _abi.TraceFn()
        with self._owner.lock:
            check(lib.ep_buffer_set_trace(self.pointer, function, None))
            self._owner.keep = function  # lives as long as it may be called

    def close(self) -> None:
        """Frees the window once the last array in it is gone. Waits for no other rank."""
        self._owner.close()

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self._owner.close()

    def __enter__(self) -> "Buffer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


_TENSOR_BYTES = ctypes.sizeof(_abi.Tensor)


class _Allocation:
    """Memory of ep_buffer_alloc; given back with the last view of it."""

    def __init__(self, owner: Owner, pointer: int):
        self._owner, self._pointer = owner, pointer
        owner.adopt()

    def __del__(self) -> None:
        self._owner.release(_free, (self._owner, self._pointer))


def _free(allocation: Tuple[Owner, int]) -> None:
    owner, pointer = allocation
    lib.ep_buffer_free(owner.pointer, pointer)
