# SPDX-License-Identifier: MIT
"""Events: what a later call, or the current stream, waits for."""

import sys
from typing import Any, Callable, Optional, Tuple

from entrepot import Event


def _cuda() -> Any:
    """torch.cuda where this process uses it, else None."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda


class EventHandle:
    """A point of time: EventHandle() is now, on the current stream.

    On the CPU there are no streams: work is done in program order, except for
    a call that goes on in the background, whose event this then holds.
    """

    def __init__(self) -> None:
        self._pending: Optional[Event] = None
        self._wait: Optional[Callable[[], None]] = None
        self._cuda_event: Any = None
        cuda = _cuda()
        if cuda is not None:
            self._cuda_event = cuda.Event()
            self._cuda_event.record()

    @classmethod
    def _of_call(cls, pending: Optional[Event]) -> "EventHandle":
        """Of a call on the CPU; None: it is done."""
        handle = cls.__new__(cls)
        handle._pending, handle._wait, handle._cuda_event = pending, None, None
        return handle

    @classmethod
    def _of_wait(cls, wait: Callable[[], None]) -> "EventHandle":
        """Of a call whose rest is done by a function of this thread."""
        handle = cls.__new__(cls)
        handle._pending, handle._wait, handle._cuda_event = None, wait, None
        return handle

    @classmethod
    def _of_stream(cls, stream: Any) -> "EventHandle":
        """Of everything submitted to a CUDA stream so far."""
        handle = cls.__new__(cls)
        handle._pending, handle._wait = None, None
        handle._cuda_event = stream.record_event()
        return handle

    def current_stream_wait(self) -> None:
        """What is submitted from now on comes after this point; on the CPU: waits for it."""
        if self._pending is not None:
            self._pending.wait()
        if self._wait is not None:
            self._wait()
            self._wait = None  # not of a call that failed, which says so each time
        if self._cuda_event is not None:
            self._cuda_event.wait()


class EventOverlap:
    """An event, if there is one, and tensors that must live until it is waited for.

    As a context manager it waits when the block is left, so that the block
    overlaps with the call.
    """

    # Of most events these stay as they are.
    hook_after_wait: Optional[Callable[[], Any]] = None
    _release_handle = False

    def __init__(
        self,
        event: Optional[EventHandle] = None,
        extra_tensors: Optional[Tuple[Any, ...]] = None,
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """The current stream waits for the event; it must have one."""
        if self.event is None:
            raise AssertionError("there is no event: the call was made without async_finish")
        self.event.current_stream_wait()
        hook, self.hook_after_wait = self.hook_after_wait, None
        if hook is not None:
            hook()
        if release_handle:
            self.event = None

    def register_hook_after_wait(self, hook_after_wait: Callable[[], Any]) -> None:
        """Something to call once, after the next wait."""
        if self.hook_after_wait is not None:
            raise AssertionError("a hook is already registered")
        self.hook_after_wait = hook_after_wait

    def __call__(self, release_handle: bool = False) -> "EventOverlap":
        """Returns itself, set to drop its event after the wait at the end of a with block."""
        self._release_handle = release_handle
        return self

    def __enter__(self) -> "EventOverlap":
        return self

    def __exit__(self, *_: Any) -> None:
        if self.event is not None:
            self.current_stream_wait(self._release_handle)
        self._release_handle = False
