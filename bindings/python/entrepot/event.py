# SPDX-License-Identifier: MIT
"""Completion of calls that go on after they returned."""

from typing import Any, Callable, Generic, Optional, Tuple, TypeVar

from ._lib import lib, raise_status
from ._owner import Owner

T = TypeVar("T")
_OK, _IN_PROGRESS = 0, 1


class Event(Generic[T]):
    """A call in progress.

    `wait()` returns the call's result, or raises its error. Inputs and outputs
    of the call are kept alive until then. Dropping an event waits for its call.
    """

    __slots__ = (
        "_pointer",
        "_owner",
        "_finish",
        "_keep",
        "_early",
        "_followed",
        "_result",
        "_done",
        "__weakref__",
    )

    def __init__(
        self, owner: Owner, finish: Callable[[], T], keep: Any, early: bool = False
    ):
        self._owner = owner
        self._pointer: Optional[int] = None
        self._finish: Optional[Callable[[], T]] = finish
        self._keep = keep
        self._early = early
        self._followed = False
        self._result: Optional[T] = None
        self._done = False

    def _begun(self, pointer: Optional[int]) -> None:
        """The call's ep_event; None: it failed before there was one."""
        if pointer:
            self._owner.adopt()
            self._pointer = pointer

    @property
    def pointer(self) -> Optional[int]:
        """The ep_event while the call may be unfinished, else None."""
        return self._pointer

    def wait(self) -> T:
        """Waits for the call; may be called again. Bounded by the group's timeout."""
        if not self._done:
            with self._owner.lock:
                status = lib.ep_event_wait(self._pointer)
                if status:
                    raise_status(status)
            self._complete()
        return self._result  # type: ignore[return-value]

    def wait_counts(self) -> T:
        """Of dispatch, cached dispatch and backward of combine: waits until it is known what
        comes, and returns the result, whose rows come only with wait(). On a buffer without
        threads, and of other calls, it is wait()."""
        if not self._done and not self._early:
            with self._owner.lock:
                status = lib.ep_event_wait_counts(self._pointer)
                if status:
                    raise_status(status)
            self._early = True
        return self.outputs()

    def stream_wait(self, stream: Optional[int]) -> None:
        """Makes work put into a device's stream from now on wait for the call, without waiting
        itself; of a call with a hook, receives in that stream. Dropping the event then waits
        for nothing, and should the call fail the buffer's next one says so. On the CPU it is
        wait()."""
        if not self._done:
            with self._owner.lock:
                status = lib.ep_event_stream_wait(self._pointer, stream)
                if status:
                    raise_status(status)
            self._followed = self._early = True

    @property
    def followed(self) -> bool:
        """Whether a stream was made to wait for the call."""
        return self._followed

    def done(self) -> bool:
        """Whether wait() would return at once. On a buffer without threads it also advances
        the call. Raises the call's error."""
        if not self._done:
            with self._owner.lock:
                status = lib.ep_event_query(self._pointer)
                if status not in (_OK, _IN_PROGRESS):
                    raise_status(status)
            if status == _IN_PROGRESS:
                return False
            self._complete()
        return True

    def outputs(self) -> T:
        """What wait() will return, before it is filled: of combine, of low-latency calls with a
        hook, which know their outputs from the start, and of others after wait_counts()."""
        if not self._early and not self._done:
            raise ValueError("this call knows its outputs only when it is done; use wait()")
        return self._take()

    def _take(self) -> T:
        finish, self._finish = self._finish, None
        if finish is not None:
            self._result = finish()
        return self._result  # type: ignore[return-value]

    def _complete(self) -> None:
        self._take()
        self._done = True
        self._release()

    def __del__(self) -> None:
        self._release()

    def _release(self) -> None:
        pointer, self._pointer = self._pointer, None
        if pointer:
            self._owner.release(_end, (pointer, self._finish, self._keep, self._followed))
            self._keep = None


def _end(call: Tuple[int, Optional[Callable[[], Any]], Any, bool]) -> None:
    """Waits for a call that no stream waits for, and frees its event; a result that nobody took
    is made and dropped."""
    pointer, finish, _, followed = call
    status = _OK if followed else lib.ep_event_wait(pointer)
    lib.ep_event_release(pointer)
    if status == _OK and finish is not None:
        finish()
