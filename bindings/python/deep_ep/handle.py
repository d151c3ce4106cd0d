# SPDX-License-Identifier: MIT
"""Handles of normal dispatches, indexed and unpacked as tuples of six by callers."""

from typing import Any, Dict, Iterator, Optional

import numpy as np

import entrepot
from entrepot._tensor import CPU, Kind, torch_module, torch_view_of

_NAMES = (
    "rank_prefix_matrix",
    "channel_prefix_matrix",
    "recv_channel_prefix_matrix",
    "recv_src_idx",
    "is_token_in_rank",
    "send_head",
)


_new = tuple.__new__


class Handle(tuple):
    """What a dispatch settled, for combine, cached dispatch and backward.

    (rank_prefix_matrix, channel_prefix_matrix, recv_channel_prefix_matrix,
    recv_src_idx, is_token_in_rank, send_head), each made when it is looked at:
    most callers pass the handle on and look at none of them.
    """

    core: entrepot.Handle
    _rank: int
    _kind: Kind
    _made: Dict[int, Any]
    _call: Optional[entrepot.Event] = None

    def __new__(
        cls,
        core: entrepot.Handle,
        rank: int,
        kind: Kind,
        is_token_in_rank: Any = None,
        call: Optional[entrepot.Event] = None,
    ) -> "Handle":
        handle = _new(cls, _NAMES)
        handle.core = core
        handle._rank = rank
        handle._kind = kind
        handle._made = {} if is_token_in_rank is None else {4: is_token_in_rank}
        if call is not None:
            handle._call = call
        return handle

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(6)))
        if index < 0:
            index += 6
        if not 0 <= index < 6:
            raise IndexError(f"handle index {index} is not in 0..5")
        if index not in self._made:
            self._made[index] = self._in_kind(getattr(self, "_" + _NAMES[index])())
        return self._made[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(6))

    def __eq__(self, other: Any) -> bool:
        return self is other

    def __ne__(self, other: Any) -> bool:
        return self is not other

    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"deep_ep handle of {self.core.num_tokens} tokens and {self.core.num_rows} rows"

    def _in_kind(self, array: np.ndarray) -> Any:
        if not self._kind.torch:
            return array
        tensor = torch_view_of(array)
        if self._kind.device == CPU:
            return tensor
        return tensor.to(torch_module().device("cuda", self._kind.device_index))

    def _rank_prefix_matrix(self) -> np.ndarray:
        """[R, R]: entry [i][r] = rows that r received from ranks 0..i."""
        return np.cumsum(self.core.rows_between, axis=0, dtype=np.int32)

    def _channel_prefix_matrix(self) -> np.ndarray:
        """[R, 1]: rows sent to each rank; all go through one channel."""
        return np.ascontiguousarray(self.core.rows_between[self._rank][:, None])

    def _recv_channel_prefix_matrix(self) -> np.ndarray:
        """[R, 1]: where the one channel starts within each source's rows."""
        return np.zeros((self.core.info.num_ranks, 1), np.int32)

    def _recv_src_idx(self) -> np.ndarray:
        """[rows]: index of each row's token at its source."""
        if self._call is not None:
            self._call.wait()
        return self.core.source_token

    def _is_token_in_rank(self) -> np.ndarray:
        return self._send_head() >= 0

    def _send_head(self) -> np.ndarray:
        """[T, R]: row of the token at each rank; -1: not sent there."""
        core = self.core
        head = np.full((core.num_tokens, core.info.num_ranks), -1, np.int32)
        token, k = np.nonzero(core.send_rank >= 0)
        head[token, core.send_rank[token, k]] = core.send_row[token, k]
        return head


def core_of(handle: Any) -> entrepot.Handle:
    """The library's handle inside a caller's."""
    if not isinstance(handle, Handle):
        raise TypeError(
            f"handle is a {type(handle).__name__}; it must be what dispatch returned, itself and "
            "not a copy of its six elements"
        )
    return handle.core
