# SPDX-License-Identifier: MIT
"""The low-latency calls of the buffer."""

import threading
import weakref
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Tuple, Union

import entrepot
from entrepot import ArgumentError, LlReceived
from entrepot._abi import Call
from entrepot._refusal import collective, refuse
from entrepot._tensor import kind_of

from .shapes import matrix_shape
from .shrink import is_loss, leave_out_lost
from .streams import Streams
from .utils.event import EventHandle, EventOverlap

Tensor = Any


class LowLatencyHandle(tuple):
    """(src_info, layout_range, M, H, E), and the result it belongs to. The two tensors are made
    when they are looked at: most callers pass the handle on."""

    received: LlReceived  #: changes when the call had to be made again
    _shown: LlReceived

    def __new__(cls, received: LlReceived, *elements: Any) -> "LowLatencyHandle":
        handle = tuple.__new__(cls, ("src_info", "layout_range", *elements))
        handle.received = handle._shown = received
        return handle

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(5)))
        value = super().__getitem__(index)
        if value == "src_info":
            return self._shown.source_token
        return self._shown.source_range if value == "layout_range" else value

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(5))

    def __eq__(self, other: Any) -> bool:
        return self is other

    def __ne__(self, other: Any) -> bool:
        return self is not other

    __hash__ = object.__hash__


class LowLatencyBuffer:
    """Dispatch and combine for decode; see Buffer."""

    rank: int
    group_size: int
    enable_shrink: bool
    _ranks: entrepot.Group
    _streams: Streams
    _buffer_of: Callable[[Any], entrepot.Buffer]

    def _init_low_latency(self) -> None:
        # Results whose memory is in use, None of a call that failed, and calls on them whose
        # receiving is still due.
        self._alive: Deque[Tuple[Optional[LlReceived], List[entrepot.Event]]] = deque()
        self._shape: Any = None
        self._ll_lock = threading.Lock()  # results make room for each other
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

    @collective(Call.CALL_LL_DISPATCH)
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
        _check_finish("low_latency_dispatch", async_finish, return_recv_hook)
        kind = kind_of(x)
        order = self._streams.order(kind, None, async_finish)
        hidden = matrix_shape("low_latency_dispatch", "x", x)[1]
        shape = (
            hidden,
            matrix_shape("low_latency_dispatch", "topk_idx", topk_idx)[1],
            num_max_dispatch_tokens_per_rank,
            num_experts,
            use_fp8,
            round_scale,
            use_ue8m0,
        )

        due: List[entrepot.Event] = []

        def make(completion: str) -> Any:
            return self._buffer_of(kind)._ll_dispatch(
                x,
                topk_idx,
                completion,
                max_tokens=num_max_dispatch_tokens_per_rank,
                num_experts=num_experts,
                wire="fp8" if use_fp8 else "bf16",
                scale="ue8m0" if use_ue8m0 else "pow2" if round_scale else "f32",
                scales_by_column=True,
                expert_tokens=cumulative_local_expert_recv_stats,
                wait_cost=dispatch_wait_recv_cost_stats,
                stream=order.stream,
                kind=kind,
            )

        def submit(completion: str) -> Any:
            nonlocal due
            with self._ll_lock:
                self._make_room(shape, order)
                call, due = self._dispatch_into_room(lambda: make(completion), kind)
            return call

        call, event = self._submit(submit, order, async_finish, return_recv_hook)
        received: LlReceived = call if event is None else event.outputs()
        handle = LowLatencyHandle(
            received,
            num_max_dispatch_tokens_per_rank,
            hidden,
            num_experts,
        )

        def again() -> None:
            """The same without the ranks that were lost, into the tensors given out before."""
            fresh = self._survive(lambda: _complete(submit, order), order)
            received.copy_from(fresh)
            handle.received = fresh

        recv_x = (received.x, received.scales) if use_fp8 else received.x
        inputs = (x, topk_idx, cumulative_local_expert_recv_stats)
        overlap, hook = self._finishers(event, due, order, return_recv_hook, again, inputs, ())
        return recv_x, received.count, handle, overlap, hook

    def _make_room(self, shape: Any, order: Any) -> None:
        """Gives up the older of two live results, whose memory the next call uses; both, if the
        next call is of another shape or leaves out other ranks."""
        shape = (shape, self._ranks.mask_flags())
        keep = 1 if shape == self._shape else 0
        self._shape = shape
        while len(self._alive) > keep:
            received, due = self._alive.popleft()
            for event in due:
                try:
                    event.stream_wait(order.stream)
                except entrepot.Error:
                    if not self.enable_shrink:
                        raise
            due.clear()
            if received is not None:
                received.retire()

    def _dispatch_into_room(self, make: Callable[[], Any], kind: Any) -> Tuple[Any, List]:
        """The call, and the list of what is due of its result. One that fails uses memory up like
        any other."""
        owner = self._buffer_of(kind)._owner
        made = owner.calls
        try:
            call = make()
            result = call.outputs() if isinstance(call, entrepot.Event) else call
        except BaseException as error:
            self._alive.append((None, []))
            if isinstance(error, Exception):
                refuse(owner, Call.CALL_LL_DISPATCH, made, error)
            raise
        due = [call] if call is not result else []
        self._alive.append((result, due))
        return call, due

    def _refuse_ll_dispatch(self, kind: Any) -> None:
        """Does with memory what the ranks do that make the call."""
        with self._ll_lock:
            if self._shape is not None:
                try:
                    self._make_room(self._shape[0], self._streams.order(kind, None, False))
                except entrepot.Error:
                    pass  # of an earlier call; this one has an error of its own
            self._alive.append((None, []))

    @collective(Call.CALL_LL_COMBINE)
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
        _check_finish("low_latency_combine", async_finish, return_recv_hook)
        _received_of(handle)
        kind = kind_of(topk_weights)
        order = self._streams.order(kind, None, async_finish)
        buffer = self._buffer_of(kind)
        target = out
        due: List[entrepot.Event] = []

        def submit(completion: str) -> Any:
            nonlocal due
            received = _received_of(handle)
            call = buffer._ll_combine(
                buffer.ll_combine_buffer(received) if zero_copy else x,
                topk_idx,
                topk_weights,
                received,
                completion,
                wire="logfmt10" if use_logfmt else "bf16",
                out=target,
                wait_cost=combine_wait_recv_cost_stats,
                stream=order.stream,
                kind=kind,
            )
            with self._ll_lock:
                for alive, events in self._alive:
                    if alive is received:
                        due = events
                        if isinstance(call, entrepot.Event):
                            due.append(call)
            return call

        call, event = self._submit(submit, order, async_finish, return_recv_hook)
        target = call if event is None else event.outputs()

        def again() -> None:
            self._survive(lambda: _complete(submit, order), order)

        inputs = (x, topk_idx, topk_weights)
        overlap, hook = self._finishers(
            event, due, order, return_recv_hook, again, inputs, (target,)
        )
        return target, overlap, hook

    # ------------------------------------------------------------ completion

    def _submit(
        self, submit: Callable[[str], Any], order: Any, async_finish: bool, hook: bool
    ) -> Tuple[Any, Optional[entrepot.Event]]:
        """Makes a call: its result, or an event of it. On the CPU an asynchronous call is one
        whose receiving waits for its event; on CUDA it is ordered by its stream, unless losses
        are to be seen: then the host waits, and there too."""
        order.watched = self.enable_shrink and not order.capturing()
        if not (hook or async_finish or self.enable_shrink):
            return submit("now"), None
        deferred = hook or (async_finish and (not order.on_device or order.watched))
        if deferred:
            call = self._survive(lambda: submit("hook"), order)
            return call, call
        return self._survive(lambda: _complete(submit, order), order), None

    def _finishers(
        self,
        event: Optional[entrepot.Event],
        due: List[entrepot.Event],
        order: Any,
        return_recv_hook: bool,
        again: Callable[[], None],
        inputs: Tuple[Any, ...],
        outputs: Tuple[Any, ...],
    ) -> Tuple[EventOverlap, Optional[Callable[[], None]]]:
        """What completes a call: an event, a hook, or nothing."""
        if event is None:
            return order.done(inputs, outputs), None
        if order.on_device and not order.watched:
            # Not held here: once the receiving is in the stream nothing is waited for.
            left = weakref.ref(event)

            def hook() -> None:
                pending = left()
                if pending is not None:
                    pending.stream_wait(order.stream)
                    due.remove(pending)

            return EventOverlap(None), hook
        pending = event

        def receive() -> None:
            try:
                pending.wait()
            except entrepot.Error as error:
                if not (self.enable_shrink and is_loss(error, order.on_device)):
                    raise
                leave_out_lost(self._ranks)
                again()
            finally:
                if pending in due:  # how it went has been said
                    due.remove(pending)

        if return_recv_hook:
            return EventOverlap(None), receive
        return EventOverlap(EventHandle._of_wait(receive), (*inputs, *outputs)), None

    def _survive(self, call: Callable[[], Any], order: Any) -> Any:
        """Makes a call, with enable_shrink as often as it takes to leave out lost ranks."""
        for _ in range(self.group_size):
            try:
                return call()
            except entrepot.Error as error:
                if not (self.enable_shrink and is_loss(error, order.on_device)):
                    raise
                leave_out_lost(self._ranks)
        return call()

    # ----------------------------------------------------------------- masks

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leaves a rank out of later calls, of both modes, or takes it in again. Every rank that
        is left must mask the same ones."""
        self._ranks.mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Writes 1 for each masked rank and 0 for the others to mask_status [R] int32."""
        if tuple(mask_status.shape) != (self.group_size,):
            raise ArgumentError(
                f"low_latency_query_mask_buffer: mask_status has shape {tuple(mask_status.shape)}; "
                f"it must be ({self.group_size},)"
            )
        masked = self._ranks.masked()
        mask_status[:] = 0
        for rank in masked:
            mask_status[rank] = 1

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes all masks away. Collective among all ranks if any was masked."""
        if self._ranks.masked():
            self._ranks.clear_masks()
            self._ranks.recover()

    def get_next_low_latency_combine_buffer(self, handle: Tuple) -> Tensor:
        """[L, R * M, H] bfloat16 to write expert outputs to, for combine with zero_copy."""
        received = _received_of(handle)
        return self._buffer_of(received._kind).ll_combine_buffer(received)


def _complete(submit: Callable[[str], Any], order: Any) -> Any:
    """Makes a call and waits for it, on a device only where losses must be seen."""
    if not (order.on_device and order.watched):
        return submit("now")
    return submit("background").wait()


def _check_finish(call: str, async_finish: bool, return_recv_hook: bool) -> None:
    if async_finish and return_recv_hook:
        raise ArgumentError(f"{call}: async_finish and return_recv_hook exclude each other")


def _received_of(handle: Any) -> LlReceived:
    if not isinstance(handle, LowLatencyHandle):
        raise TypeError(
            f"handle is a {type(handle).__name__}; it must be what low_latency_dispatch returned"
        )
    return handle.received
