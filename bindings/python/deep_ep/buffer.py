# SPDX-License-Identifier: MIT
"""The communication buffer, with DeepEP's names."""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

import entrepot
from entrepot import ArgumentError
from entrepot._abi import Call
from entrepot._refusal import collective, refuse
from entrepot._tensor import (
    CPU,
    CUDA,
    I32,
    NUMPY,
    Kind,
    describe,
    dtype_code,
    is_torch,
    kind_of,
    torch_module,
)
from entrepot.sizes import layout_on_stream

from .config import Config
from .handle import Handle, core_of
from .low_latency import LowLatencyBuffer
from .shapes import length_of, matrix_shape
from .streams import Streams, default_kind, sm_share
from .utils.event import EventHandle, EventOverlap

Tensor = Any  # a torch tensor or a NumPy array

_MAX_EXPERTS = 8192  # costs 64 KiB of address space for each rank


class Buffer(LowLatencyBuffer):
    """Dispatch and combine among the ranks of a group.

    Attributes:
        num_sms: SMs that normal calls on CUDA tensors use, of the class.
        rank, group_size: of this rank, and of all.
        group: what was given as group or comm.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode: as given.
    """

    num_sms: int = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        """Makes the buffer; collective.

        Args:
            group: a torch process group of any backend, an entrepot.Group, or any object with
                rank, size and an all-gather of objects.
            num_nvl_bytes: window to have ready on a GPU; it grows if rows need more. On the CPU
                memory comes when rows need it. Bytes of get_local_buffer_tensor.
            num_rdma_bytes: bytes of get_local_buffer_tensor(use_rdma_buffer=True).
            low_latency_mode: kept as an attribute; both modes always work.
            num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl: say how DeepEP
                uses a network; ranks here share a host, so there is nothing to choose.
            explicitly_destroy: destroy() will be called.
            enable_shrink: ranks that time out in low-latency calls are masked, and the call
                goes on without them.
            comm: an mpi4py communicator, where group is None.
        """
        source = group if group is not None else comm
        if source is None:
            raise ValueError("Buffer: give group or comm")
        for name, value in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            if value < 0:
                raise ArgumentError(f"Buffer: {name} is {value}; it must be at least 0")
        if num_qps_per_rank < 1:
            raise ArgumentError(f"Buffer: num_qps_per_rank is {num_qps_per_rank}; it must be >= 1")
        self._ranks = entrepot.Group.of(source)
        self.group = source
        self.rank = self._ranks.rank
        self.group_size = self._ranks.size
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._buffers: Dict[Tuple[int, int], entrepot.Buffer] = {}
        self._streams = Streams()
        self._sm_share: Dict[int, int] = {}
        self._destroyed = False
        self._init_low_latency()
        self._buffer_of(default_kind())

    def _buffer_of(self, kind: Kind) -> entrepot.Buffer:
        """The window on a device, made when tensors of it first come."""
        where = (kind.device, kind.device_index)
        buffer = self._buffers.get(where)
        if buffer is None:
            if self._destroyed:
                raise RuntimeError("Buffer: it was destroyed")
            buffer = self._new_buffer(kind)
            self._buffers[where] = buffer
        self._kind, self._owner = kind, buffer._owner
        return buffer

    def _refuse(self, call: Call, made: int, error: Exception) -> None:
        """A call that the other ranks make failed here before it was made. They make it on the
        device that was used last, as far as can be known."""
        if call == Call.CALL_LL_DISPATCH:
            self._refuse_ll_dispatch(self._kind)
        refuse(self._owner, call, made, error)

    def _new_buffer(self, kind: Kind) -> entrepot.Buffer:
        if kind.device == CPU:
            return entrepot.Buffer(self._ranks, num_threads=1, max_experts=_MAX_EXPERTS)
        return entrepot.Buffer(
            self._ranks,
            window_bytes=self.num_nvl_bytes,
            max_experts=_MAX_EXPERTS,
            device="cuda",
            device_index=kind.device_index,
        )

    def _sms(self, kind: Kind, config: Optional[Config]) -> int:
        """SMs that a normal call may use: of config or the class, at most this rank's share."""
        if config is not None and not isinstance(config, Config):
            raise TypeError(f"config is a {type(config).__name__}; it must be a deep_ep.Config")
        if kind.device == CPU:
            return 0
        share = self._sm_share.get(kind.device_index)
        if share is None:
            share = sm_share(self._ranks, kind.device_index)
            self._sm_share[kind.device_index] = share
        return min(Buffer.num_sms if config is None else config.num_sms, share)

    def destroy(self) -> None:
        """Gives the window back; results that are still held stay readable. Waits for no other
        rank."""
        if not self.explicitly_destroy:
            raise AssertionError(
                "Buffer.destroy: the buffer was made with explicitly_destroy=False"
            )
        self._drop_low_latency()
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        self._destroyed = True
        if self._ranks is not self.group:  # the caller's own
            self._ranks.close()

    # ------------------------------------------------------------- settings

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether FP8 rows can be sent: yes, on every device."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets how many SMs normal calls on CUDA tensors use; an even number."""
        if new_num_sms < 0 or new_num_sms % 2:
            raise AssertionError(f"set_num_sms: {new_num_sms} is not an even number of SMs")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """Now, on the current stream, as an event to wait for."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The default for any number of ranks."""
        return _default_config(num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The default for any number of ranks."""
        return _default_config(num_ranks)

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Memory that two live low-latency results can come to need, with BF16 rows."""
        size = entrepot.ll_size(
            num_ranks=num_ranks,
            max_tokens=num_max_dispatch_tokens_per_rank,
            hidden=hidden,
            topk=min(_TOPK, num_experts),
            num_experts=num_experts,
        )
        return -(-(size.window_bytes + size.private_bytes) // 128) * 128

    def get_comm_stream(self) -> Any:
        """The stream that asynchronous calls on CUDA tensors run on; without CUDA, torch's CPU
        stream, or None without torch."""
        kind = default_kind()
        if kind.device == CUDA:
            return self._streams.comm(kind.device_index)
        torch = torch_module()
        return None if torch is None else torch.cpu.current_stream()

    def get_local_buffer_tensor(
        self,
        dtype: Any,
        size: Any = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Tensor:
        """Window memory of this rank for the caller: expert outputs written there are combined
        without a copy. Received rows are never placed in it.

        Args:
            dtype: of the tensor; a torch dtype makes a torch tensor.
            size: its shape; None: all of it, in one dimension.
            offset: bytes to skip, a multiple of the element's.
            use_rdma_buffer: num_rdma_bytes long instead of num_nvl_bytes.
        """
        raw = self._local_memory(use_rdma_buffer, kind_of_dtype(dtype))
        width = _width_of(dtype)
        if not 0 <= offset <= len(raw) or offset % width:
            raise ArgumentError(
                f"get_local_buffer_tensor: offset is {offset}; it must be 0..{len(raw)} and a "
                f"multiple of {width}, the bytes of an element"
            )
        count = (len(raw) - offset) // width
        tensor = raw[offset : offset + count * width].view(dtype)
        if size is None:
            return tensor
        shape = tuple(size)
        if any(n < 0 for n in shape):
            raise ArgumentError(
                f"get_local_buffer_tensor: size is {shape}; each number must be at least 0"
            )
        needed = math.prod(shape)
        if needed > count:
            raise ArgumentError(
                f"get_local_buffer_tensor: size needs {needed} elements; there are {count}"
            )
        return tensor[:needed].reshape(shape)

    def _local_memory(self, rdma: bool, kind: Kind) -> Tensor:
        key = ("local", rdma, kind)
        memory = self._local.get(key)
        if memory is None:
            size = self.num_rdma_bytes if rdma else self.num_nvl_bytes
            memory = self._buffer_of(kind)._alloc((size,), dtype_code("uint8"), kind)
            self._local[key] = memory
        return memory

    # --------------------------------------------------------------- layout

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor], Tensor, Tensor, EventOverlap]:
        """Counts where this rank's tokens go.

        Args:
            topk_idx: [T, K] int64 (or int32) expert ids; -1: none.
            num_experts: E.

        Returns: num_tokens_per_rank [R] int32, None (one node), num_tokens_per_expert [E] int32,
            is_token_in_rank [T, R] bool, event.
        """
        kind = kind_of(topk_idx)
        order = self._streams.order(kind, previous_event, async_finish, allocate_on_comm_stream)
        if kind.device == CPU:
            if order.previous is not None:
                order.previous.wait()
            counts = entrepot.layout(topk_idx, num_experts, self.group_size)
            per_rank, per_expert = counts.tokens_per_rank, counts.tokens_per_expert
            in_rank = counts.token_in_rank
        else:
            with order.submitting():
                per_rank, per_expert, in_rank = layout_on_stream(
                    topk_idx, num_experts, self.group_size, order.stream
                )
        event = order.done((topk_idx,), (per_rank, per_expert, in_rank))
        return per_rank, None, per_expert, in_rank, event

    # ------------------------------------------------------------- dispatch

    @collective(Call.CALL_DISPATCH)
    def dispatch(
        self,
        x: Union[Tensor, Tuple[Tensor, Tensor]],
        handle: Optional[Tuple] = None,
        num_tokens_per_rank: Optional[Tensor] = None,
        num_tokens_per_rdma_rank: Optional[Tensor] = None,
        is_token_in_rank: Optional[Tensor] = None,
        num_tokens_per_expert: Optional[Tensor] = None,
        topk_idx: Optional[Tensor] = None,
        topk_weights: Optional[Tensor] = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[
        Union[Tensor, Tuple[Tensor, Tensor]],
        Optional[Tensor],
        Optional[Tensor],
        Optional[List[int]],
        Optional[Tuple],
        EventOverlap,
    ]:
        """Sends each token's row to the ranks of its experts, once each.

        Args:
            x: [T, H] bfloat16, float16 or float32, or a float8_e4m3fn one with its scales:
                [T, H / 128] or [T, 1] float32, or [T, H / 512] int32 of packed UE8M0; any strides.
            handle: of an earlier dispatch, whose layout is used again; then nothing but x.
            num_tokens_per_rank, num_tokens_per_rdma_rank: of get_dispatch_layout; not needed.
            is_token_in_rank, num_tokens_per_expert: of get_dispatch_layout. The latter tells the
                number of experts; without topk_idx both tell where tokens go.
            topk_idx: [T, K] expert ids. topk_weights: [T, K] float32.
            expert_alignment: counts of the returned list are rounded up to it.
            num_worst_tokens: results have exactly that many rows; the host learns no counts.
            config: checked; its num_sms bounds SMs on CUDA.
            previous_event: waited for before anything else.
            async_finish: return an event, as soon as the host knows how many rows come.
            allocate_on_comm_stream: needs previous_event and async_finish.

        Returns: recv_x (with scales if x had them), recv_topk_idx (local ids, -1 elsewhere),
            recv_topk_weights, tokens per local expert, handle, event. With a handle given the
            second to fifth are None.
        """
        x, scales = x if isinstance(x, tuple) else (x, None)
        kind = kind_of(x)
        order = self._streams.order(kind, previous_event, async_finish, allocate_on_comm_stream)
        spread, one_scale = (None, False) if scales is None else _spread(x, scales)
        num_sms = self._sms(kind, config)
        buffer = self._buffer_of(kind)
        in_background = async_finish and kind.device == CPU
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ArgumentError("dispatch: with a handle, top-k ids and weights must be None")
            call = buffer._dispatch_cached(
                x,
                core_of(handle),
                in_background,
                scales=spread,
                previous=order.previous,
                stream=order.stream,
                num_sms=num_sms,
                kind=kind,
            )
            got = call.wait_counts() if in_background else call
            rows = got.x if scales is None else (got.x, _scales_of(got, one_scale))
            event = order.done((x, scales), (), call if in_background else None)
            return rows, None, None, None, None, event
        if num_tokens_per_expert is None:
            raise ArgumentError("dispatch: num_tokens_per_expert is None, and so is handle")
        counts = None
        if topk_idx is None:
            topk_idx, counts = self._route_by_rank(
                is_token_in_rank, num_tokens_per_expert, expert_alignment, num_worst_tokens
            )
        call = buffer._dispatch(
            x,
            topk_idx,
            topk_weights,
            in_background,
            num_experts=length_of("dispatch", "num_tokens_per_expert", num_tokens_per_expert),
            expert_alignment=expert_alignment,
            num_worst_tokens=num_worst_tokens,
            scales=spread,
            previous=order.previous,
            stream=order.stream,
            num_sms=num_sms,
            kind=kind,
        )
        got = call.wait_counts() if in_background else call
        rows, recv_idx, recv_weights = got.main_tensors()
        if scales is not None:
            rows = (rows, _scales_of(got, one_scale))
        unfinished = call if in_background else None
        new_handle = Handle(got.handle, self.rank, kind, is_token_in_rank, unfinished)
        event = order.done((x, scales, topk_idx, topk_weights), (), unfinished)
        if counts is not None:
            return rows, None, None, counts, new_handle, event
        counts = [] if num_worst_tokens else got.tokens_per_expert
        return rows, recv_idx, recv_weights, counts, new_handle, event

    def _route_by_rank(
        self, in_rank: Any, per_expert: Any, alignment: int, num_worst_tokens: int
    ) -> Tuple[Tensor, List[int]]:
        """Top-k ids that send rows where is_token_in_rank says, by naming each rank's first
        expert; and what the ranks' num_tokens_per_expert come to here."""
        if in_rank is None or num_worst_tokens:
            raise ArgumentError(
                "dispatch: without topk_idx, is_token_in_rank must be given and "
                f"num_worst_tokens 0; it is {num_worst_tokens}"
            )
        num_experts = length_of("dispatch", "num_tokens_per_expert", per_expert)
        local = num_experts // self.group_size
        if is_torch(in_rank):
            torch = torch_module()
            first = torch.arange(self.group_size, device=in_rank.device) * local
            topk_idx = torch.where(in_rank, first, -1)
        else:
            topk_idx = np.where(in_rank, np.arange(self.group_size) * local, -1)
        mine = per_expert.cpu().numpy() if is_torch(per_expert) else per_expert
        parts = self._ranks.allgather(np.ascontiguousarray(mine, np.int32).tobytes())
        total = np.sum([np.frombuffer(part, np.int32) for part in parts], axis=0)
        here = total[self.rank * local : (self.rank + 1) * local]
        return topk_idx, (-(-here // alignment) * alignment).tolist()

    # -------------------------------------------------------------- combine

    @collective(Call.CALL_COMBINE)
    def combine(
        self,
        x: Tensor,
        handle: Tuple,
        topk_weights: Optional[Tensor] = None,
        bias: Union[Tensor, Sequence[Tensor], None] = None,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor], EventOverlap]:
        """Sums the ranks' rows of each token, unweighted, in float32.

        Args:
            x: [N, H] bfloat16, float16 or float32, rows as received.
            handle: of the dispatch.
            topk_weights: [N, K] float32, summed along.
            bias: none, one or a pair (a tuple or a list) of [T, H], added.
            config, previous_event, allocate_on_comm_stream: as in dispatch().
            async_finish: return at once with an event of the result.

        Returns: combined_x [T, H], combined_topk_weights [T, K] or None, event.
        """
        kind = kind_of(x)
        order = self._streams.order(kind, previous_event, async_finish, allocate_on_comm_stream)
        core = core_of(handle)
        buffer = self._buffer_of(kind)
        biases = () if bias is None else bias if isinstance(bias, (tuple, list)) else (bias,)
        in_background = async_finish and kind.device == CPU
        with order.allocating():
            call = buffer._combine(
                x,
                core,
                topk_weights,
                in_background,
                bias=biases,
                previous=order.previous,
                stream=order.stream,
                num_sms=self._sms(kind, config),
                kind=kind,
            )
        outputs = call.outputs() if in_background else call
        event = order.done((x, topk_weights, *biases), outputs, call if in_background else None)
        return (*outputs, event)


def _scales_of(got: entrepot.Received, one_scale: bool) -> Any:
    return got.scales[:, :1] if one_scale else got.scales


_TOPK = 8  # ids of a token that size hints have room for


def _default_config(num_ranks: int) -> Config:
    if num_ranks < 1:
        raise ArgumentError(f"num_ranks is {num_ranks}; it must be at least 1")
    return Config(Buffer.num_sms, 6, 256, 6, 128)


def kind_of_dtype(dtype: Any) -> Kind:
    """Where a tensor of that dtype is made: a torch one on the device that calls run on."""
    torch = torch_module()
    return default_kind() if torch is not None and isinstance(dtype, torch.dtype) else NUMPY


def _width_of(dtype: Any) -> int:
    """Bytes of one element; also of types that cannot be sent, such as int8."""
    if kind_of_dtype(dtype).torch:
        return torch_module().empty(0, dtype=dtype).element_size()
    return np.dtype(dtype).itemsize


def _spread(x: Any, scales: Any) -> Tuple[Any, bool]:
    """One scale a row is passed on as if there were one for every block; no memory is made."""
    hidden = matrix_shape("dispatch", "x", x)[1]
    rows, columns = matrix_shape("dispatch", "scales", scales)
    dtype = getattr(scales, "dtype", None)
    code = describe(scales, "scales").dtype if dtype is None else dtype_code(dtype)
    blocks = -(-hidden // (512 if code == I32 else 128))
    if columns != 1 or blocks == 1:
        return scales, False
    if is_torch(scales):
        return scales.expand(rows, blocks), True
    return np.broadcast_to(scales, (rows, blocks)), True
