# SPDX-License-Identifier: MIT
"""deep_ep in normal mode: shapes, orders and values that DeepEP's callers rely on."""

import gc
import inspect
import weakref

import numpy as np
import pytest
from arrays import ALL
from reference import World, bfloat16, calc_diff, dequantise, float8, quantise

import deep_ep
import entrepot


def _bits(array):
    return array.view(f"u{array.dtype.itemsize}")


def _check_layout(buffer, arrays, world, rank):
    idx = arrays.to(world.idx[rank])
    per_rank, per_node, per_expert, in_rank, event = buffer.get_dispatch_layout(idx, world.experts)
    want = world.in_rank(rank)
    assert per_node is None and event.event is None
    np.testing.assert_array_equal(arrays.back(per_rank), want.sum(axis=0))
    np.testing.assert_array_equal(arrays.back(in_rank), want)
    counts = np.bincount(world.idx[rank][world.idx[rank] >= 0], minlength=world.experts)
    np.testing.assert_array_equal(arrays.back(per_expert), counts)
    return {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
    }


def _check_handle(handle, arrays, world, rank):
    prefix, sent, start, source, in_rank, head = handle
    assert len(handle) == 6 and isinstance(handle, tuple)
    rows = [world.rows(r) for r in range(world.ranks)]
    between = np.array(
        [[sum(s == i for s, _ in rows[r]) for r in range(world.ranks)] for i in range(world.ranks)]
    )
    np.testing.assert_array_equal(arrays.back(prefix), between.cumsum(axis=0))
    np.testing.assert_array_equal(arrays.back(sent)[:, -1], between[rank])
    assert tuple(start.shape) == (world.ranks, 1)
    assert arrays.back(source).tolist() == [t for _, t in rows[rank]]
    np.testing.assert_array_equal(arrays.back(in_rank), world.in_rank(rank))
    head = arrays.back(head)
    np.testing.assert_array_equal(head >= 0, world.in_rank(rank))
    for t, r in zip(*np.nonzero(head >= 0)):
        assert rows[r][head[t, r]] == (rank, t)
    assert arrays.back(handle[-1]) is not None and len(handle[1:3]) == 2


def _normal(group, world, arrays):
    """The matrix of DeepEP's own test: input kind x with or without top-k x async x previous."""
    rank = group.rank
    buffer = deep_ep.Buffer(group, int(1e6), 0)
    layout = _check_layout(buffer, arrays, world, rank)
    x, idx, weights, counts = world.received(rank)
    narrow = quantise(world.x[rank])
    inputs = {
        "bf16": arrays.to(world.x[rank]),
        "fp8": (arrays.to(narrow[0]), arrays.to(narrow[1])),
    }
    combos = [
        (kind, topk, asynchronous, previous)
        for kind in inputs
        for topk in (False, True)
        for asynchronous in (False, True)
        for previous in (False, True)
    ]
    for kind, with_topk, asynchronous, previous in combos:
        common = {"config": deep_ep.Config(20, 8, 256), "async_finish": asynchronous}
        args = {"x": inputs[kind], **layout, **common}
        if with_topk:
            args["topk_idx"] = arrays.to(world.idx[rank])
            args["topk_weights"] = arrays.to(world.weights[rank])
        if previous:
            args["previous_event"] = buffer.capture()
        recv_x, recv_idx, recv_weights, per_expert, handle, event = buffer.dispatch(**args)
        assert isinstance(event, deep_ep.EventOverlap)
        if asynchronous:
            event.current_stream_wait()
        else:
            assert event.event is None
        _check_rows(recv_x, x, arrays)
        assert per_expert == counts and isinstance(per_expert, list)
        _check_handle(handle, arrays, world, rank)
        if with_topk:
            np.testing.assert_array_equal(arrays.back(recv_idx), idx)
            np.testing.assert_array_equal(arrays.back(recv_weights), weights)
            _check_worst(buffer, args, recv_x, recv_idx, arrays, world)
        else:
            assert recv_idx is None and recv_weights is None
            again = buffer.dispatch(inputs[kind], handle, **common)
            assert again[1:5] == (None, None, None, None)
            if asynchronous:
                again[5].current_stream_wait()
            _check_rows(again[0], x, arrays)
        y = dequantise(*map(arrays.back, recv_x)) if kind == "fp8" else arrays.back(recv_x)
        combined, combined_weights, event = buffer.combine(
            arrays.to(y.astype(bfloat16)),
            handle,
            topk_weights=recv_weights,
            previous_event=buffer.capture() if previous else None,
            **common,
        )
        if asynchronous:
            event.current_stream_wait()
        _check_combined(arrays, world, rank, kind, combined, combined_weights, with_topk)


def _check_rows(got, x, arrays):
    if isinstance(got, tuple):
        want = quantise(x)
        np.testing.assert_array_equal(_bits(arrays.back(got[0])), _bits(want[0]))
        np.testing.assert_array_equal(arrays.back(got[1]), want[1])
    else:
        np.testing.assert_array_equal(_bits(arrays.back(got)), _bits(x))


def _check_worst(buffer, args, recv_x, recv_idx, arrays, world):
    bound = world.ranks * len(world.x[0])
    worst_x, worst_idx, worst_weights, empty, _, event = buffer.dispatch(
        **args, num_worst_tokens=bound
    )
    if args["async_finish"]:
        event.current_stream_wait()
    assert empty == [] and worst_weights.shape[0] == worst_idx.shape[0] == bound
    rows = recv_idx.shape[0]
    np.testing.assert_array_equal(arrays.back(worst_idx)[:rows], arrays.back(recv_idx))
    assert (arrays.back(worst_idx)[rows:] == -1).all()
    pairs = zip(recv_x, worst_x) if isinstance(recv_x, tuple) else [(recv_x, worst_x)]
    for want, got in pairs:
        np.testing.assert_array_equal(_bits(arrays.back(got)[:rows]), _bits(arrays.back(want)))


def _check_combined(arrays, world, rank, kind, combined, combined_weights, with_topk):
    copies = world.in_rank(rank).sum(axis=1, keepdims=True)
    x = world.x[rank].astype(np.float32)
    if kind == "fp8":
        x = dequantise(*quantise(world.x[rank])).astype(bfloat16).astype(np.float32)
    assert calc_diff(arrays.back(combined).astype(np.float32), x * copies) < 5e-6
    if with_topk:
        want = np.where(world.idx[rank] >= 0, world.weights[rank], 0)
        np.testing.assert_array_equal(arrays.back(combined_weights), want)
    else:
        assert combined_weights is None


@pytest.mark.parametrize("arrays", ALL)
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_normal(processes, num_ranks, arrays):
    processes(num_ranks, _normal, World(num_ranks, 29, 256, 3, 4 * num_ranks), arrays)


def _large(group, world, arrays):
    rank = group.rank
    buffer = deep_ep.Buffer(group)
    layout = _check_layout(buffer, arrays, world, rank)
    recv_x, recv_idx, _, counts, handle, _ = buffer.dispatch(
        arrays.to(world.x[rank]),
        topk_idx=arrays.to(world.idx[rank]),
        topk_weights=arrays.to(world.weights[rank]),
        expert_alignment=128,
        **layout,
    )
    x, _, _, want = world.received(rank)
    _check_rows(recv_x, x, arrays)
    assert counts == [-(-c // 128) * 128 for c in want]
    biases = tuple(arrays.to(np.full_like(world.x[rank], b)) for b in (1, -0.5))
    combined, _, _ = buffer.combine(recv_x, handle, bias=biases)
    copies = world.in_rank(rank).sum(axis=1, keepdims=True)
    want = world.x[rank].astype(np.float32) * copies + 0.5
    assert calc_diff(arrays.back(combined).astype(np.float32), want) < 5e-6
    one, _, _ = buffer.combine(recv_x, handle, bias=biases[0])
    assert calc_diff(arrays.back(one).astype(np.float32), want + 0.5) < 5e-6


@pytest.mark.parametrize("arrays", ALL)
def test_alignment_and_bias(run, arrays):
    run(4, _large, World(4, 65, 7168, 8, 64, seed=3), arrays)


def _scales(group, world, arrays):
    """Per-token scales, packed exponents, and scales of odd strides."""
    rank = group.rank
    buffer = deep_ep.Buffer(group)
    layout = _check_layout(buffer, arrays, world, rank)
    args = {"topk_idx": arrays.to(world.idx[rank]), **layout}
    q, _ = quantise(world.x[rank])
    rows = world.rows(rank)

    per_token = np.arange(len(q), dtype=np.float32)[:, None] + 100 * rank
    recv = buffer.dispatch((arrays.to(q), arrays.to(per_token)), **args)[0]
    assert arrays.back(recv[1]).tolist() == [[t + 100.0 * s] for s, t in rows]

    packed = np.arange(len(q), dtype=np.int32)[:, None] * 7 + rank
    recv = buffer.dispatch((arrays.to(q), arrays.to(packed)), **args)[0]
    assert arrays.back(recv[1]).tolist() == [[t * 7 + s] for s, t in rows]

    scales = quantise(world.x[rank])[1]
    column_major = arrays.to(np.ascontiguousarray(scales.T)).T
    recv = buffer.dispatch((arrays.to(q), column_major), **args)[0]
    _check_rows(recv, world.received(rank)[0], arrays)


@pytest.mark.parametrize("arrays", ALL)
def test_scales(run, arrays):
    run(2, _scales, World(2, 21, 512, 2, 4), arrays)


def _background(group, world, arrays):
    rank = group.rank
    buffer = deep_ep.Buffer(group)
    layout = _check_layout(buffer, arrays, world, rank)
    got = buffer.dispatch(arrays.to(world.x[rank]), topk_idx=arrays.to(world.idx[rank]), **layout)
    first, _, event = buffer.combine(got[0], got[4], async_finish=True)
    second, _, after = buffer.combine(
        got[0], got[4], previous_event=event, async_finish=True, allocate_on_comm_stream=True
    )
    with after:
        overlapped = sum(range(1000))
    assert overlapped == 499500
    np.testing.assert_array_equal(_bits(arrays.back(first)), _bits(arrays.back(second)))
    called = []
    event.register_hook_after_wait(lambda: called.append(1))
    with event(release_handle=True):
        pass
    assert called == [1] and event.event is None
    with pytest.raises(AssertionError):
        event.current_stream_wait()
    # The next dispatch may come before anybody waited.
    third, _, event = buffer.combine(got[0], got[4], async_finish=True)
    buffer.dispatch(arrays.to(world.x[rank]), got[4], previous_event=event)
    np.testing.assert_array_equal(_bits(arrays.back(first)), _bits(arrays.back(third)))


@pytest.mark.parametrize("arrays", ALL)
def test_background_combine(run, arrays):
    run(2, _background, World(2, 33, 64, 2, 4), arrays)


def _lifecycle(group):
    x = np.ones((3, 16), np.float32)
    idx = np.array([[0], [1], [1]], np.int64)
    buffer = deep_ep.Buffer(group, 4096, 8192, explicitly_destroy=True)
    assert (buffer.rank, buffer.group_size, buffer.group) == (group.rank, 2, group)
    assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (4096, 8192)
    assert buffer.low_latency_mode is False and buffer.num_sms == 20
    layout = buffer.get_dispatch_layout(idx, 2)
    got = buffer.dispatch(x, None, layout[0], None, layout[3], layout[2], idx)
    local = buffer.get_local_buffer_tensor(np.float32)
    assert local.shape == (1024,)
    local[:] = 5
    assert buffer.get_local_buffer_tensor(np.float32)[7] == 5
    assert buffer.get_local_buffer_tensor(np.float32, (2, 3), offset=16).shape == (2, 3)
    assert buffer.get_local_buffer_tensor(np.int8, use_rdma_buffer=True).shape == (8192,)
    with pytest.raises(entrepot.ArgumentError, match="1024"):
        buffer.get_local_buffer_tensor(np.float32, (5000,))
    for offset in (-4, 4100, 2):
        with pytest.raises(entrepot.ArgumentError, match=f"offset is {offset}; .*0..4096.* of 4,"):
            buffer.get_local_buffer_tensor(np.float32, offset=offset)
    with pytest.raises(entrepot.ArgumentError, match=r"size is \(-3,\)"):
        buffer.get_local_buffer_tensor(np.float32, (-3,))
    assert buffer.get_local_buffer_tensor(np.float32, offset=4096).shape == (0,)
    buffer.destroy()
    with pytest.raises(RuntimeError, match="destroyed"):
        buffer.dispatch(x, got[4])
    assert (got[0] == 1).all()
    del got, local

    group.barrier()  # it is the caller's, not the buffer's
    buffer = deep_ep.Buffer(group)
    with pytest.raises(AssertionError):
        buffer.destroy()
    watch = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert watch() is None


def test_lifecycle(run):
    run(2, _lifecycle)


def _mistakes(group):
    buffer = deep_ep.Buffer(group)
    x = np.ones((3, 16), np.float32)
    idx = np.array([[0], [1], [1]], np.int64)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 2)
    got = buffer.dispatch(
        x, topk_idx=idx, num_tokens_per_expert=per_expert, is_token_in_rank=in_rank
    )
    with pytest.raises(entrepot.ArgumentError, match="previous_event and async_finish"):
        buffer.dispatch(x, got[4], allocate_on_comm_stream=True)
    with pytest.raises(entrepot.ArgumentError, match="with a handle"):
        buffer.dispatch(x, got[4], topk_idx=idx)
    with pytest.raises(entrepot.ArgumentError, match="num_tokens_per_expert is None"):
        buffer.dispatch(x, topk_idx=idx)
    with pytest.raises(entrepot.ArgumentError, match="num_worst_tokens 0; it is 9"):
        buffer.dispatch(
            x, num_tokens_per_expert=per_expert, is_token_in_rank=in_rank, num_worst_tokens=9
        )
    with pytest.raises(TypeError, match="not a copy"):
        buffer.combine(got[0], (1, 2, 3, 4, 5, 6))
    with pytest.raises(TypeError, match="deep_ep.Config"):
        buffer.combine(got[0], got[4], config=7)
    with pytest.raises(entrepot.ArgumentError, match="y"):
        buffer.combine(got[0][:-1], got[4])
    combined, _, _ = buffer.combine(got[0], got[4])
    assert (combined == 1).all()


def test_mistakes(run):
    run(2, _mistakes)


def _shapes(group, arrays):
    """Shapes that no tensor may have here are refused by name, on all ranks alike."""
    buffer = deep_ep.Buffer(group)
    x = arrays.to(np.ones((3, 256), bfloat16))
    idx = arrays.to(np.array([[0], [1], [1]], np.int64))
    per_expert = buffer.get_dispatch_layout(idx, 2)[2]
    for bad, message in (
        ((x[0], idx), r"low_latency_dispatch: x has shape \(256,\)"),
        ((x, idx[:, 0]), r"low_latency_dispatch: topk_idx has shape \(3,\)"),
    ):
        with pytest.raises(entrepot.ArgumentError, match=message):
            buffer.low_latency_dispatch(*bad, 4, 2)
    with pytest.raises(TypeError, match="a list is no tensor"):
        buffer.low_latency_dispatch(x, [[0], [1], [1]], 4, 2)

    q = arrays.to(np.ones((3, 256), float8))
    one = np.array([[1], [2], [3]], np.float32)
    args = {"topk_idx": idx, "num_tokens_per_expert": per_expert}
    for rows, message in (
        ((q, arrays.to(one[:, 0])), r"dispatch: scales has shape \(3,\)"),
        ((q[0], arrays.to(one)), r"dispatch: x has shape \(256,\)"),
    ):
        with pytest.raises(entrepot.ArgumentError, match=message):
            buffer.dispatch(rows, **args)
    want = arrays.back(buffer.dispatch((q, arrays.to(one)), **args)[0][1])
    if arrays.name == "numpy":
        got = buffer.dispatch((q, memoryview(one)), **args)[0][1]
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("arrays", ALL)
def test_shapes(run, arrays):
    run(2, _shapes, arrays)


def _lists(group, arrays):
    """Counts and biases may be lists."""
    buffer = deep_ep.Buffer(group)
    x = arrays.to(np.ones((3, 16), np.float32))
    idx = arrays.to(np.array([[0], [1], [1]], np.int64))
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 2)
    counts = arrays.back(per_expert).tolist()
    got = buffer.dispatch(x, topk_idx=idx, num_tokens_per_expert=counts)
    same = buffer.dispatch(x, is_token_in_rank=in_rank, num_tokens_per_expert=counts)
    assert got[3] == same[3] == [2 * counts[group.rank]]
    with pytest.raises(TypeError, match="num_tokens_per_expert is 2;"):
        buffer.dispatch(x, topk_idx=idx, num_tokens_per_expert=2)
    combined = arrays.back(buffer.combine(got[0], got[4], bias=[x, x])[0])
    assert (combined == 3).all()


@pytest.mark.parametrize("arrays", ALL)
def test_lists(run, arrays):
    run(2, _lists, arrays)


def test_module_has_the_names_that_callers_import():
    from deep_ep import Buffer, Config, EventOverlap  # noqa: F401
    from deep_ep.utils import EventHandle  # noqa: F401
    from deep_ep.utils import EventOverlap as Same

    assert Same is EventOverlap
    assert str(deep_ep.topk_idx_t).endswith("int64") or deep_ep.topk_idx_t is np.int64
    assert Buffer.is_sm90_compiled() is True
    assert not hasattr(deep_ep, "ElasticBuffer")


def test_signatures():
    """Names, order and defaults of the arguments, as callers pass them."""

    def of(function):
        return [
            (p.name, p.default)
            for p in inspect.signature(function).parameters.values()
            if p.name != "self"
        ]

    none = inspect.Parameter.empty
    assert of(deep_ep.Buffer.__init__) == [
        ("group", none),
        ("num_nvl_bytes", 0),
        ("num_rdma_bytes", 0),
        ("low_latency_mode", False),
        ("num_qps_per_rank", 24),
        ("allow_nvlink_for_low_latency_mode", True),
        ("allow_mnnvl", False),
        ("explicitly_destroy", False),
        ("enable_shrink", False),
        ("comm", None),
    ]
    assert of(deep_ep.Buffer.get_dispatch_layout) == [
        ("topk_idx", none),
        ("num_experts", none),
        ("previous_event", None),
        ("async_finish", False),
        ("allocate_on_comm_stream", False),
    ]
    assert of(deep_ep.Buffer.dispatch) == [
        ("x", none),
        ("handle", None),
        ("num_tokens_per_rank", None),
        ("num_tokens_per_rdma_rank", None),
        ("is_token_in_rank", None),
        ("num_tokens_per_expert", None),
        ("topk_idx", None),
        ("topk_weights", None),
        ("expert_alignment", 1),
        ("num_worst_tokens", 0),
        ("config", None),
        ("previous_event", None),
        ("async_finish", False),
        ("allocate_on_comm_stream", False),
    ]
    assert of(deep_ep.Buffer.combine) == [
        ("x", none),
        ("handle", none),
        ("topk_weights", None),
        ("bias", None),
        ("config", None),
        ("previous_event", None),
        ("async_finish", False),
        ("allocate_on_comm_stream", False),
    ]
    assert of(deep_ep.Buffer.low_latency_dispatch) == [
        ("x", none),
        ("topk_idx", none),
        ("num_max_dispatch_tokens_per_rank", none),
        ("num_experts", none),
        ("cumulative_local_expert_recv_stats", None),
        ("dispatch_wait_recv_cost_stats", None),
        ("use_fp8", True),
        ("round_scale", False),
        ("use_ue8m0", False),
        ("async_finish", False),
        ("return_recv_hook", False),
    ]
    assert of(deep_ep.Buffer.low_latency_combine) == [
        ("x", none),
        ("topk_idx", none),
        ("topk_weights", none),
        ("handle", none),
        ("use_logfmt", False),
        ("zero_copy", False),
        ("async_finish", False),
        ("return_recv_hook", False),
        ("out", None),
        ("combine_wait_recv_cost_stats", None),
    ]
    assert of(deep_ep.Buffer.get_local_buffer_tensor) == [
        ("dtype", none),
        ("size", None),
        ("offset", 0),
        ("use_rdma_buffer", False),
    ]
    assert of(deep_ep.Buffer.low_latency_update_mask_buffer) == [
        ("rank_to_mask", none),
        ("mask", False),
    ]
    assert of(deep_ep.Config.__init__)[0] == ("num_sms", 20)
    assert [d for _, d in of(deep_ep.Config.__init__)] == [20, 6, 256, 6, 256]


def test_config():
    config = deep_ep.Config(
        **{
            "num_sms": 96,
            "num_max_nvl_chunked_send_tokens": 16,
            "num_max_nvl_chunked_recv_tokens": 512,
        }
    )
    assert config.num_sms == 96
    hint = config.get_nvl_buffer_size_hint(7168 * 2, 8)
    assert hint >= 48 * 512 * 8 * 7168 * 2 and hint % 128 == 0
    assert config.get_nvl_buffer_size_hint(7168 * 2, 3) < hint
    assert config.get_rdma_buffer_size_hint(7168 * 2, 64) == 0
    for ranks in (1, 5, 8, 48, 200):
        assert deep_ep.Buffer.get_dispatch_config(ranks).num_sms == deep_ep.Buffer.num_sms
        assert deep_ep.Buffer.get_combine_config(ranks).num_sms == deep_ep.Buffer.num_sms
    for wrong in (
        {"num_sms": -2},
        {"num_max_nvl_chunked_send_tokens": 256},
        {"num_max_rdma_chunked_send_tokens": 300},
    ):
        with pytest.raises(entrepot.ArgumentError, match=next(iter(wrong))):
            deep_ep.Config(**wrong)
    deep_ep.Buffer.set_num_sms(24)
    try:
        assert deep_ep.Buffer.get_dispatch_config(8).num_sms == 24
    finally:
        deep_ep.Buffer.set_num_sms(20)
    with pytest.raises(AssertionError):
        deep_ep.Buffer.set_num_sms(7)
