# SPDX-License-Identifier: MIT
"""Ranks that are left out: by the caller, or with enable_shrink when they are lost."""

import numpy as np
import pytest
from reference import World, bfloat16, calc_diff

import deep_ep
import entrepot


def _alive_sum(world, rank, gone):
    """Weighted sum of a token's experts on ranks that are left."""
    idx = world.idx[rank]
    kept = (idx >= 0) & ~np.isin(idx // world.local, gone)
    factor = np.where(kept, world.weights[rank], 0).sum(axis=1, keepdims=True)
    return world.x[rank].astype(np.float32) * factor


def _layer(buffer, world, rank, hook, gone):
    """One decode layer; checks rows, counts and the sum."""
    x, idx, weights = world.x[rank], world.idx[rank], world.weights[rank]
    recv, count, handle, _, receive = buffer.low_latency_dispatch(
        x, idx, 16, world.experts, use_fp8=False, return_recv_hook=hook
    )
    if hook:
        receive()
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
        np.testing.assert_array_equal(recv[e, : len(rows)].view(np.uint16), want.view(np.uint16))
    combined, _, receive = buffer.low_latency_combine(
        recv, idx, weights, handle, return_recv_hook=hook
    )
    if hook:
        receive()
    assert calc_diff(combined.astype(np.float32), _alive_sum(world, rank, gone)) < 1e-5


def _masked(buffer, size):
    status = np.full(size, 7, np.int32)
    buffer.low_latency_query_mask_buffer(status)
    return np.flatnonzero(status).tolist()


def _shrink(group, world, hook):
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True, enable_shrink=True)
    for _ in range(2):
        _layer(buffer, world, rank, hook, [])
    assert _masked(buffer, group.size) == []
    if rank == 1:
        return "gone"
    for _ in range(3):
        _layer(buffer, world, rank, hook, [1])
    assert _masked(buffer, group.size) == [1]
    return "stayed"


@pytest.mark.parametrize("hook", [False, True])
def test_lost_ranks_are_left_out(processes, hook):
    answers = processes(3, _shrink, World(3, 10, 256, 2, 6), hook)
    assert answers == ["stayed", "gone", "stayed"]


def _by_hand(group, world):
    """The caller masks a rank that still lives, goes on without it, and takes it in again."""
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    _layer(buffer, world, rank, False, [])
    group.barrier()
    if rank != 2:
        buffer.low_latency_update_mask_buffer(2, True)
        assert _masked(buffer, 3) == [2]
        _layer(buffer, world, rank, True, [2])
        _layer(buffer, world, rank, False, [2])
    with pytest.raises(entrepot.ArgumentError, match="mask_status"):
        buffer.low_latency_query_mask_buffer(np.zeros(2, np.int32))
    return _masked(buffer, 3)


def test_masks_by_hand(run):
    assert run(3, _by_hand, World(3, 10, 256, 2, 6)) == [[2], [2], []]


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
