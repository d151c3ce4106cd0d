# SPDX-License-Identifier: MIT
"""Low latency: dispatch and combine for decode, one to a few hundred tokens a rank."""

from ctypes import byref
from typing import Any, Callable, List, Optional

from . import _abi
from ._abi import Call, LlCombineArgs, LlDispatchArgs
from ._args import SCALES, choose, expert_ranks
from ._lib import check, lib
from ._owner import Owner
from ._refusal import collective
from ._tensor import BF16, CUDA, E4M3, Kind, empty_like, kind_of, put, put_output, view
from .event import Event
from .results import LlReceived

_LL_WIRES = {"bf16": BF16, "fp8": E4M3}
_OVERFLOWS = {"error": 0, "drop": 1}
_COMBINE_WIRES = {"bf16": 0, "logfmt10": 1}
#: How a call completes: at once, on the buffer's threads, or when its event is waited for.
_COMPLETIONS = {"now": None, "background": 0, "hook": 1}


class LowLatency:
    """The low-latency calls of a Buffer."""

    _owner: Owner
    _order: Callable[..., None]
    _now: Callable[..., Any]
    _begin: Callable[..., Any]

    @property
    def pointer(self) -> int:
        raise NotImplementedError  # Buffer has it

    @collective(Call.CALL_LL_DISPATCH)
    def ll_dispatch(self, x: Any, topk_idx: Any, **options: Any) -> LlReceived:
        """Sends every (token, expert) pair as one row and receives this rank's.

        Two results may be alive at once. The first call with a shape sets memory up
        and so waits for every rank.

        Args:
            x: [T, H] bfloat16, T <= max_tokens.
            topk_idx: [T, K] int32 or int64; -1: no expert.
            max_tokens: M, the same on every rank; required.
            num_experts: E; required.
            expert_rank: [E] int32 or None, as in dispatch().
            max_expert_rows: rows that a local expert has room for; 0: R * M.
            overflow: "error" or "drop", when more come.
            wire: "bf16", or "fp8": quantised per 128 channels.
            scale: "f32", "pow2" or "ue8m0" when wire is "fp8".
            scales_by_column: scales in memory as [L, channels / 128, S].
            expert_tokens: [L] int32; rows received are added.
            wait_cost: [R] int64; nanoseconds spent waiting for each source are added.
            previous, stream: as in dispatch().
        """
        return self._ll_dispatch(x, topk_idx, "now", **options)

    @collective(Call.CALL_LL_DISPATCH)
    def ll_dispatch_async(self, x: Any, topk_idx: Any, **options: Any) -> "Event[LlReceived]":
        """ll_dispatch() that goes on in the background."""
        return self._ll_dispatch(x, topk_idx, "background", **options)

    @collective(Call.CALL_LL_DISPATCH)
    def ll_dispatch_hook(self, x: Any, topk_idx: Any, **options: Any) -> "Event[LlReceived]":
        """ll_dispatch() that only sends: waiting for the event receives. Between the two no
        thread of the library runs."""
        return self._ll_dispatch(x, topk_idx, "hook", **options)

    def _ll_dispatch(
        self,
        x: Any,
        topk_idx: Any,
        completion: str,
        *,
        max_tokens: int,
        num_experts: int,
        expert_rank: Any = None,
        max_expert_rows: int = 0,
        overflow: str = "error",
        wire: str = "bf16",
        scale: str = "f32",
        scales_by_column: bool = False,
        expert_tokens: Any = None,
        wait_cost: Any = None,
        previous: Optional[Event] = None,
        stream: Optional[int] = None,
        kind: Optional[Kind] = None,
    ) -> Any:
        args = LlDispatchArgs.fresh()
        keep: List[Any] = [previous]
        put(args, LlDispatchArgs.x, x, keep)
        put(args, LlDispatchArgs.topk_idx, topk_idx, keep)
        args.max_tokens = max_tokens
        args.num_experts = num_experts
        if expert_rank is not None:
            args.expert_rank = expert_ranks(expert_rank, num_experts, keep)
        if max_expert_rows:
            args.max_expert_rows = max_expert_rows
        if overflow != "error":
            args.overflow = choose(_OVERFLOWS, "overflow", overflow)
        if wire != "bf16":
            args.wire = choose(_LL_WIRES, "wire", wire)
        if scale != "f32":
            args.scale = choose(SCALES, "scale", scale)
        if scales_by_column:
            args.scales_by_column = 1
        if expert_tokens is not None:
            put_output(args, LlDispatchArgs.expert_tokens, expert_tokens, keep, "expert_tokens")
        if wait_cost is not None:
            put_output(args, LlDispatchArgs.wait_cost, wait_cost, keep, "wait_cost")
        mode = _COMPLETIONS[completion]
        if mode:
            args.completion = mode
        kind = kind or kind_of(x)
        self._order(args, kind, previous, stream)
        recv = _abi.LlRecv.fresh()
        region = LlReceived.region_of(self._owner, recv)

        def finish() -> LlReceived:
            return LlReceived(region, kind)

        if mode is None:
            return self._now(lib.ep_ll_dispatch, args, recv, finish=finish)
        early = completion == "hook" or kind.device == CUDA
        event = self._begin(lib.ep_ll_dispatch, (byref(args), byref(recv)), finish, keep, early)
        if early and not recv.handle:  # it failed while it sent, and has no outputs to give out
            event.wait()
        return event

    @collective(Call.CALL_LL_COMBINE)
    def ll_combine(
        self, y: Any, topk_idx: Any, topk_weights: Any, received: LlReceived, **options: Any
    ) -> Any:
        """out[t] = sum over k of weight[t, k] * row of (t, k), in float32, in top-k order.

        Args:
            y: [L, S, H] bfloat16 expert outputs, rows as received; ll_combine_buffer() is read
                in place.
            topk_idx, topk_weights: [T, K]; ids as in ll_dispatch(), float32 weights.
            received: result of the ll_dispatch() whose rows these are.
            wire: "bf16", or "logfmt10": 10 bits an element where the range allows it.
            out: [T, H] bfloat16; None: a new one.
            wait_cost, previous, stream: as in ll_dispatch().

        Returns: out.
        """
        return self._ll_combine(y, topk_idx, topk_weights, received, "now", **options)

    @collective(Call.CALL_LL_COMBINE)
    def ll_combine_async(
        self, y: Any, topk_idx: Any, topk_weights: Any, received: LlReceived, **options: Any
    ) -> "Event[Any]":
        """ll_combine() that goes on in the background."""
        return self._ll_combine(y, topk_idx, topk_weights, received, "background", **options)

    @collective(Call.CALL_LL_COMBINE)
    def ll_combine_hook(
        self, y: Any, topk_idx: Any, topk_weights: Any, received: LlReceived, **options: Any
    ) -> "Event[Any]":
        """ll_combine() that only sends; waiting for the event receives."""
        return self._ll_combine(y, topk_idx, topk_weights, received, "hook", **options)

    def _ll_combine(
        self,
        y: Any,
        topk_idx: Any,
        topk_weights: Any,
        received: LlReceived,
        completion: str,
        *,
        wire: str = "bf16",
        out: Any = None,
        wait_cost: Any = None,
        previous: Optional[Event] = None,
        stream: Optional[int] = None,
        kind: Optional[Kind] = None,
    ) -> Any:
        args = LlCombineArgs.fresh()
        keep: List[Any] = [previous, received]
        rows = put(args, LlCombineArgs.y, y, keep)
        put(args, LlCombineArgs.topk_idx, topk_idx, keep)
        weights = put(args, LlCombineArgs.topk_weights, topk_weights, keep)
        kind = kind or kind_of(y)
        if out is None:
            out = empty_like(y, (weights[0], rows[-1]), BF16, kind)
        put_output(args, LlCombineArgs.out, out, keep, "out")
        if wait_cost is not None:
            put_output(args, LlCombineArgs.wait_cost, wait_cost, keep, "wait_cost")
        args.handle = live_handle(received)
        if wire != "bf16":
            args.wire = choose(_COMBINE_WIRES, "wire", wire)
        mode = _COMPLETIONS[completion]
        if mode:
            args.completion = mode
        self._order(args, kind, previous, stream)
        if mode is None:
            self._now(lib.ep_ll_combine, args)
            return out
        return self._begin(lib.ep_ll_combine, (byref(args),), lambda: out, keep, True)

    def ll_combine_buffer(self, received: LlReceived) -> Any:
        """The [L, S, H] bfloat16 send buffer of a result: expert outputs written there are
        combined without a copy. It lives as long as the result."""
        tensor = _abi.Tensor()
        with self._owner.lock:
            check(lib.ep_ll_combine_buffer(self.pointer, live_handle(received), byref(tensor)))
        return view(tensor, received._kind, received._region)


def live_handle(received: LlReceived) -> int:
    """Handle of a low-latency result that was not given up."""
    if received.handle is None:
        raise ValueError(
            "this low-latency result was retired: at most two are alive at once, and newer "
            "dispatches use its memory"
        )
    return received.handle
