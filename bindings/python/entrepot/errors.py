# SPDX-License-Identifier: MIT
"""Exceptions: one class per status of the library, each also of the nearest built-in kind."""

from typing import Dict, Type

from ._abi import Status


class Error(RuntimeError):
    """A call of the library failed. `status` is its code, `message` what it said."""

    status: Status = Status.ERR_STATE

    def __init__(self, message: str):
        super().__init__(f"EP_{self.status.name}: {message}")
        self.message = message


class ArgumentError(Error, ValueError):
    """An argument is out of its range or does not fit another; nothing was written."""

    status = Status.ERR_ARGUMENT


class OutOfMemoryError(Error, MemoryError):
    """An allocation failed, or a window's bound was reached."""

    status = Status.ERR_MEMORY


class SystemCallError(Error):
    """An operating system call failed."""

    status = Status.ERR_SYSTEM


class WaitTimeoutError(Error, TimeoutError):
    """Ranks were not heard from in time; the message names them."""

    status = Status.ERR_TIMEOUT


class RankDeadError(Error):
    """A peer's process or thread has ended; the message names it."""

    status = Status.ERR_RANK_DEAD


class AbortedError(Error):
    """Another rank gave the call up; the message is that rank's."""

    status = Status.ERR_ABORTED


class MismatchError(Error, ValueError):
    """Ranks disagree on an argument."""

    status = Status.ERR_MISMATCH


class CapacityError(Error):
    """Rows exceed a bound that the caller set."""

    status = Status.ERR_CAPACITY


class CorruptError(Error):
    """Verify mode found rows that differ from what was sent."""

    status = Status.ERR_CORRUPT


class StateError(Error):
    """The object is not in a state for this call."""

    status = Status.ERR_STATE


class UnsupportedError(Error, NotImplementedError):
    """This build or machine cannot do it."""

    status = Status.ERR_UNSUPPORTED


class DeviceError(Error):
    """A call of the accelerator failed."""

    status = Status.ERR_DEVICE


class FileError(Error):
    """A file could not be read or written."""

    status = Status.ERR_IO


class FormatError(Error, ValueError):
    """Data from outside, such as a launcher's variables, is malformed."""

    status = Status.ERR_FORMAT


BY_STATUS: Dict[int, Type[Error]] = {
    int(c.status): c
    for c in (
        ArgumentError,
        OutOfMemoryError,
        SystemCallError,
        WaitTimeoutError,
        RankDeadError,
        AbortedError,
        MismatchError,
        CapacityError,
        CorruptError,
        StateError,
        UnsupportedError,
        DeviceError,
        FileError,
        FormatError,
    )
}
