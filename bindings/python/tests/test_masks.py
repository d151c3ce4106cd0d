# SPDX-License-Identifier: MIT
"""Ranks that are left out: by the caller, or with enable_shrink when they are lost."""

import time

import numpy as np
import pytest
from arrays import CudaTensors, NumpyArrays, needs_cuda
from reference import World, bfloat16, calc_diff

import deep_ep
import entrepot


def _alive_sum(world, rank, gone):
    """Weighted sum of a token's experts on ranks that are left."""
    idx = world.idx[rank]
    kept = (idx >= 0) & ~np.isin(idx // world.local, gone)
    factor = np.where(kept, world.weights[rank], 0).sum(axis=1, keepdims=True)
    return world.x[rank].astype(np.float32) * factor


EITHER = [
    pytest.param(NumpyArrays(), id="numpy"),
    pytest.param(CudaTensors(), id="cuda", marks=needs_cuda),
]


def _layer(buffer, world, rank, hook, gone, arrays, most=16):
    """One decode layer; checks rows, counts and the sum."""
    x, idx, weights = (arrays.to(a[rank]) for a in (world.x, world.idx, world.weights))
    recv, count, handle, _, receive = buffer.low_latency_dispatch(
        x, idx, most, world.experts, use_fp8=False, return_recv_hook=hook
    )
    if hook:
        receive()
    rows_here, count = arrays.back(recv), arrays.back(count)
    for e in range(world.local):
        rows = [
            (s, t)
            for s in range(world.ranks)
            if s not in gone
            for t in range(len(world.x[s]))
            for k in range(world.topk)
            if world.idx[s][t, k] == rank * world.local + e
        ]
        assert count[e] == len(rows)
        want = np.array([world.x[s][t] for s, t in rows], bfloat16).reshape(-1, world.hidden)
        got = rows_here[e, : len(rows)]
        np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
    combined, _, receive = buffer.low_latency_combine(
        recv, idx, weights, handle, return_recv_hook=hook
    )
    if hook:
        receive()
    want = _alive_sum(world, rank, gone)
    assert calc_diff(arrays.back(combined).astype(np.float32), want) < 1e-5


def _masked(buffer, size, arrays):
    status = arrays.to(np.full(size, 7, np.int32))
    buffer.low_latency_query_mask_buffer(status)
    return np.flatnonzero(arrays.back(status)).tolist()


def _shrink(group, world, hook, arrays):
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True)
    for _ in range(2):
        _layer(buffer, world, rank, hook, [], arrays)
    assert _masked(buffer, group.size, arrays) == []
    if arrays.name == "cuda":
        group.timeout_ms = 1500
        if rank == 1:  # a rank that ends while kernels wait for it keeps the device busy a while
            time.sleep(6)
    if rank == 1:
        return "gone"
    for _ in range(3):
        _layer(buffer, world, rank, hook, [1], arrays)
    assert _masked(buffer, group.size, arrays) == [1]
    return "stayed"


@pytest.mark.parametrize("arrays", EITHER)
@pytest.mark.parametrize("hook", [False, True])
def test_lost_ranks_are_left_out(processes, hook, arrays):
    answers = processes(3, _shrink, World(3, 10, 256, 2, 6), hook, arrays)
    assert answers == ["stayed", "gone", "stayed"]


def _lost_at_setup(group, world, hook, arrays):
    """A rank is gone when memory for another shape is set up: then nothing is sent by halves."""
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True)
    _layer(buffer, world, group.rank, hook, [], arrays)
    if group.rank == 1:
        return "gone"
    for _ in range(3):
        _layer(buffer, world, group.rank, hook, [1], arrays, most=24)
    assert _masked(buffer, group.size, arrays) == [1]
    return "stayed"


@pytest.mark.parametrize("hook", [False, True])
def test_ranks_lost_while_memory_is_set_up(processes, hook):
    answers = processes(3, _lost_at_setup, World(3, 10, 256, 2, 6), hook, NumpyArrays())
    assert answers == ["stayed", "gone", "stayed"]


def _in_step(group, arrays):
    """On a GPU ranks stay in step when all of them see a call fail."""
    if arrays.name != "cuda":
        group.recover()


def _refused(group, world, hook, arrays):
    """Rank 1's arguments are wrong in one call: it is not lost, and nobody takes it for that."""
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True)
    _layer(buffer, world, rank, hook, [], arrays)
    x, idx, weights = (arrays.to(a[rank]) for a in (world.x, world.idx, world.weights))
    bad = np.array(world.idx[rank])
    bad[0, 0] = 5000
    expected = entrepot.ArgumentError if rank == 1 else entrepot.AbortedError

    def dispatch(ids):
        got = buffer.low_latency_dispatch(
            x, ids, 16, world.experts, use_fp8=False, return_recv_hook=hook
        )
        if hook:
            got[4]()
        return got

    # A device finds the first, the host the second.
    for ids in (arrays.to(bad), arrays.to(bad.astype(np.float32))):
        with pytest.raises(expected, match="topk_idx" if rank == 1 else "rank 1 gave up: "):
            dispatch(ids if rank == 1 else idx)
        _in_step(group, arrays)
        assert _masked(buffer, group.size, arrays) == []
    recv, _, handle, _, _ = dispatch(idx)
    with pytest.raises(expected, match="topk_weights" if rank == 1 else "rank 1 gave up: "):
        few = weights[:, :1] if rank == 1 else weights
        _, _, receive = buffer.low_latency_combine(recv, idx, few, handle, return_recv_hook=hook)
        if hook:
            receive()
    _in_step(group, arrays)
    for _ in range(2):
        _layer(buffer, world, rank, hook, [], arrays)
    return _masked(buffer, group.size, arrays)


@pytest.mark.parametrize("arrays", EITHER)
@pytest.mark.parametrize("hook", [False, True])
def test_ranks_that_refuse_are_not_lost(processes, hook, arrays):
    assert processes(3, _refused, World(3, 10, 256, 2, 6), hook, arrays) == [[], [], []]


def _by_hand(group, world, arrays):
    """The caller masks a rank that still lives, goes on without it, and takes it in again."""
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    _layer(buffer, world, rank, False, [], arrays)
    group.barrier()
    if rank != 2:
        buffer.low_latency_update_mask_buffer(2, True)
        assert _masked(buffer, 3, arrays) == [2]
        _layer(buffer, world, rank, True, [2], arrays)
        _layer(buffer, world, rank, False, [2], arrays)
    with pytest.raises(entrepot.ArgumentError, match="mask_status"):
        buffer.low_latency_query_mask_buffer(np.zeros(2, np.int32))
    return _masked(buffer, 3, arrays)


@pytest.mark.parametrize("arrays", EITHER)
def test_masks_by_hand(run, arrays):
    assert run(3, _by_hand, World(3, 10, 256, 2, 6), arrays) == [[2], [2], []]


def _without_shrink(group):
    x, idx = np.ones((2, 64), bfloat16), np.array([[0], [1]])
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    buffer.low_latency_dispatch(x, idx, 4, 2)
    if group.rank == 1:
        return
    with pytest.raises((entrepot.RankDeadError, entrepot.WaitTimeoutError), match="rank 1"):
        buffer.low_latency_dispatch(x, idx, 4, 2)
    assert group.late() == [1] and group.masked() == []


def test_without_shrink_a_lost_rank_is_an_error(processes):
    processes(2, _without_shrink)
