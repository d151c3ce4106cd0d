# SPDX-License-Identifier: MIT
"""Mistakes that Python finds before the library is asked: the other ranks hear of them at once."""

import time

import numpy as np
import pytest
from reference import World, bfloat16

import deep_ep
import entrepot


def _fails_on_one(group, by, right, wrong, expected):
    """Rank `by` makes the wrong call; it gets its own error and the others the reason."""
    group.barrier()  # a rank far ahead has no room for its reasons
    begin = time.monotonic()
    if group.rank == by:
        with pytest.raises(expected) as error:
            wrong()
        assert not isinstance(error.value, entrepot.AbortedError)
    else:
        with pytest.raises(entrepot.AbortedError, match=rf"rank {by} gave up: .*: \w+Error: "):
            right()
    assert time.monotonic() - begin < 10


def _entrepot(group, world, threads):
    x, idx, weights = (a[group.rank] for a in (world.x, world.idx, world.weights))
    buffer = entrepot.Buffer(group, num_threads=threads)
    experts = world.experts
    for by in range(group.size):
        got = buffer.dispatch(x, idx, weights, num_experts=experts)
        ll = buffer.ll_dispatch(x, idx, max_tokens=8, num_experts=experts)
        calls = [
            (buffer.dispatch, ("rows", idx), {"num_experts": experts}, (x, idx), TypeError),
            (buffer.dispatch, (x, idx), {}, (x, idx), TypeError),
            (buffer.dispatch, (x, idx), {"num_experts": "all"}, (x, idx), TypeError),
            (buffer.dispatch_async, (x, "ids"), {"num_experts": experts}, (x, idx), TypeError),
            (buffer.dispatch_cached, (x, got), {}, (x, got.handle), AttributeError),
            (buffer.combine, (x[0, 0], got.handle), {}, (got.x, got.handle), TypeError),
            (buffer.combine_async, (got.x, None), {}, (got.x, got.handle), AttributeError),
            (buffer.dispatch_backward, ([], got.handle), {}, (got.x, got.handle), TypeError),
            (buffer.combine_backward, (x, 5), {}, (x, got.handle), AttributeError),
            (buffer.ll_dispatch, (None, idx), {"max_tokens": 8}, (x, idx), TypeError),
            (buffer.ll_dispatch_hook, (x, idx), {"max_tokens": 1j}, (x, idx), TypeError),
            (buffer.ll_combine, (ll.x, idx, 0, ll), {}, (ll.x, idx, weights, ll), TypeError),
        ]
        for method, bad, options, good, expected in calls:
            right = {}
            if "dispatch" in method.__name__ and good[1] is idx:
                right = {"num_experts": experts}
            if "ll_dispatch" in method.__name__:
                right["max_tokens"] = 8
                options = {"num_experts": experts, **options}

            def make(arguments, keywords, method=method):
                call = method(*arguments, **keywords)
                if isinstance(call, entrepot.Event):
                    call.wait()

            _fails_on_one(
                group,
                by,
                lambda good=good, right=right, make=make: make(good, right),
                lambda bad=bad, options=options, make=make: make(bad, options),
                expected,
            )
        out, _ = buffer.combine(got.x, got.handle, got.topk_weights)
        assert out.shape == x.shape
        out = buffer.ll_combine(ll.x, idx, weights, ll)
        assert out.shape == x.shape
        ll.retire()


@pytest.mark.parametrize("with_threads", [0, 1])
def test_entrepot(run, with_threads):
    run(3, _entrepot, World(3, 6, 64, 2, 6, drop=0), with_threads)


def _deep_ep(group, world):
    x, idx, weights = (a[group.rank] for a in (world.x, world.idx, world.weights))
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    experts = world.experts
    _, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, experts)[:5]
    layout = {"num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}

    def dispatch(x=x, **changes):
        arguments = {**layout, "topk_idx": idx, "topk_weights": weights, **changes}
        return buffer.dispatch(x, **arguments)

    def ll_dispatch(x=x, hook=False, **options):
        got = buffer.low_latency_dispatch(
            x, idx, 8, experts, return_recv_hook=hook, **{"use_fp8": False, **options}
        )
        if hook:
            got[4]()
        return got

    for by in range(group.size):
        rows, _, _, _, handle, _ = dispatch()
        recv, _, ll_handle, _, _ = ll_dispatch()

        def ll_combine(handle=ll_handle, recv=recv):
            return buffer.low_latency_combine(recv, idx, weights, handle)[0]

        def combine(rows=rows, **options):
            return buffer.combine(rows, options.pop("handle", handle), **options)[0]

        for right, wrong, expected in (
            (dispatch, lambda: dispatch("rows"), TypeError),
            (dispatch, lambda: dispatch(num_tokens_per_expert=None), entrepot.ArgumentError),
            (dispatch, lambda: dispatch(config=8), TypeError),
            (dispatch, lambda: dispatch(allocate_on_comm_stream=True), entrepot.ArgumentError),
            (dispatch, lambda: dispatch(handle=handle), entrepot.ArgumentError),
            (combine, lambda: combine(handle=()), TypeError),
            (combine, lambda: combine(rows=None), TypeError),
            (ll_dispatch, lambda: ll_dispatch(use_ue8m0=True), entrepot.ArgumentError),
            (ll_dispatch, lambda: ll_dispatch([1]), TypeError),
            (lambda: ll_dispatch(hook=True), lambda: ll_dispatch(3, hook=True), TypeError),
        ):
            _fails_on_one(group, by, right, wrong, expected)
        del recv
        recv, _, ll_handle, _, _ = ll_dispatch()
        _fails_on_one(
            group,
            by,
            lambda: ll_combine(ll_handle, recv),
            lambda: ll_combine(("no", "handle"), recv),
            TypeError,
        )
        assert combine().shape == x.shape
        assert ll_combine(ll_handle, recv).shape == x.shape


def test_deep_ep(run):
    run(3, _deep_ep, World(3, 6, 128, 2, 6, drop=0))


def _same_everywhere(group):
    """What every rank does wrong is no reason for any of them to wait."""
    buffer = entrepot.Buffer(group)
    x, idx = np.ones((2, 64), bfloat16), np.array([[0], [1]])
    for _ in range(50):
        with pytest.raises(TypeError):
            buffer.dispatch(None, idx, num_experts=2)
    assert buffer.dispatch(x, idx, num_experts=2).num_rows == 2
    calls = buffer.query().num_calls
    assert calls >= 51
    buffer.close()
    with pytest.raises(ValueError, match="closed"):
        buffer.dispatch(x, idx, num_experts=2)


def test_mistakes_of_all_ranks(run):
    run(2, _same_everywhere)
