# SPDX-License-Identifier: MIT
"""Groups: the ranks that exchange tokens, and how they find each other."""

import ctypes
import socket
from ctypes import byref, c_void_p
from typing import Any, Callable, List, Optional, Sequence

from . import _abi
from ._lib import check, lib
from ._owner import Owner
from .bootstrap import AddressBook
from .errors import Error, WaitTimeoutError

#: All-gather of bytes: takes this rank's, returns every rank's in rank order.
Allgather = Callable[[bytes], Sequence[bytes]]


class ThreadWorld:
    """Ranks that are threads of this process find each other through one of these."""

    def __init__(self, num_ranks: int):
        pointer = c_void_p()
        check(lib.ep_thread_world_create(num_ranks, byref(pointer)))
        assert pointer.value is not None
        self.num_ranks = num_ranks
        self._owner = Owner(pointer.value, lib.ep_thread_world_destroy, None)

    def __del__(self) -> None:
        owner = getattr(self, "_owner", None)
        if owner is not None:
            owner.close()


class Group:
    """Ranks on one host that exchange tokens.

    Making one is collective. The constructor takes `rank` and `num_ranks` with
    one bootstrap: `allgather`, or `world` for ranks that are threads. Without
    any of them everything comes from the environment of `entrepot run`,
    mpirun, srun or torchrun; with none of these present it has one rank.

    Args:
        rank, num_ranks: -1 means from the environment.
        ranks_per_node: consecutive ranks that form a node; 0: all one node.
        timeout_ms: longest wait for a peer; 0: EP_TIMEOUT_MS, else 30000.
        transport: "shm", "threads", "cuda_ipc"; None: the fitting one.
        name: tells apart groups that one job makes at the same time.
        allgather: bootstrap of the caller's; called only while groups and buffers are made.
        world: bootstrap of ranks that are threads of this process.
        rejoin: this rank was masked and comes back to a group that the others kept.
    """

    def __init__(
        self,
        rank: int = -1,
        num_ranks: int = -1,
        *,
        ranks_per_node: int = 0,
        timeout_ms: int = 0,
        transport: Optional[str] = None,
        name: Optional[str] = None,
        allgather: Optional[Allgather] = None,
        world: Optional[ThreadWorld] = None,
        rejoin: bool = False,
    ):
        config = _abi.GroupConfig(
            rank=rank,
            num_ranks=num_ranks,
            ranks_per_node=ranks_per_node,
            timeout_ms=timeout_ms,
            transport=None if transport is None else transport.encode(),
            name=None if name is None else name.encode(),
            rejoin=rejoin,
        )
        self._callback = None if allgather is None else _Callback(allgather, num_ranks)
        if self._callback is not None:
            config.allgather = self._callback.function
        if world is not None:
            config.world = world._owner.pointer
        pointer = c_void_p()
        self.check(lib.ep_group_create(byref(config), byref(pointer)))
        assert pointer.value is not None
        self._owner = Owner(
            pointer.value, lib.ep_group_destroy, None if world is None else world._owner
        )
        self._rank: int = lib.ep_group_rank(pointer)
        self._size: int = lib.ep_group_num_ranks(pointer)

    def check(self, status: int) -> None:
        """Raises unless EP_OK. What the caller's all-gather raised is the cause, of the same kind
        if it is a timeout, or is raised itself where it is this library's or no failure."""
        try:
            check(status)
        except Error as error:
            cause = None if self._callback is None else self._callback.take()
            if cause is None:
                raise
            if isinstance(cause, Error) or not isinstance(cause, Exception):
                raise cause from None
            if isinstance(cause, (TimeoutError, socket.timeout)):  # the same from 3.10 on
                raise WaitTimeoutError(str(cause) or error.message) from cause
            raise type(error)(f"{error.message}: {type(cause).__name__}: {cause}") from cause

    @classmethod
    def from_torch(cls, group: Any, **options: Any) -> "Group":
        """From a torch.distributed process group of any backend."""
        import torch.distributed as dist

        def allgather(mine: bytes) -> List[bytes]:
            out: List[Any] = [None] * group.size()
            dist.all_gather_object(out, mine, group)
            return out

        return cls(group.rank(), group.size(), allgather=allgather, **options)

    @classmethod
    def from_mpi(cls, comm: Any, **options: Any) -> "Group":
        """From an mpi4py communicator."""
        return cls(comm.Get_rank(), comm.Get_size(), allgather=comm.allgather, **options)

    @classmethod
    def from_addresses(
        cls, addresses: Sequence[str], rank: int, *, timeout_ms: int = 0, **options: Any
    ) -> "Group":
        """From the ranks' addresses, "host:port" or the path of a Unix socket, the same list
        on every rank. Sockets serve only to make groups and buffers."""
        book = AddressBook(addresses, rank, timeout_ms)
        return cls(rank, len(addresses), allgather=book.allgather, timeout_ms=timeout_ms, **options)

    @classmethod
    def of(cls, source: Any, **options: Any) -> "Group":
        """From whatever `source` is: a Group, a torch process group, an mpi4py communicator, or
        an object with a rank, a size and an all-gather of objects."""
        if isinstance(source, Group):
            return source
        if hasattr(source, "Get_rank"):
            return cls.from_mpi(source, **options)
        gather = getattr(source, "all_gather_obj", None) or getattr(
            source, "all_gather_object", None
        )
        rank = _value(source, "rank")
        size = _value(source, "size", "world_size")
        if rank is not None and size is not None and gather is not None:
            return cls(rank, size, allgather=gather, **options)
        if callable(getattr(source, "rank", None)) and callable(getattr(source, "size", None)):
            return cls.from_torch(source, **options)
        raise TypeError(
            f"a {type(source).__name__} is no group: give an entrepot.Group, a torch process "
            "group, an mpi4py communicator, or an object with rank, size and all_gather_object"
        )

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    @property
    def pointer(self) -> int:
        """The ep_group; raises once the group was closed."""
        pointer = self._owner.pointer
        if pointer is None:
            raise ValueError("the group was closed")
        return pointer

    @property
    def node(self) -> int:
        return lib.ep_group_node(self.pointer)

    @property
    def num_nodes(self) -> int:
        return lib.ep_group_num_nodes(self.pointer)

    @property
    def transport(self) -> str:
        return lib.ep_group_transport(self.pointer).decode()

    @property
    def timeout_ms(self) -> int:
        """Longest wait for a peer; settable."""
        return lib.ep_group_timeout_ms(self.pointer)

    @timeout_ms.setter
    def timeout_ms(self, value: int) -> None:
        check(lib.ep_group_set_timeout_ms(self.pointer, value))

    def barrier(self) -> None:
        """Waits until every rank has entered."""
        with self._owner.lock:
            check(lib.ep_group_barrier(self.pointer))

    def allgather(self, mine: bytes) -> List[bytes]:
        """Every rank's bytes, in rank order; as many on each rank, at most 1 MiB."""
        n = len(mine)
        out = ctypes.create_string_buffer(max(n * self._size, 1))
        with self._owner.lock:
            check(lib.ep_group_allgather(self.pointer, mine, out, n))
        return [out.raw[r * n : (r + 1) * n] for r in range(self._size)]

    # ---------------------------------------------------------- ranks left out

    _mask_flags: Optional[bytes] = None  # as mask_flags() found them, until they may have changed

    def mask(self, rank: int, masked: bool = True) -> None:
        """Leaves a rank out of later calls, or takes it in again. Local: all ranks that are left
        must mask the same ones before their next call; recover() sees to it."""
        with self._owner.lock:
            self._mask_flags = None
            check(lib.ep_group_mask(self.pointer, rank, masked))

    def clear_masks(self) -> None:
        """Takes all masks away. Local; then all ranks must call recover()."""
        with self._owner.lock:
            self._mask_flags = None
            check(lib.ep_group_clear_masks(self.pointer))

    def masked(self) -> List[int]:
        """Ranks that are masked."""
        return self._listed(lib.ep_group_query_masks)

    def late(self) -> List[int]:
        """Ranks that the last WaitTimeoutError or RankDeadError named."""
        return self._listed(lib.ep_group_query_late)

    def mask_flags(self) -> bytes:
        """A byte for each rank, 1 where it is masked."""
        known = self._mask_flags
        if known is None:
            flags = ctypes.create_string_buffer(self._size)
            with self._owner.lock:
                check(lib.ep_group_query_masks(self.pointer, flags))
                known = self._mask_flags = flags.raw
        return known

    def _listed(self, query: Any) -> List[int]:
        flags = ctypes.create_string_buffer(self._size)
        check(query(self.pointer, flags))
        return [r for r, flag in enumerate(flags.raw) if flag]

    def recover(self) -> None:
        """Brings the ranks that are left in step after a call that failed; collective among
        them. Afterwards all mask whom any of them masked, and whoever has ended."""
        with self._owner.lock:
            try:
                check(lib.ep_group_recover(self.pointer))
            finally:
                self._mask_flags = None

    def readmit(self, rank: int) -> None:
        """Takes a masked rank in again, which meanwhile makes its group with rejoin=True and
        then its buffers anew. Collective among the ranks that are not masked."""
        with self._owner.lock:
            try:
                check(lib.ep_group_readmit(self.pointer, rank))
            finally:
                self._mask_flags = None

    def close(self) -> None:
        """Frees the group once everything made on it is gone. Waits for nobody."""
        self._owner.close()

    def __del__(self) -> None:
        if hasattr(self, "_owner"):
            self._owner.close()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"entrepot.Group(rank={self._rank}, size={self._size})"


def _value(source: Any, *names: str) -> Optional[int]:
    """Value of the first attribute there is, called if it is a method."""
    for name in names:
        value = getattr(source, name, None)
        if value is not None:
            return int(value() if callable(value) else value)
    return None


class _Callback:
    """A Python all-gather as an ep_allgather_fn. Exceptions cannot cross C: they are kept."""

    def __init__(self, allgather: Allgather, num_ranks: int):
        self._allgather = allgather
        self._num_ranks = num_ranks
        self._error: Optional[BaseException] = None
        self.function = _abi.AllgatherFn(self._call)

    def take(self) -> Optional[BaseException]:
        error, self._error = self._error, None
        return error

    def _call(self, _context: Any, send: int, recv: int, size: int) -> int:
        try:
            parts = self._allgather(ctypes.string_at(send, size))
            if len(parts) != self._num_ranks or any(len(p) != size for p in parts):
                raise ValueError(
                    f"the all-gather returned parts of {[len(p) for p in parts]} bytes, "
                    f"expected {self._num_ranks} of {size}"
                )
            joined = b"".join(bytes(p) for p in parts)
            ctypes.memmove(recv, joined, len(joined))
            return 0
        except BaseException as error:  # also KeyboardInterrupt: it is raised again in Python
            self._error = error
            return 1
