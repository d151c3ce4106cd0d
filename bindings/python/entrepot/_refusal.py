# SPDX-License-Identifier: MIT
"""Calls that end in an exception before the library is asked: the other ranks are told why.

They are in the same call, and would wait for this rank until the timeout.
"""

import functools
from typing import Any, Callable, TypeVar, cast

from ._abi import Call
from ._lib import lib
from ._owner import Owner

Method = TypeVar("Method", bound=Callable[..., Any])


def collective(call: Call) -> Callable[[Method], Method]:
    """Decorates a method that makes `call` on the buffer of self._owner: should it fail before
    that, self._refuse(call, made, error) tells the other ranks."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def calling(self: Any, *args: Any, **kwargs: Any) -> Any:
            owner = self._owner
            made = owner.calls
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                if self._owner is owner and owner.calls == made:
                    self._refuse(call, made, error)
                raise

        return cast(Method, calling)

    return decorate


def refuse(owner: Owner, call: Call, made: int, error: Exception) -> None:
    """Has a buffer refuse `call`, unless calls were made since there were `made`."""
    reason = f"{type(error).__name__}: {error}".encode(errors="replace")
    with owner.lock:
        if owner.calls == made and owner.pointer is not None and not owner.closing:
            owner.calls += 1
            lib.ep_buffer_refuse(owner.pointer, call, reason)
