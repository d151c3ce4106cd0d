# SPDX-License-Identifier: MIT
"""The entrepot package: groups, dispatch, combine, events, lifetimes, errors."""

import array
import ctypes
import gc
import os
import time

import numpy as np
import pytest
from reference import World, bfloat16, dequantise, float8, quantise

import entrepot


def _round_trip(group, world, kwargs):
    rank = group.rank
    with entrepot.Buffer(group, **kwargs) as buffer:
        got = buffer.dispatch(
            world.x[rank], world.idx[rank], world.weights[rank], num_experts=world.experts
        )
        x, idx, weights, counts = world.received(rank)
        assert got.num_rows == len(x) and got.x.dtype == x.dtype
        np.testing.assert_array_equal(got.x.view(np.uint16), x.view(np.uint16))
        np.testing.assert_array_equal(got.topk_idx, idx)
        np.testing.assert_array_equal(got.topk_weights, weights)
        assert got.tokens_per_expert == counts
        rows = world.rows(rank)
        assert got.source_token.tolist() == [t for _, t in rows]
        assert got.source_offset.tolist() == [
            sum(s < r for s, _ in rows) for r in range(group.size + 1)
        ]
        # The outputs of different ranks differ, so that a mixed-up sum is seen.
        y = (got.x.astype(np.float32) * (rank + 1)).astype(bfloat16)
        out, out_weights = buffer.combine(y, got.handle, got.topk_weights)
        outputs = [
            (world.received(r)[0].astype(np.float32) * (r + 1)).astype(bfloat16)
            for r in range(group.size)
        ]
        np.testing.assert_array_equal(
            out.view(np.uint16), world.combined(rank, outputs).view(np.uint16)
        )
        kept = np.where(world.idx[rank] >= 0, world.weights[rank], 0)
        np.testing.assert_array_equal(out_weights, kept)
        again = buffer.dispatch_cached(world.x[rank], got.handle)
        np.testing.assert_array_equal(again.x.view(np.uint16), x.view(np.uint16))
        assert again.handle is got.handle
    return got.num_rows


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("kwargs", [{}, {"verify": True, "num_threads": 1}])
def test_round_trip(run, num_ranks, kwargs):
    world = World(num_ranks, 37, 136, 3, 4 * num_ranks, seed=num_ranks)
    rows = run(num_ranks, _round_trip, world, kwargs)
    assert sum(rows) == sum(len(world.rows(r)) for r in range(num_ranks))


def test_zero_tokens(run):
    run(3, _round_trip, World(3, [5, 0, 2], 64, 2, 6), {})
    run(2, _round_trip, World(2, [0, 0], 64, 2, 6), {})


def _options(group, world):
    rank = group.rank
    buffer = entrepot.Buffer(group)
    x, idx, weights, counts = world.received(rank)

    aligned = buffer.dispatch(
        world.x[rank],
        world.idx[rank].astype(np.int32),
        num_experts=world.experts,
        expert_alignment=16,
    )
    assert aligned.topk_idx.dtype == np.int32 and aligned.topk_weights is None
    assert aligned.tokens_per_expert == [-(-c // 16) * 16 for c in counts]

    bound = world.ranks * len(world.x[0])
    worst = buffer.dispatch(
        world.x[rank],
        world.idx[rank],
        world.weights[rank],
        num_experts=world.experts,
        num_worst_tokens=bound,
    )
    assert worst.x.shape == (bound, world.hidden) and worst.num_rows == len(x)
    np.testing.assert_array_equal(worst.topk_idx[: len(x)], idx)
    assert (worst.topk_idx[len(x) :] == -1).all()

    q, scales = quantise(world.x[rank])
    strided = np.ascontiguousarray(scales.T).T
    narrow = buffer.dispatch(q, world.idx[rank], num_experts=world.experts, scales=strided)
    want_q, want_scales = quantise(x)
    assert narrow.x.dtype == float8
    np.testing.assert_array_equal(narrow.x.view(np.uint8), want_q.view(np.uint8))
    np.testing.assert_array_equal(narrow.scales, want_scales)

    fly = buffer.dispatch(world.x[rank], world.idx[rank], num_experts=world.experts, wire="fp8")
    np.testing.assert_array_equal(fly.x.view(np.uint8), want_q.view(np.uint8))
    np.testing.assert_array_equal(fly.scales, want_scales)

    packed = buffer.dispatch(
        world.x[rank], world.idx[rank], num_experts=world.experts, wire="fp8", scale="ue8m0"
    )
    exponents = packed.scales.view(np.uint8).reshape(len(x), -1)[:, : world.hidden // 128]
    unpacked = (exponents.astype(np.uint32) << 23).view(np.float32)
    error = dequantise(packed.x, unpacked) - x.astype(np.float32)
    assert np.abs(error).max() <= np.abs(x.astype(np.float32)).max() / 8

    table = np.arange(world.experts, dtype=np.int32)[::-1] // world.local
    moved = buffer.dispatch(
        world.x[rank], world.idx[rank], num_experts=world.experts, expert_rank=table.copy()
    )
    mine = np.flatnonzero(table == rank)
    expected = [
        (s, t)
        for s in range(world.ranks)
        for t in range(len(world.x[s]))
        if np.isin(world.idx[s][t], mine).any()
    ]
    assert moved.source_token.tolist() == [t for _, t in expected]

    bias = [np.full_like(world.x[rank], 0.5), np.full_like(world.x[rank], -2)]
    got = buffer.dispatch(world.x[rank], world.idx[rank], num_experts=world.experts)
    out = np.empty_like(world.x[rank])
    result, no_weights = buffer.combine(got.x, got.handle, bias=bias, out=out)
    assert result is out and no_weights is None
    copies = world.in_rank(rank).sum(axis=1, keepdims=True)
    want = world.x[rank].astype(np.float32) * copies + 0.5 - 2
    np.testing.assert_allclose(out.astype(np.float32), want, rtol=2e-2, atol=2e-2)


def test_options_of_dispatch_and_combine(run):
    run(2, _options, World(2, 40, 512, 3, 8, seed=5))


def _by_expert(group, world):
    rank = group.rank
    buffer = entrepot.Buffer(group)
    got = buffer.dispatch(
        world.x[rank],
        world.idx[rank],
        world.weights[rank],
        num_experts=world.experts,
        layout="expert",
        expert_alignment=8,
    )
    first = got.expert_offset.tolist()
    for e in range(world.local):
        pairs = [
            (s, t)
            for s in range(world.ranks)
            for t in range(len(world.x[s]))
            if (world.idx[s][t] == rank * world.local + e).any()
        ]
        assert first[e + 1] - first[e] == -(-len(pairs) // 8) * 8 == got.tokens_per_expert[e]
        here = got.source_token[first[e] : first[e + 1]]
        assert here[: len(pairs)].tolist() == [t for _, t in pairs]
        assert (here[len(pairs) :] == -1).all()
    out, _ = buffer.combine(got.x, got.handle)
    kept = np.where(world.idx[rank] >= 0, world.weights[rank], 0).sum(axis=1, keepdims=True)
    want = world.x[rank].astype(np.float32) * kept
    np.testing.assert_allclose(out.astype(np.float32), want, rtol=2e-2, atol=2e-2)
    assert got.handle.send_rank.shape == world.idx[rank].shape


def test_rows_by_expert(run):
    run(2, _by_expert, World(2, 33, 64, 2, 6, seed=9))


def _events(group, world, threads):
    rank = group.rank
    buffer = entrepot.Buffer(group, num_threads=threads)
    first = buffer.dispatch_async(world.x[rank], world.idx[rank], num_experts=world.experts)
    second = buffer.dispatch_async(
        world.x[rank], world.idx[rank], num_experts=world.experts, previous=first
    )
    got = second.wait()
    assert first.done() and first.wait().num_rows == got.num_rows == len(world.rows(rank))
    event = buffer.combine_async(got.x, got.handle)
    while not event.done():
        pass
    out, _ = event.wait()
    copies = world.in_rank(rank).sum(axis=1, keepdims=True)
    want = world.x[rank].astype(np.float32) * copies
    np.testing.assert_allclose(out.astype(np.float32), want, rtol=1e-2)
    # Known before the rows are there: combined without waiting, and given up.
    third = buffer.dispatch_async(world.x[rank], world.idx[rank], num_experts=world.experts)
    early = third.wait_counts()
    assert early.x.shape == got.x.shape and early.tokens_per_expert == got.tokens_per_expert
    late, _ = buffer.combine_async(early.x, early.handle).wait()
    np.testing.assert_array_equal(late.view(np.uint16), out.view(np.uint16))
    assert third.wait() is early
    cached = buffer.dispatch_cached_async(world.x[rank], early.handle)
    assert cached.wait_counts().x.shape == got.x.shape
    del cached
    # Dropped without being waited for: the call is carried out all the same.
    buffer.combine_async(got.x, got.handle)
    again, _ = buffer.combine(got.x, got.handle)
    np.testing.assert_array_equal(again.view(np.uint16), out.view(np.uint16))


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_events(run, threads):
    run(2, _events, World(2, 25, 64, 2, 4), threads)


def _lifetimes(group, world):
    rank = group.rank
    buffer = entrepot.Buffer(group)
    got = buffer.dispatch(world.x[rank], world.idx[rank], num_experts=world.experts)
    used = buffer.query().used_bytes
    assert used >= got.x.nbytes
    x, copy = got.x, got.x.copy()
    source = got.source_token
    del got
    gc.collect()
    assert buffer.query().used_bytes == used  # the views hold it
    buffer.close()
    with pytest.raises(ValueError, match="closed"):
        buffer.query()
    del buffer
    gc.collect()
    np.testing.assert_array_equal(x.view(np.uint16), copy.view(np.uint16))
    del x, source

    buffer = entrepot.Buffer(group)
    for _ in range(20):
        got = buffer.dispatch(world.x[rank], world.idx[rank], num_experts=world.experts)
    peak = buffer.query()
    assert peak.used_bytes <= 2 * used
    del got
    assert buffer.query().used_bytes == 0
    y = buffer.alloc((7, 8), bfloat16)
    y[...] = 3
    assert buffer.query().used_bytes >= y.nbytes
    del y
    assert buffer.query().used_bytes == 0


def test_views_keep_the_window_alive(run):
    run(2, _lifetimes, World(2, 64, 256, 2, 4))


def _forked(group, world):
    """As the workers of a data loader: they inherit everything, use nothing, collect and end."""
    rank = group.rank
    buffer = entrepot.Buffer(group, num_threads=1)
    got = buffer.dispatch(world.x[rank], world.idx[rank], num_experts=world.experts)
    event = buffer.dispatch_async(world.x[rank], world.idx[rank], num_experts=world.experts)
    child = os.fork()
    if child == 0:
        try:
            with pytest.raises(ValueError, match="closed"):
                buffer.dispatch(world.x[rank], world.idx[rank], num_experts=world.experts)
            del got, event, buffer, group
            gc.collect()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended == (child, 0)
    event.wait()
    y = got.x.copy()
    buffer.combine(y, got.handle)
    group.barrier()


def test_forked_processes_leave_the_ranks_alone(processes):
    processes(2, _forked, World(2, 64, 256, 2, 4))


def _errors(group, world):
    rank = group.rank
    buffer = entrepot.Buffer(group, max_experts=64)
    x, idx = world.x[rank], world.idx[rank]
    bad = idx.copy()
    bad[0, 0] = 99
    with pytest.raises(entrepot.ArgumentError, match="99") as error:
        buffer.dispatch(x, bad, num_experts=world.experts)
    assert error.value.status is entrepot.Status.ERR_ARGUMENT
    assert str(error.value).startswith("EP_ERR_ARGUMENT: ")
    assert isinstance(error.value, ValueError) and isinstance(error.value, RuntimeError)
    with pytest.raises(entrepot.MismatchError, match="hidden"):
        buffer.dispatch(x[:, : 8 * (rank + 1)], idx, num_experts=world.experts)
    with pytest.raises(entrepot.CapacityError):
        buffer.dispatch(x, idx, num_experts=world.experts, num_worst_tokens=1)
    if rank == 0:
        with pytest.raises(entrepot.ArgumentError):
            buffer.dispatch(x, idx, num_experts=0)
    else:
        with pytest.raises(entrepot.AbortedError, match="rank 0"):
            buffer.dispatch(x, idx, num_experts=world.experts)
    for wrong in ({"wire": "int4"}, {"scale": "x"}, {"layout": "row"}):
        with pytest.raises(ValueError, match="it can be"):
            buffer.dispatch(x, idx, num_experts=world.experts, **wrong)
    with pytest.raises(TypeError, match="complex"):
        buffer.dispatch(np.zeros((1, 8), np.complex64), idx, num_experts=world.experts)
    with pytest.raises(TypeError, match="no tensor"):
        buffer.dispatch("rows", idx, num_experts=world.experts)
    got = buffer.dispatch(x, idx, num_experts=world.experts)  # usable after all that
    assert got.num_rows == len(world.rows(rank))
    out = np.zeros_like(x)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out is read-only"):
        buffer.combine(got.x, got.handle, out=out)
    assert not out.any()


def test_errors_name_the_argument(run):
    run(2, _errors, World(2, 6, 64, 2, 4, drop=0))


def _buffers(group, world):
    """Objects that have the buffer protocol, and the arrays that come of them."""
    rank = group.rank
    buffer = entrepot.Buffer(group)
    x = world.x[rank].astype(np.float32)
    args = {"num_experts": world.experts}
    idx, weights = memoryview(world.idx[rank]), memoryview(world.weights[rank])
    want = buffer.dispatch(x, world.idx[rank], world.weights[rank], **args)
    in_ctypes = (ctypes.c_float * x.shape[1] * x.shape[0]).from_buffer(x)
    for rows in (memoryview(x), memoryview(np.repeat(x, 2, axis=0))[::2], in_ctypes):
        got = buffer.dispatch(rows, idx, weights, **args)
        assert type(got.x) is np.ndarray
        np.testing.assert_array_equal(got.x, want.x)
        np.testing.assert_array_equal(got.topk_idx, want.topk_idx)
        np.testing.assert_array_equal(got.topk_weights, want.topk_weights)
    out = np.empty_like(x)
    buffer.combine(memoryview(got.x), got.handle, bias=(memoryview(x),), out=memoryview(out))
    np.testing.assert_array_equal(out, buffer.combine(want.x, want.handle, bias=(x,))[0])
    with pytest.raises(ValueError, match="out is read-only"):
        buffer.combine(got.x, got.handle, out=memoryview(out).toreadonly())
    cost = array.array("q", [-1, -1])
    buffer.ll_dispatch(world.x[rank], idx, max_tokens=6, wait_cost=cost, **args)
    assert cost[rank] == -1
    layouts = [entrepot.layout(ids, world.experts, 2) for ids in (idx, world.idx[rank])]
    for got, want in zip(*layouts):
        np.testing.assert_array_equal(got, want)
    for wrong, expected, text in (
        (b"rows", entrepot.ArgumentError, "x.ndim is 1"),
        ("rows", TypeError, "a str is no tensor"),
        (np.float32(3), TypeError, "but a single number"),
        (memoryview(x.astype(np.int16)), TypeError, "an array of int16"),
        ((ctypes.c_wchar * 4)(), TypeError, "its buffer cannot be read"),
    ):
        with pytest.raises(expected, match=text):
            buffer.dispatch(wrong, idx, **args)


def test_buffer_protocol(run):
    run(2, _buffers, World(2, 6, 64, 2, 4, drop=0))


def _diagnosis(group, world):
    rank = group.rank
    buffer = entrepot.Buffer(group)
    phases = []
    buffer.set_trace(phases.append)
    buffer.dispatch(world.x[rank], world.idx[rank], num_experts=world.experts)
    buffer.set_trace(None)
    buffer.dispatch(world.x[rank], world.idx[rank], num_experts=world.experts)
    assert phases and all(p.rank == rank and p.call == 1 for p in phases)
    assert all(p.name == "ep_dispatch" and p.begin_ns <= p.end_ns for p in phases)
    cost = buffer.wait_cost()
    assert cost.shape == (2,) and (cost >= 0).all()
    matrix = buffer.wait_matrix(reset=True)
    np.testing.assert_array_equal(matrix[rank], cost)
    assert buffer.wait_cost().sum() == 0


def test_diagnosis(run):
    run(2, _diagnosis, World(2, 20, 64, 2, 4))


def _late(group):
    group.timeout_ms = 300
    assert group.timeout_ms == 300
    if group.rank == 0:
        with pytest.raises(entrepot.WaitTimeoutError, match="rank 1") as error:
            group.barrier()
        assert isinstance(error.value, TimeoutError)


def test_timeout_names_the_late_rank(threads):
    threads(2, _late)


def _group(group):
    assert (group.size, group.node, group.num_nodes) == (3, 0, 1)
    assert group.allgather(bytes([group.rank, 7])) == [bytes([r, 7]) for r in range(3)]
    group.barrier()
    return group.rank, group.transport


def test_group(run):
    answers = run(3, _group)
    assert [rank for rank, _ in answers] == [0, 1, 2]


def test_single_rank_without_a_launcher(monkeypatch):
    import os

    for name in list(os.environ):
        if name.startswith(("EP_RANK", "EP_NUM_", "OMPI_", "PMI_", "SLURM_", "RANK", "WORLD_")):
            monkeypatch.delenv(name)
    with entrepot.Group() as group:
        assert (group.rank, group.size) == (0, 1)


def test_allgather_errors_become_the_cause():
    def broken(mine):
        raise KeyError("lost")

    with pytest.raises(entrepot.Error) as error:
        entrepot.Group(0, 2, allgather=broken)
    assert isinstance(error.value.__cause__, KeyError)

    with pytest.raises(entrepot.Error) as error:
        entrepot.Group(0, 2, allgather=lambda mine: [mine])
    assert "expected 2" in str(error.value.__cause__)


def test_addresses_are_checked():
    with pytest.raises(ValueError, match="neither host:port"):
        entrepot.Group.from_addresses(["nowhere", "here:1"], 0)
    with pytest.raises(ValueError, match="rank is 2"):
        entrepot.Group.from_addresses(["/tmp/a", "/tmp/b"], 2)
    with pytest.raises(entrepot.Error) as error:
        entrepot.Group.from_addresses(["127.0.0.1:9", "127.0.0.1:9"], 1, timeout_ms=200)
    assert isinstance(error.value.__cause__, TimeoutError)


def test_layout():
    idx = np.array([[0, 3], [1, -1], [-1, -1], [2, 3]], np.int64)
    counts = entrepot.layout(idx, 4, 2, ranks_per_node=1)
    assert counts.tokens_per_rank.tolist() == [2, 2]
    assert counts.tokens_per_node.tolist() == [2, 2]
    assert counts.tokens_per_expert.tolist() == [1, 1, 1, 2]
    assert counts.token_in_rank.dtype == np.bool_
    assert counts.token_in_rank.tolist() == [
        [True, True],
        [True, False],
        [False, False],
        [False, True],
    ]
    with pytest.raises(entrepot.ArgumentError, match=r"topk_idx.* is 3"):
        entrepot.layout(idx, 3, 1)


def test_sizes():
    size = entrepot.normal_size(num_ranks=8, num_tokens=128, hidden=7168, topk=8, num_experts=256)
    assert size.row_bytes == 7168 * 2 + 8 * 8 + 8 * 4 + 4
    assert size.expected_bytes <= size.worst_bytes
    assert size.worst_bytes >= 8 * 128 * size.row_bytes


class _Foreign:
    """A tensor of some other library: only DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__()

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def _foreign(group, world):
    rank = group.rank
    buffer = entrepot.Buffer(group)
    x = world.x[rank].astype(np.float32)
    got = buffer.dispatch(_Foreign(x), _Foreign(world.idx[rank]), num_experts=world.experts)
    assert isinstance(got.x, np.ndarray)
    np.testing.assert_array_equal(got.x, world.received(rank)[0].astype(np.float32))


def test_dlpack_tensors(run):
    run(2, _foreign, World(2, 9, 16, 2, 4))
