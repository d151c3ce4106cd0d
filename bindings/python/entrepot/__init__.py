# SPDX-License-Identifier: MIT
"""Expert-parallel dispatch and combine for mixture-of-experts models.

A thin layer over libentrepot: groups, buffers, dispatch, combine and the
low-latency calls on NumPy arrays, torch tensors, or anything with __dlpack__.
See docs/python.md; `python -m entrepot.doctor` tells what works here.
"""

from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from ._abi import Status
    from ._lib import version as __version__
    from .buffer import Buffer, BufferInfo, TraceEvent
    from .errors import (
        AbortedError,
        ArgumentError,
        CapacityError,
        CorruptError,
        DeviceError,
        Error,
        FileError,
        FormatError,
        MismatchError,
        OutOfMemoryError,
        RankDeadError,
        StateError,
        SystemCallError,
        UnsupportedError,
        WaitTimeoutError,
    )
    from .event import Event
    from .group import Group, ThreadWorld
    from .results import Handle, LlReceived, Received
    from .sizes import Layout, LlSize, NormalSize, layout, ll_size, normal_size

# Imported when first used, so that the doctor can speak where the library is missing.
_HOMES = {
    "_abi": "Status",
    "buffer": "Buffer BufferInfo TraceEvent",
    "errors": "AbortedError ArgumentError CapacityError CorruptError DeviceError Error FileError "
    "FormatError MismatchError OutOfMemoryError RankDeadError StateError SystemCallError "
    "UnsupportedError WaitTimeoutError",
    "event": "Event",
    "group": "Group ThreadWorld",
    "results": "Handle LlReceived Received",
    "sizes": "Layout LlSize NormalSize layout ll_size normal_size",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__version__":
        return import_module("._lib", __name__).version
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("." + home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> List[str]:
    return sorted([*globals(), *__all__])
