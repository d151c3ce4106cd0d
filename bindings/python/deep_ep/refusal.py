# SPDX-License-Identifier: MIT
"""Calls that end in an exception before they are made; see entrepot._refusal."""

import functools
from typing import Any, Callable, TypeVar, cast

from entrepot._abi import Call

Method = TypeVar("Method", bound=Callable[..., Any])


def collective(call: Call) -> Callable[[Method], Method]:
    """Decorates a method of the buffer that makes `call`: should it fail before that, the other
    ranks are told, on the device that was used last."""

    def decorate(method: Method) -> Method:
        @functools.wraps(method)
        def calling(self: Any, *args: Any, **kwargs: Any) -> Any:
            owner = self._used[1]._owner
            made = owner.calls
            try:
                return method(self, *args, **kwargs)
            except Exception as error:
                if self._used[1]._owner is owner and owner.calls == made:
                    self._refuse(call, error)
                raise

        return cast(Method, calling)

    return decorate
