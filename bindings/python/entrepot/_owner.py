# SPDX-License-Identifier: MIT
"""Lifetimes: what is made from an object keeps the object's C side alive.

Python may collect a buffer before the arrays that view its window, and may
run finalizers on any thread, also while a call is in progress. So each C
object counts what was made from it and is destroyed when it was closed and
the last of those is gone; and a release that comes while a call runs is left
to the thread of that call.

A forked process inherits the objects but neither their threads nor their place
among the ranks: there they count as closed, and nothing is given back.
"""

import os
import threading
import weakref
from collections import deque
from functools import partial
from typing import Any, Callable, Deque, Optional, Tuple

_Release = Tuple[Callable[[Any], Any], Any]


class Owner:
    """A C object with things made from it. `lock` is held around calls that use it."""

    def __init__(self, pointer: int, destroy: Callable[[int], Any], parent: "Optional[Owner]"):
        self.pointer: Optional[int] = pointer
        self.lock = threading.Lock()
        self._destroy = destroy
        self._parent = parent
        children: Deque[None] = deque()  # a count whose changes are atomic
        self._children = children
        #: counts one more thing made from this object
        self.adopt = partial(children.append, None)
        self.closing = False
        #: collective calls made on it
        self.calls = 0
        self.keep: Any = None  # what C code may still use
        self.left: Deque[_Release] = deque()
        _owners.add(self)
        if parent is not None:
            parent.adopt()

    def release(self, function: Callable[[Any], Any], argument: Any) -> None:
        """Gives back one thing that adopt() counted, now or when the running call ends."""
        self.left.append((function, argument))
        self.tidy()

    def close(self) -> None:
        """Destroys the object as soon as nothing made from it is left."""
        self.closing = True
        self.tidy()

    def tidy(self) -> None:
        """Carries out releases that were left over, unless a call is running, whose thread
        does it then."""
        while self.left or self.closing:
            if self.pointer is None:
                self.left.clear()  # of a forked process; else nothing was left
                return
            if not self.lock.acquire(blocking=False):
                return
            try:
                while self.left:
                    function, argument = self.left.popleft()
                    function(argument)
                    self._children.pop()
                if not self.closing or self._children or self.pointer is None:
                    if not self.left:
                        return
                    continue
                pointer, self.pointer = self.pointer, None
                self._destroy(pointer)
            finally:
                self.lock.release()
            if self._parent is not None:
                self._parent.release(self._nothing, None)
            return

    def _forget(self) -> None:
        """In a forked process."""
        self.pointer, self.closing = None, True
        self.lock = threading.Lock()  # whoever held it is not here

    @staticmethod  # and no function of the module, which may be gone when the interpreter ends
    def _nothing(_: Any) -> None:
        pass


_owners: "weakref.WeakSet[Owner]" = weakref.WeakSet()


def _forget_all() -> None:
    for owner in _owners:
        owner._forget()


os.register_at_fork(after_in_child=_forget_all)
