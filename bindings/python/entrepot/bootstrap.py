# SPDX-License-Identifier: MIT
"""All-gather over sockets between ranks that only know each other's addresses.

Rank 0 listens at its address, the others connect to it; each all-gather goes
through rank 0. Every message is a length and as many bytes, and nothing that
arrives is interpreted, so a stranger who connects can at worst make the
group's creation fail.
"""

import os
import socket
import struct
import time
from typing import Dict, List, Optional, Sequence, Tuple, Union

_HELLO = struct.Struct("!8sII")  # magic, rank, number of ranks
_LENGTH = struct.Struct("!Q")
_MAGIC = b"EPBOOT01"
_MAX_BYTES = 1 << 24


def _parse(address: str) -> Tuple[int, Union[str, Tuple[str, int]]]:
    if "/" in address:
        return socket.AF_UNIX, address
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(f"address {address!r} is neither host:port nor the path of a Unix socket")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return family, (host.strip("[]"), int(port))


class AddressBook:
    """The ranks' addresses; connects at the first all-gather."""

    def __init__(self, addresses: Sequence[str], rank: int, timeout_ms: int = 0):
        if not 0 <= rank < len(addresses):
            raise ValueError(f"rank is {rank}; it must be 0..{len(addresses) - 1}")
        self._family, self._root = _parse(addresses[0])
        for address in addresses:
            _parse(address)
        self._rank, self._size = rank, len(addresses)
        milliseconds = timeout_ms or int(os.environ.get("EP_TIMEOUT_MS", 30000))
        self._seconds = milliseconds / 1000.0
        self._peers: Optional[Dict[int, socket.socket]] = None

    def allgather(self, mine: bytes) -> List[bytes]:
        """Every rank's bytes, in rank order. Raises TimeoutError naming who did not come."""
        deadline = time.monotonic() + self._seconds
        if self._peers is None:
            self._peers = self._listen(deadline) if self._rank == 0 else self._connect(deadline)
        if self._rank:
            root = self._peers[0]
            _send(root, mine, deadline, "rank 0")
            return [_receive(root, deadline, "rank 0") for _ in range(self._size)]
        parts = [mine]
        for r in range(1, self._size):
            parts.append(_receive(self._peers[r], deadline, f"rank {r}"))
        for r in range(1, self._size):
            for part in parts:
                _send(self._peers[r], part, deadline, f"rank {r}")
        return parts

    def _listen(self, deadline: float) -> Dict[int, socket.socket]:
        peers: Dict[int, socket.socket] = {}
        with socket.socket(self._family, socket.SOCK_STREAM) as server:
            if self._family != socket.AF_UNIX:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(self._root)
            server.listen(self._size)
            try:
                while len(peers) < self._size - 1:
                    self._accept(server, peers, deadline)
            finally:
                if self._family == socket.AF_UNIX:
                    os.unlink(str(self._root))
        return peers

    def _accept(
        self, server: socket.socket, peers: Dict[int, socket.socket], deadline: float
    ) -> None:
        late = [r for r in range(1, self._size) if r not in peers]
        server.settimeout(_left(deadline, f"ranks {late}"))
        try:
            connection, _ = server.accept()
        except socket.timeout:
            raise TimeoutError(f"ranks {late} did not connect within {self._seconds:g} s") from None
        try:
            hello = _exactly(connection, _HELLO.size, deadline, "a connecting rank")
        except OSError:
            connection.close()  # a stranger who said nothing
            return
        magic, rank, size = _HELLO.unpack(hello)
        if magic != _MAGIC or size != self._size or not 0 < rank < size or rank in peers:
            connection.close()
            if magic == _MAGIC:
                raise ValueError(f"rank {rank} of {size} connected to a group of {self._size}")
            return
        peers[rank] = connection

    def _connect(self, deadline: float) -> Dict[int, socket.socket]:
        while True:
            root = socket.socket(self._family, socket.SOCK_STREAM)
            whom = f"rank 0 at {self._root}"
            root.settimeout(_left(deadline, whom))
            try:
                root.connect(self._root)
                root.sendall(_HELLO.pack(_MAGIC, self._rank, self._size))
                return {0: root}
            except socket.timeout:
                root.close()
                raise TimeoutError(f"{whom}: not heard from in time") from None
            except (ConnectionError, FileNotFoundError, BlockingIOError):
                root.close()  # rank 0 does not listen yet, or others wait to be let in
                time.sleep(0.01)


def _left(deadline: float, whom: str) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"{whom}: not heard from in time")
    return left


def _send(peer: socket.socket, data: bytes, deadline: float, whom: str) -> None:
    peer.settimeout(_left(deadline, whom))
    try:
        peer.sendall(_LENGTH.pack(len(data)) + data)
    except socket.timeout:
        raise TimeoutError(f"{whom}: takes nothing in time") from None


def _receive(peer: socket.socket, deadline: float, whom: str) -> bytes:
    (size,) = _LENGTH.unpack(_exactly(peer, _LENGTH.size, deadline, whom))
    if size > _MAX_BYTES:
        raise ValueError(f"{whom} announced {size} bytes; at most {_MAX_BYTES} are possible")
    return _exactly(peer, size, deadline, whom)


def _exactly(peer: socket.socket, size: int, deadline: float, whom: str) -> bytes:
    data = bytearray()
    while len(data) < size:
        peer.settimeout(_left(deadline, whom))
        try:
            piece = peer.recv(size - len(data))
        except socket.timeout:
            raise TimeoutError(f"{whom}: not heard from in time") from None
        if not piece:
            raise ConnectionError(f"{whom} closed the connection")
        data += piece
    return bytes(data)
