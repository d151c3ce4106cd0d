# SPDX-License-Identifier: MIT
"""Ctrl-C while a call waits: it costs that call's result, and nothing else."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from reference import World

import deep_ep
import entrepot

ROUNDS = 4


def _interrupted(rank, call):
    """Rank 0 is interrupted while it waits for rank 1."""
    if rank != 0:
        time.sleep(0.3)
        call()
        return
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        call()
    timer.join()


def _normal(group, world):
    rank = group.rank
    buffer = entrepot.Buffer(group, num_threads=1)
    x, idx = np.repeat(world.x[rank], 64, axis=0), np.repeat(world.idx[rank], 64, axis=0)
    used = []
    for i in range(ROUNDS):
        if i % 2:
            _interrupted(
                rank, lambda: buffer.dispatch_async(x, idx, num_experts=world.experts).wait()
            )
        else:
            _interrupted(rank, lambda: buffer.dispatch(x, idx, num_experts=world.experts))
        buffer.dispatch(x, idx, num_experts=world.experts)
        used.append(buffer.query().used_bytes)
    assert used == [0] * ROUNDS


def test_normal(processes):
    processes(2, _normal, World(2, 16, 256, 2, 4))


def _low_latency(group, world):
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    x, idx, weights = world.x[rank], world.idx[rank], world.weights[rank]

    def dispatch():
        return buffer.low_latency_dispatch(x, idx, 16, world.experts, use_fp8=False)

    dispatch()
    for _ in range(ROUNDS):
        _interrupted(rank, dispatch)
    recv, _, handle, _, _ = dispatch()
    combined, _, _ = buffer.low_latency_combine(recv, idx, weights, handle)
    assert combined.shape == x.shape


def test_low_latency(processes):
    processes(2, _low_latency, World(2, 16, 256, 2, 4))
