# SPDX-License-Identifier: MIT
"""The low-latency calls of the buffer."""

from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional, Tuple, Union

import entrepot
from entrepot import ArgumentError, LlReceived
from entrepot._tensor import kind_of

from .utils.event import EventHandle, EventOverlap

Tensor = Any


class LowLatencyHandle(tuple):
    """(src_info, layout_range, M, H, E), and the result it belongs to."""

    received: LlReceived

    def __new__(cls, received: LlReceived, *elements: Any) -> "LowLatencyHandle":
        handle = super().__new__(cls, elements)
        handle.received = received
        return handle


class LowLatencyBuffer:
    """Dispatch and combine for decode; see Buffer."""

    rank: int
    group_size: int
    enable_shrink: bool
    _ranks: entrepot.Group
    _buffer_of: Callable[[Any], entrepot.Buffer]

    def _init_low_latency(self) -> None:
        # Results whose memory is in use, and calls on them that may be unfinished.
        self._alive: Deque[Tuple[LlReceived, List[entrepot.Event]]] = deque()
        self._shape: Any = None
        self._local: Dict[Any, Any] = {}

    def _drop_low_latency(self) -> None:
        self._alive.clear()
        self._local.clear()

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Checks its arguments. There is nothing to clean when modes are switched: counters carry
        the number of their call, so that memory may hold anything."""
        for name, value in (
            ("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank),
            ("hidden", hidden),
            ("num_experts", num_experts),
        ):
            if value < 1:
                raise ArgumentError(f"clean_low_latency_buffer: {name} is {value}; it must be >= 1")

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Optional[Tensor] = None,
        dispatch_wait_recv_cost_stats: Optional[Tensor] = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> Tuple[
        Union[Tensor, Tuple[Tensor, Tensor]],
        Tensor,
        Tuple,
        EventOverlap,
        Optional[Callable[[], None]],
    ]:
        """Sends every (token, expert) pair as one row; no counts go ahead.

        Two results may be used at once: a third call reuses the memory of the first.

        Args:
            x: [T, H] bfloat16, T <= M.
            topk_idx: [T, K] expert ids; -1: none.
            num_max_dispatch_tokens_per_rank: M, the same on every rank.
            num_experts: E.
            cumulative_local_expert_recv_stats: [L] int32; rows received are added.
            dispatch_wait_recv_cost_stats: [R] int64; nanoseconds waited for each rank are added.
            use_fp8: quantise to float8_e4m3fn, one scale per 128 channels.
            round_scale: scales are powers of two.
            use_ue8m0: scales are exponent bytes, four in an int32; needs round_scale.
            async_finish: return an event; return_recv_hook: return a hook. Not both. Either way
                the call only sends, and on the CPU waiting for the event or calling the hook
                receives.

        Returns: recv_x [L, R * M, H] (with use_fp8 also scales [L, R * M, H / 128], or with
            use_ue8m0 [L, R * M, H / 512], column-major), recv_count [L] int32, handle, event, hook.
        """
        if use_ue8m0 and not (use_fp8 and round_scale):
            raise ArgumentError("low_latency_dispatch: use_ue8m0 needs use_fp8 and round_scale")
        self._make_room(
            (
                x.shape[1],
                topk_idx.shape[1],
                num_max_dispatch_tokens_per_rank,
                num_experts,
                use_fp8,
                round_scale,
                use_ue8m0,
            )
        )
        call = self._buffer_of(kind_of(x))._ll_dispatch(
            x,
            topk_idx,
            _completion("low_latency_dispatch", async_finish, return_recv_hook),
            max_tokens=num_max_dispatch_tokens_per_rank,
            num_experts=num_experts,
            wire="fp8" if use_fp8 else "bf16",
            scale="ue8m0" if use_ue8m0 else "pow2" if round_scale else "f32",
            scales_by_column=True,
            expert_tokens=cumulative_local_expert_recv_stats,
            wait_cost=dispatch_wait_recv_cost_stats,
        )
        event = call if isinstance(call, entrepot.Event) else None
        received: LlReceived = call if event is None else event.outputs()
        self._alive.append((received, [] if event is None else [event]))
        handle = LowLatencyHandle(
            received,
            received.source_token,
            received.source_range,
            num_max_dispatch_tokens_per_rank,
            x.shape[1],
            num_experts,
        )
        recv_x = (received.x, received.scales) if use_fp8 else received.x
        overlap, hook = _finishers(event, return_recv_hook)
        return recv_x, received.count, handle, overlap, hook

    def _make_room(self, shape: Any) -> None:
        """Gives up the older of two live results, whose memory the next call uses; both, if the
        next call is of another shape."""
        keep = 1 if shape == self._shape else 0
        self._shape = shape
        while len(self._alive) > keep:
            received, events = self._alive.popleft()
            for event in events:
                event.wait()
            received.retire()

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Tuple,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Optional[Tensor] = None,
        combine_wait_recv_cost_stats: Optional[Tensor] = None,
    ) -> Tuple[Tensor, EventOverlap, Optional[Callable[[], None]]]:
        """Weighted sum of each token's rows, in float32.

        Args:
            x: [L, R * M, H] bfloat16, rows as received; not read with zero_copy.
            topk_idx, topk_weights: [T, K] as dispatched; float32 weights.
            handle: of low_latency_dispatch.
            use_logfmt: rows travel as LogFMT-10 where their range allows it.
            zero_copy: the rows are in get_next_low_latency_combine_buffer(handle).
            async_finish, return_recv_hook: as in low_latency_dispatch().
            out: [T, H] bfloat16 to write to.
            combine_wait_recv_cost_stats: [R] int64; nanoseconds waited for each rank are added.

        Returns: combined_x [T, H], event, hook.
        """
        received = _received_of(handle)
        buffer = self._buffer_of(kind_of(topk_weights))
        call = buffer._ll_combine(
            buffer.ll_combine_buffer(received) if zero_copy else x,
            topk_idx,
            topk_weights,
            received,
            _completion("low_latency_combine", async_finish, return_recv_hook),
            wire="logfmt10" if use_logfmt else "bf16",
            out=out,
            wait_cost=combine_wait_recv_cost_stats,
        )
        event = call if isinstance(call, entrepot.Event) else None
        combined = call if event is None else event.outputs()
        if event is not None:
            for alive, events in self._alive:
                if alive is received:
                    events.append(event)
        return (combined, *_finishers(event, return_recv_hook))

    def get_next_low_latency_combine_buffer(self, handle: Tuple) -> Tensor:
        """[L, R * M, H] bfloat16 to write expert outputs to, for combine with zero_copy."""
        received = _received_of(handle)
        return self._buffer_of(received._kind).ll_combine_buffer(received)


def _completion(call: str, async_finish: bool, return_recv_hook: bool) -> str:
    if async_finish and return_recv_hook:
        raise ArgumentError(f"{call}: async_finish and return_recv_hook exclude each other")
    return "hook" if return_recv_hook or async_finish else "now"


def _finishers(
    event: Optional[entrepot.Event], return_recv_hook: bool
) -> Tuple[EventOverlap, Optional[Callable[[], None]]]:
    """What completes a call: an event, a hook, or nothing."""
    if event is None:
        return EventOverlap(None), None
    if not return_recv_hook:
        return EventOverlap(EventHandle._of_call(event)), None
    wait = event.wait

    def hook() -> None:
        wait()

    return EventOverlap(None), hook


def _received_of(handle: Any) -> LlReceived:
    if not isinstance(handle, LowLatencyHandle):
        raise TypeError(
            f"handle is a {type(handle).__name__}; it must be what low_latency_dispatch returned"
        )
    return handle.received
