# SPDX-License-Identifier: MIT
"""Order of a call: after what it starts, on which stream it runs, and what tells that it is done.

On the CPU calls run in program order, except behind a background call that
previous_event stands for. On CUDA a call that was not asked to be
asynchronous runs on the caller's current stream; an asynchronous one runs on
the communication stream, after previous_event or else after the current
stream, and its event is recorded there.
"""

import os
from contextlib import nullcontext
from typing import Any, Dict, Iterable, Optional, Tuple

import entrepot
from entrepot import ArgumentError
from entrepot._tensor import (
    CPU,
    CUDA,
    NUMPY,
    TORCH_CPU,
    Kind,
    current_stream,
    torch_cuda,
    torch_module,
)
from entrepot.devices import num_gpus

from .utils.event import EventHandle, EventOverlap


def check_allocation(
    previous_event: Optional[EventOverlap], async_finish: bool, allocate_on_comm_stream: bool
) -> None:
    given = previous_event is not None and previous_event.event is not None
    if allocate_on_comm_stream and not (given and async_finish):
        raise ArgumentError("allocate_on_comm_stream needs previous_event and async_finish")


class CpuOrder:
    """Of a call on CPU tensors."""

    on_device = False
    watched = False
    stream: Optional[int] = None

    def __init__(self, previous_event: Optional[EventOverlap], async_finish: bool):
        self._async = async_finish
        handle = None if previous_event is None else previous_event.event
        if handle is not None and handle._wait is not None:
            handle.current_stream_wait()
        if handle is not None and handle._cuda_event is not None:
            handle._cuda_event.synchronize()  # what the tensors hold may come from there
        #: the background call that this one must come after
        self.previous: Optional[entrepot.Event] = None if handle is None else handle._pending

    def capturing(self) -> bool:
        """Whether the call is being recorded as part of a graph."""
        return False

    def allocating(self) -> Any:
        """Context in which outputs are allocated."""
        return nullcontext()

    def done(
        self, inputs: Iterable[Any], outputs: Iterable[Any], call: Optional[entrepot.Event] = None
    ) -> EventOverlap:
        """The event of a call that is done, or goes on in the background as `call`."""
        return EventOverlap(EventHandle._of_call(call) if self._async else None)


class CudaNow:
    """Of a call on CUDA tensors that is simply the next one on the current stream."""

    on_device = True
    watched = False  #: the host waits for the call, to see whether ranks were lost
    previous: Optional[entrepot.Event] = None

    def __init__(self, index: int):
        self.stream: Optional[int] = current_stream(index)

    def capturing(self) -> bool:
        """Whether the call is being recorded as part of a graph."""
        return torch_module().cuda.is_current_stream_capturing()

    def allocating(self) -> Any:
        """Context in which outputs are allocated."""
        return nullcontext()

    submitting = allocating

    def done(
        self, inputs: Iterable[Any], outputs: Iterable[Any], call: None = None
    ) -> EventOverlap:
        """Nothing to wait for."""
        return EventOverlap(None)


class CudaOrder:
    """Of a call on CUDA tensors with an event before or after it."""

    on_device = True
    watched = False  #: the host waits for the call, to see whether ranks were lost
    previous: Optional[entrepot.Event] = None

    def __init__(
        self,
        comm: Any,
        previous_event: Optional[EventOverlap],
        async_finish: bool,
        allocate_on_comm_stream: bool,
    ):
        self._torch = torch_module()
        self._async, self._on_comm = async_finish, allocate_on_comm_stream
        self._made_there = allocate_on_comm_stream
        self._compute = self._torch.cuda.current_stream(comm.device)
        self._launch = comm if async_finish else self._compute
        handle = None if previous_event is None else previous_event.event
        if handle is not None and handle._cuda_event is None:
            handle.current_stream_wait()  # of a call on the CPU
        if handle is not None and handle._cuda_event is not None:
            self._launch.wait_event(handle._cuda_event)
        elif async_finish:
            comm.wait_stream(self._compute)
        self.stream: Optional[int] = self._launch.cuda_stream

    def capturing(self) -> bool:
        """Whether the call is being recorded as part of a graph."""
        return self._torch.cuda.is_current_stream_capturing()

    def allocating(self) -> Any:
        """Context in which outputs are allocated."""
        return self._torch.cuda.stream(self._launch) if self._on_comm else nullcontext()

    def submitting(self) -> Any:
        """Context in which torch's own kernels do the call, and allocate what it returns."""
        self._made_there = True
        return self._torch.cuda.stream(self._launch)

    def done(
        self, inputs: Iterable[Any], outputs: Iterable[Any], call: None = None
    ) -> EventOverlap:
        """The event of a call that was submitted. The allocator learns that the tensors are in
        use on streams that did not make them."""
        if not self._async:
            return EventOverlap(None)
        tensors = [t for t in (*inputs, *outputs) if t is not None]
        for tensor in tensors:
            tensor.record_stream(self._launch)
        if self._made_there:
            for tensor in outputs:
                if tensor is not None:
                    tensor.record_stream(self._compute)
        return EventOverlap(EventHandle._of_stream(self._launch), tuple(tensors))


def default_kind() -> Kind:
    """Where calls run unless their tensors say otherwise: the current GPU where torch uses CUDA
    and the library's CUDA module is there, else the CPU. EP_DEVICE=cpu says CPU."""
    torch = torch_module()
    if torch is None:
        return NUMPY
    if os.environ.get("EP_DEVICE") == "cpu" or not torch.cuda.is_available() or not num_gpus():
        return TORCH_CPU
    return torch_cuda(torch.cuda.current_device())


def sm_share(group: entrepot.Group, index: int) -> int:
    """SMs of a GPU for each of the ranks that share it; collective."""
    properties = torch_module().cuda.get_device_properties(index)
    name = str(getattr(properties, "uuid", index)).encode()[:64].ljust(64)
    return properties.multi_processor_count // group.allgather(name).count(name)


class Streams:
    """The communication stream of each device, made when it is first needed."""

    def __init__(self) -> None:
        self._comm: Dict[int, Any] = {}

    def comm(self, index: int) -> Any:
        stream = self._comm.get(index)
        if stream is None:
            torch = torch_module()
            stream = torch.cuda.Stream(device=index, priority=-1)
            self._comm[index] = stream
        return stream

    def order(
        self,
        kind: Kind,
        previous_event: Optional[EventOverlap],
        async_finish: bool,
        allocate_on_comm_stream: bool = False,
    ) -> Any:
        """How a call with these arguments is ordered."""
        if kind.device == CUDA and previous_event is None and not async_finish:
            if allocate_on_comm_stream:
                check_allocation(previous_event, async_finish, True)
            return CudaNow(kind.device_index)
        if allocate_on_comm_stream:
            check_allocation(previous_event, async_finish, allocate_on_comm_stream)
        if kind.device == CPU:
            return CpuOrder(previous_event, async_finish)
        return CudaOrder(
            self.comm(kind.device_index), previous_event, async_finish, allocate_on_comm_stream
        )
