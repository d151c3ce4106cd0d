# SPDX-License-Identifier: MIT
"""Memory of results on a device, given up while kernels that read it may still be running."""

import sys
from collections import deque
from typing import Any, Callable, Deque, Set

from ._tensor import current_stream, torch_module


class Reuse:
    """Orders calls behind what the caller does with results, as torch's allocator would.

    When the last view of a result is gone its memory serves later calls, although
    kernels of the caller's may still read it in the stream that is current then. Calls
    on that stream come after them anyway; others wait for a mark put there.
    """

    def __init__(self, device_index: int):
        self._index = device_index
        self._streams: Set[int] = set()  # that calls ran on
        self._marks: Deque[Any] = deque()

    # The default is there even where the interpreter ends and this module is gone.
    def give_up(self, finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        """The last view of a result is gone."""
        if finalizing():
            return
        cuda = torch_module().cuda
        if len(self._streams) == 1 and current_stream(self._index) in self._streams:
            return
        if not cuda.is_current_stream_capturing():
            self._marks.append(cuda.current_stream(self._index).record_event())

    def enter(self, stream: int) -> None:
        """A call on `stream` is about to be made."""
        if stream not in self._streams:
            self._join(stream)
        if not self._marks:
            return
        # A graph can't wait for what was not captured; whoever captures it sees to the order.
        while self._marks and not torch_module().cuda.is_current_stream_capturing():
            self._external(stream).wait_event(self._marks.popleft())

    def _join(self, stream: int) -> None:
        """Nothing was marked while all calls ran on one stream."""
        others, capturing = list(self._streams), torch_module().cuda.is_current_stream_capturing()
        self._streams.add(stream)
        if len(others) == 1 and not capturing:
            self._external(stream).wait_stream(self._external(others[0]))

    def _external(self, stream: int) -> Any:
        cuda = torch_module().cuda
        if not stream:  # a null pointer would make a new stream
            return cuda.default_stream(self._index)
        return cuda.ExternalStream(stream, device=self._index)
