# SPDX-License-Identifier: MIT
"""deep_ep's low-latency calls: slices, counts, hooks, scales, lifetimes."""

import threading
import time

import numpy as np
import pytest
from arrays import ALL
from reference import World, bfloat16, calc_diff, dequantise, quantise

import deep_ep
import entrepot


def _expert_rows(world, expert):
    """(source, token) of the rows of an expert, in order."""
    return [
        (s, t)
        for s in range(world.ranks)
        for t in range(len(world.x[s]))
        for k in range(world.topk)
        if world.idx[s][t, k] == expert
    ]


def _weighted(world, rank, factor=1.0):
    kept = np.where(world.idx[rank] >= 0, world.weights[rank], 0).sum(axis=1, keepdims=True)
    return world.x[rank].astype(np.float32) * kept * factor


def _unpack_scales(scales, use_ue8m0):
    if not use_ue8m0:
        return scales
    exponents = np.ascontiguousarray(scales).view(np.uint8).astype(np.uint32)
    return (exponents << 23).view(np.float32)


def _check_dispatch(arrays, world, rank, most, recv, count, handle, fp8, rounded, ue8m0):
    info, ranges, m, hidden, experts = handle
    assert (m, hidden, experts) == (most, world.hidden, world.experts)
    room = world.ranks * most
    x = recv[0] if fp8 else recv
    assert tuple(x.shape) == (world.local, room, world.hidden)
    assert tuple(info.shape) == (world.local, room)
    assert tuple(ranges.shape) == (world.local, world.ranks)
    if fp8:
        per = 512 if ue8m0 else 128
        assert tuple(recv[1].shape) == (world.local, room, world.hidden // per)
        scales = _unpack_scales(arrays.back(recv[1]), ue8m0)
    x, count, info, ranges = (arrays.back(a) for a in (x, count, info, ranges))
    for e in range(world.local):
        rows = _expert_rows(world, rank * world.local + e)
        assert count[e] == len(rows) == (ranges[e] & 0xFFFFFFFF).sum()
        assert info[e, : len(rows)].tolist() == [t for _, t in rows]
        for s in range(world.ranks):
            begin, length = ranges[e, s] >> 32, ranges[e, s] & 0xFFFFFFFF
            assert [r for r, (source, _) in enumerate(rows) if source == s] == list(
                range(begin, begin + length)
            )
        want = np.array([world.x[s][t] for s, t in rows], bfloat16).reshape(-1, world.hidden)
        got = x[e, : len(rows)]
        if not fp8:
            np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
        elif not rounded:
            q, want_scales = quantise(want) if len(rows) else (want, np.zeros((0, 1)))
            np.testing.assert_array_equal(got.view(np.uint8), q.view(np.uint8))
            np.testing.assert_array_equal(scales[e, : len(rows)], want_scales)
        else:
            mine = scales[e, : len(rows)]
            assert (np.frexp(mine)[0] == 0.5).all()
            assert calc_diff(dequantise(got, mine), want.astype(np.float32)) < 1e-3


def _matrix(group, world, arrays):
    """The matrix of DeepEP's own test: hook or event x BF16, FP8, rounded, UE8M0 x zero copy."""
    rank, most = group.rank, max(len(x) for x in world.x) + 3
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(most, world.hidden, group.size, 8)
    buffer = deep_ep.Buffer(group, 0, size, low_latency_mode=True, num_qps_per_rank=world.local)
    idx, weights = arrays.to(world.idx[rank]), arrays.to(world.weights[rank])
    combos = [
        (hook, fp8, rounded, ue8m0)
        for hook in (False, True)
        for fp8 in (False, True)
        for rounded in ((False, True) if fp8 else (False,))
        for ue8m0 in ((False, True) if rounded else (False,))
    ]
    for number, (hook, fp8, rounded, ue8m0) in enumerate(combos):
        for _ in range(number % 2 + 1):
            stats = arrays.to(np.full(world.local, 5, np.int32))
            cost = arrays.to(np.zeros(group.size, np.int64))
            recv, count, handle, event, receive = buffer.low_latency_dispatch(
                arrays.to(world.x[rank]),
                idx,
                most,
                world.experts,
                cumulative_local_expert_recv_stats=stats,
                dispatch_wait_recv_cost_stats=cost,
                use_fp8=fp8,
                round_scale=rounded,
                use_ue8m0=ue8m0,
                async_finish=not hook,
                return_recv_hook=hook,
            )
            receive() if hook else event.current_stream_wait()
        _check_dispatch(arrays, world, rank, most, recv, count, handle, fp8, rounded, ue8m0)
        np.testing.assert_array_equal(arrays.back(stats), arrays.back(count) + 5)
        assert (arrays.back(cost) >= 0).all()
        whole = arrays.back(recv[0] if fp8 else recv).astype(np.float32)  # unused rows too
        if fp8:
            scales = _unpack_scales(arrays.back(recv[1]), ue8m0)
            whole = np.nan_to_num(dequantise(arrays.back(recv[0]), scales))
        y = arrays.to(np.nan_to_num(whole).astype(bfloat16))
        for zero_copy in (False, True):
            if zero_copy:
                buffer.get_next_low_latency_combine_buffer(handle)[:, :, :] = y
            out = arrays.to(np.zeros((len(world.x[rank]), world.hidden), bfloat16))
            combined, event, receive = buffer.low_latency_combine(
                y,
                idx,
                weights,
                handle,
                zero_copy=zero_copy,
                async_finish=not hook,
                return_recv_hook=hook,
                out=out,
            )
            receive() if hook else event.current_stream_wait()
            assert combined is out
            diff = calc_diff(arrays.back(out).astype(np.float32), _weighted(world, rank))
            assert diff < (9e-4 if fp8 else 1e-5), (diff, fp8, zero_copy)
    return True


@pytest.mark.parametrize("arrays", ALL)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_matrix(processes, num_ranks, arrays):
    processes(num_ranks, _matrix, World(num_ranks, 13, 512, 3, 4 * num_ranks), arrays)


def test_matrix_of_threads(threads):
    from arrays import NumpyArrays

    threads(4, _matrix, World(4, [5, 0, 9, 1], 1024, 2, 8), NumpyArrays())


def _logfmt(group, world, arrays):
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    x = (world.x[rank].astype(np.float32) * 0.1).astype(bfloat16)
    idx, weights = arrays.to(world.idx[rank]), arrays.to(world.weights[rank])
    recv, _, handle, _, _ = buffer.low_latency_dispatch(
        arrays.to(x), idx, 16, world.experts, use_fp8=False
    )
    combined, _, _ = buffer.low_latency_combine(recv, idx, weights, handle, use_logfmt=True)
    kept = np.where(world.idx[rank] >= 0, world.weights[rank], 0).sum(axis=1, keepdims=True)
    assert calc_diff(arrays.back(combined).astype(np.float32), x.astype(np.float32) * kept) < 1e-4


@pytest.mark.parametrize("arrays", ALL)
def test_logfmt(run, arrays):
    run(2, _logfmt, World(2, 11, 1024, 2, 4), arrays)


def _repeat(group, world):
    """Repeated runs give the same bits, also between calls of the normal mode."""
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    x, idx, weights = world.x[rank], world.idx[rank], world.weights[rank]
    layout = buffer.get_dispatch_layout(idx, world.experts)
    seen = set()
    for _ in range(10):
        buffer.clean_low_latency_buffer(16, world.hidden, world.experts)
        recv, count, handle, _, _ = buffer.low_latency_dispatch(x, idx, 16, world.experts)
        y = np.nan_to_num(dequantise(*recv)).astype(bfloat16)
        combined, _, _ = buffer.low_latency_combine(y, idx, weights, handle)
        rows, _, _, _, normal, _ = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_tokens_per_expert=layout[2],
            is_token_in_rank=layout[3],
        )
        buffer.combine(rows, normal)
        seen.add(combined.tobytes())
    assert len(seen) == 1


def test_repeats_are_equal_to_the_bit(run):
    run(2, _repeat, World(2, 16, 256, 2, 4))


def _lifetimes(group, world, arrays):
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True)
    x, idx, weights = (arrays.to(a[rank]) for a in (world.x, world.idx, world.weights))

    def dispatch(**options):
        return buffer.low_latency_dispatch(x, idx, 16, world.experts, **options)

    old = [dispatch(use_fp8=False) for _ in range(4)]
    with pytest.raises(ValueError, match="retired"):
        buffer.low_latency_combine(old[0][0], idx, weights, old[0][2])
    with pytest.raises(ValueError, match="retired"):
        buffer.get_next_low_latency_combine_buffer(old[1][2])
    for recv, _, handle, _, _ in old[2:]:
        combined, _, _ = buffer.low_latency_combine(recv, idx, weights, handle)
        diff = calc_diff(arrays.back(combined).astype(np.float32), _weighted(world, rank))
        assert diff < 1e-5
    narrow = dispatch()  # another shape, while views of the old one are held
    for recv, count, _, _, _ in old:
        assert len(arrays.back(recv)) and arrays.back(count).sum() >= 0
    # Two batches at once, whose hooks are called in turn.
    a = dispatch(return_recv_hook=True, use_fp8=False)
    b = dispatch(return_recv_hook=True, use_fp8=False)
    a[4]()
    first = buffer.low_latency_combine(a[0], idx, weights, a[2], return_recv_hook=True)
    b[4]()
    second = buffer.low_latency_combine(b[0], idx, weights, b[2], return_recv_hook=True)
    first[2]()
    second[2]()
    both = [arrays.back(combined[0]).view(np.uint16) for combined in (first, second)]
    np.testing.assert_array_equal(*both)
    buffer.destroy()
    assert arrays.back(narrow[0][1]).size and float(arrays.back(a[0])[0, 0, 0]) is not None


@pytest.mark.parametrize("arrays", ALL)
def test_lifetimes(run, arrays):
    run(2, _lifetimes, World(2, 16, 256, 2, 4), arrays)


def _mistakes(group, world):
    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    x, idx, weights = world.x[rank], world.idx[rank], world.weights[rank]
    with pytest.raises(entrepot.ArgumentError, match="exclude"):
        buffer.low_latency_dispatch(
            x, idx, 16, world.experts, async_finish=True, return_recv_hook=True
        )
    with pytest.raises(entrepot.ArgumentError, match="use_ue8m0"):
        buffer.low_latency_dispatch(x, idx, 16, world.experts, use_ue8m0=True)
    with pytest.raises(entrepot.ArgumentError, match="max_tokens"):
        buffer.low_latency_dispatch(x, idx, 3, world.experts)
    with pytest.raises(entrepot.ArgumentError, match="hidden is 0"):
        buffer.clean_low_latency_buffer(1, 0, 1)
    recv, _, handle, event, hook = buffer.low_latency_dispatch(
        x, idx, 16, world.experts, use_fp8=False
    )
    assert event.event is None and hook is None
    with pytest.raises(TypeError, match="low_latency_dispatch returned"):
        buffer.low_latency_combine(recv, idx, weights, tuple(handle))
    with pytest.raises(entrepot.ArgumentError, match=r"y\.shape"):
        buffer.low_latency_combine(recv[:, :3], idx, weights, handle)
    fixed = np.zeros((world.local,), np.int32)
    fixed.flags.writeable = False
    with pytest.raises(ValueError, match="expert_tokens is read-only"):
        buffer.low_latency_dispatch(x, idx, 16, world.experts, fixed, use_fp8=False)
    out = np.frombuffer(bytes(x.nbytes), np.uint8).view(x.dtype).reshape(x.shape)
    with pytest.raises(ValueError, match="out is read-only"):
        buffer.low_latency_combine(recv, idx, weights, handle, out=out)
    combined, _, _ = buffer.low_latency_combine(recv, idx, weights, handle)
    assert calc_diff(combined.astype(np.float32), _weighted(world, rank)) < 1e-5


def test_mistakes(run):
    run(2, _mistakes, World(2, 16, 256, 2, 4))


def _threads(group, world):
    """Calls of several threads of a rank are carried out one at a time."""
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    x, idx = world.x[0], world.idx[0]
    failed = []

    def decode():
        try:
            for _ in range(300):
                buffer.low_latency_dispatch(x, idx, 16, world.experts, use_fp8=False)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=decode) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_threads_of_a_rank(processes):
    processes(1, _threads, World(1, 16, 256, 2, 4))


def _failed_twice(group, world):
    """Waiting again for a call that failed is no success."""
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    x, idx = world.x[group.rank], world.idx[group.rank]
    buffer.low_latency_dispatch(x, idx, 16, world.experts)
    group.timeout_ms = 500
    if group.rank == 1:
        time.sleep(1.5)
        return
    event = buffer.low_latency_dispatch(x, idx, 16, world.experts, async_finish=True)[3]
    for _ in range(2):
        with pytest.raises(entrepot.WaitTimeoutError, match="rank 1"):
            event.current_stream_wait()


def test_a_failed_event_fails_again(processes):
    processes(2, _failed_twice, World(2, 16, 256, 2, 4))


def test_size_hint_is_far_below_two_buffers_of_the_worst_case():
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    assert 0 < hint < 1_908_410_496 / 2
