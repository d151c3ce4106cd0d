# SPDX-License-Identifier: MIT
"""Finds and loads libentrepot, and turns statuses into exceptions.

The library is loaded with ctypes.CDLL, so the interpreter lock is free while
a call runs or waits.
"""

import ctypes
import os
from typing import List

from . import _abi
from .errors import BY_STATUS, Error

NAME = "libentrepot.so"


def candidates() -> List[str]:
    """Where the library is looked for, in order: EP_LIBRARY alone when it is set, else the
    package's own copy, then the system's."""
    named = os.environ.get("EP_LIBRARY")
    if named:
        return [named]
    return [os.path.join(os.path.dirname(os.path.abspath(__file__)), NAME), NAME + ".0"]


def _load() -> ctypes.CDLL:
    problems = []
    for path in candidates():
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            problems.append(str(error))
            continue
        return _declare(library)
    raise ImportError(
        "libentrepot was not found: " + "; ".join(problems) + ". "
        "Install this package with pip, or set EP_LIBRARY to the path of libentrepot.so."
    )


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, (result, arguments) in _abi.FUNCTIONS.items():
        function = getattr(library, name, None)
        if function is None:
            raise ImportError(f"{library._name} has no {name}: it is of another version")
        function.restype, function.argtypes = result, arguments
    return library


lib = _load()
version: str = lib.ep_version().decode()


def raise_status(status: int) -> None:
    """Raises the exception of a failed call made just before by this thread."""
    message = lib.ep_last_error().decode(errors="replace")
    kind = BY_STATUS.get(status)
    if kind is None:
        name = lib.ep_status_string(status).decode()
        raise Error(f"{name} ({status}): {message}")
    raise kind(message)


def check(status: int) -> None:
    """Raises unless the status is EP_OK."""
    if status:
        raise_status(status)
