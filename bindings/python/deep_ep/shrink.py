# SPDX-License-Identifier: MIT
"""Going on without ranks that are lost (enable_shrink)."""

import re

import entrepot

# How a rank that gave up says that it misses another one.
_MISSING = ("no word from", "has ended")
# One that has gone on says nothing; or this rank went on without a call that was under way.
_ON_DEVICE = re.compile(r"rank \d+ gave up$|brought in step")


def is_loss(error: entrepot.Error, on_device: bool) -> bool:
    """Whether a call failed because a rank has ended or does not come."""
    if isinstance(error, (entrepot.WaitTimeoutError, entrepot.RankDeadError)):
        return True
    if not isinstance(error, entrepot.AbortedError):
        return False
    message = error.message
    if any(words in message for words in _MISSING):
        return True
    return on_device and bool(_ON_DEVICE.search(message))


def leave_out_lost(group: entrepot.Group) -> None:
    """Masks the ranks that were not heard from, on all ranks that are left."""
    for _ in range(group.size):
        for rank in group.late():
            if rank != group.rank:
                group.mask(rank)
        try:
            group.recover()
            return
        except entrepot.WaitTimeoutError:
            continue  # more ranks are lost: they are late now
    raise entrepot.StateError("no rank is left to go on with")
