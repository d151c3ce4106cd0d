# SPDX-License-Identifier: MIT
"""Groups of other libraries, and the environment of launchers."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import pytest

import deep_ep
import entrepot


class _Communicator:
    """What is used of an mpi4py communicator."""

    def __init__(self, group):
        self._group = group

    def Get_rank(self):
        return self._group.rank

    def Get_size(self):
        return self._group.size

    def allgather(self, mine):
        return self._group.allgather(mine)


class _Stateless:
    """A process group without torch, as vLLM has one."""

    def __init__(self, group):
        self._group = group
        self.rank, self.world_size = group.rank, group.size

    def all_gather_obj(self, mine):
        return self._group.allgather(mine)


def _use(buffer, size):
    idx = np.arange(2 * size, dtype=np.int64)[:, None] % size
    x = np.full((2 * size, 8), buffer.rank + 1, np.float32)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, size)
    rows, _, _, _, handle, _ = buffer.dispatch(
        x, topk_idx=idx, num_tokens_per_expert=per_expert, is_token_in_rank=in_rank
    )
    assert rows[:, 0].tolist() == [s + 1 for s in range(size) for _ in range(2)]
    combined, _, _ = buffer.combine(rows, handle)
    assert (combined == x).all()


def _others(group):
    comm = _Communicator(group)
    buffer = deep_ep.Buffer(None, comm=comm)
    assert buffer.group is comm
    _use(buffer, group.size)
    _use(deep_ep.Buffer(_Stateless(group)), group.size)
    with pytest.raises(ValueError, match="group or comm"):
        deep_ep.Buffer(None)
    with pytest.raises(TypeError, match="is no group"):
        deep_ep.Buffer(object())


def test_groups_of_other_libraries(processes):
    processes(3, _others)


def _tcp(rank, addresses, queue):
    with entrepot.Group.from_addresses(addresses, rank) as group:
        _use(deep_ep.Buffer(group), group.size)
        queue.put(group.rank)


def test_addresses_of_hosts():
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    addresses = [f"127.0.0.1:{port}" for port in ports]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    ranks = [context.Process(target=_tcp, args=(r, addresses, queue)) for r in range(2)]
    for process in ranks:
        process.start()
    assert sorted(queue.get(timeout=30) for _ in ranks) == [0, 1]
    for process in ranks:
        process.join()
        assert process.exitcode == 0


_PROGRAM = r"""
import os
import numpy as np, deep_ep, entrepot
group = entrepot.Group()
assert group.size == 2, group.size
x = np.full((2, 8), group.rank, np.float32)
idx = np.array([[0], [1]])
buffer = entrepot.Buffer(group)
got = buffer.dispatch(x, idx, num_experts=2)
assert got.x[:, 0].tolist() == [0, 1]
os.write(1, f"rank {group.rank} is well\n".encode())
"""


def _launch(command):
    package = os.path.dirname(os.path.dirname(os.path.abspath(entrepot.__file__)))
    environment = {**os.environ, "PYTHONPATH": package}
    done = subprocess.run(
        [*command, sys.executable, "-c", _PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 0 is well" in done.stdout and "rank 1 is well" in done.stdout


def test_entrepot_run():
    command = os.path.join(os.path.dirname(os.environ.get("EP_LIBRARY", "")), "../bin/entrepot")
    if not os.path.exists(command):
        pytest.skip("the entrepot command is not beside the library")
    _launch([command, "run", "-n", "2", "--"])


def test_mpirun():
    if shutil.which("mpirun") is None:
        pytest.skip("mpirun is not installed")
    _launch(["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"])


def _fails(allgather, expected):
    with pytest.raises(expected) as error:
        entrepot.Group(0, 2, allgather=allgather)
    return error.value


def test_what_the_allgather_raises():
    """Its kind and its text reach the caller; what is no Exception is raised as it is."""

    def raising(problem):
        def allgather(_):
            raise problem

        return allgather

    error = _fails(raising(TimeoutError("rank 1 is late")), TimeoutError)
    assert isinstance(error, entrepot.WaitTimeoutError) and "rank 1 is late" in str(error)
    assert isinstance(error.__cause__, TimeoutError)
    error = _fails(raising(OSError("no such host")), entrepot.SystemCallError)
    assert "allgather" in str(error) and "OSError: no such host" in str(error)
    assert isinstance(error.__cause__, OSError)
    for problem in (KeyboardInterrupt(), SystemExit(3), entrepot.RankDeadError("rank 1")):
        assert _fails(raising(problem), type(problem)) is problem


def test_a_late_rank(tmp_path):
    addresses = [str(tmp_path / name) for name in "ab"]
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not connect within 0.2 s"):
        entrepot.Group.from_addresses(addresses, 0, timeout_ms=200)
    with pytest.raises(TimeoutError, match="rank 0 at .*/a: not heard from in time"):
        entrepot.Group.from_addresses(addresses, 1, timeout_ms=200)
    with socket.socket(socket.AF_UNIX) as full, socket.socket(socket.AF_UNIX) as waiting:
        full.bind(addresses[0])
        full.listen(0)
        waiting.connect(addresses[0])  # and nobody else may
        with pytest.raises(TimeoutError, match="rank 0 at .*/a: not heard from in time"):
            entrepot.Group.from_addresses(addresses, 1, timeout_ms=200)


def test_an_interrupt_while_ranks_are_awaited(tmp_path):
    addresses = [str(tmp_path / name) for name in "ab"]
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        entrepot.Group.from_addresses(addresses, 0, timeout_ms=10000)
    timer.join()
