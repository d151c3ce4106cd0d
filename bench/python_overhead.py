#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the Python layers add to a call of the library, in microseconds.

One rank, so that nobody is waited for; a few small rows, so that the call
itself is short. The C call is timed with its arguments ready; the cost of
entering it through ctypes, measured on a function that does nothing, counts
as added. With --cuda a dispatch includes the wait for its counts, the other
calls only their launch; the device is waited for between every few of them.
"""

import argparse
import ctypes
import json
import statistics
import time

import numpy as np

import deep_ep
import entrepot
from entrepot import _abi
from entrepot._lib import lib
from entrepot._tensor import (
    CUDA,
    bfloat16,
    describe,
    dtype_code,
    empty,
    fill,
    kind_of,
    torch_view_of,
)

TOKENS, HIDDEN, TOPK, EXPERTS = 4, 64, 2, 8


def settle():
    """Waits for the device, where there is one."""


class Call:
    """A call to be timed, and what is to be done after it, which is not timed."""

    def __init__(self, make, after=None):
        self._make, self._after = make, after

    def time(self):
        make = self._make
        start = time.perf_counter_ns()
        kept = make()
        taken = time.perf_counter_ns() - start
        if isinstance(kept, int) and kept:  # a status of the C interface
            raise RuntimeError(lib.ep_last_error().decode())
        if self._after is not None:
            self._after()
        del kept
        return taken


def medians_us(calls, iterations):
    """Of each call, in turn for a while each: what else the machine does then hits all alike."""
    samples = [[] for _ in calls]
    for _ in range(-(-iterations // 40)):
        for call, times in zip(calls, samples):
            for i in range(40):
                if i % 8 == 0:  # so that calls never queue for long, and yet follow each other
                    settle()
                times.append(call.time())
    return [statistics.median(times) / 1e3 for times in samples]


def c_dispatch(buffer, x, idx, weights, num_sms):
    args = _abi.DispatchArgs(num_experts=EXPERTS, num_sms=num_sms)
    for name, tensor in (("x", x), ("topk_idx", idx), ("topk_weights", weights)):
        fill(args, getattr(_abi.DispatchArgs, name).offset, describe(tensor))
    recv = _abi.Recv()
    pointer, pass_args, pass_recv = buffer.pointer, ctypes.byref(args), ctypes.byref(recv)

    def release():
        lib.ep_recv_release(pass_recv)
        lib.ep_handle_release(recv.handle)

    return Call(lambda: lib.ep_dispatch(pointer, pass_args, pass_recv, None), release)


def c_cached(buffer, x, handle, num_sms):
    args = _abi.DispatchArgs(handle=handle.pointer, num_sms=num_sms)
    fill(args, _abi.DispatchArgs.x.offset, describe(x))
    recv = _abi.Recv()
    pointer, pass_args, pass_recv = buffer.pointer, ctypes.byref(args), ctypes.byref(recv)
    return Call(
        lambda: lib.ep_dispatch(pointer, pass_args, pass_recv, None),
        lambda: lib.ep_recv_release(pass_recv),
    )


def c_combine(buffer, y, handle, num_sms):
    out = empty((TOKENS, HIDDEN), dtype_code(y.dtype), kind_of(y))
    args = _abi.CombineArgs(handle=handle.pointer, num_sms=num_sms)
    fill(args, _abi.CombineArgs.y.offset, describe(y))
    fill(args, _abi.CombineArgs.out.offset, describe(out))
    pointer, passed = buffer.pointer, ctypes.byref(args)
    return Call(lambda: lib.ep_combine(pointer, passed, None) or out)


def c_low_latency(buffer, other, x, idx, weights):
    """A dispatch and a combine of the C interface, the latter of a result of another buffer: one
    that lives would be in the way of the second dispatch after it."""
    args = _abi.LlDispatchArgs(max_tokens=TOKENS, num_experts=EXPERTS)
    back = _abi.LlCombineArgs()
    out = empty(x.shape, dtype_code(x.dtype), kind_of(x))
    for name, tensor in (("x", x), ("topk_idx", idx)):
        fill(args, getattr(_abi.LlDispatchArgs, name).offset, describe(tensor))
    for name, tensor in (("topk_idx", idx), ("topk_weights", weights), ("out", out)):
        fill(back, getattr(_abi.LlCombineArgs, name).offset, describe(tensor))
    recv, kept = _abi.LlRecv(), _abi.LlRecv()
    pointer, pass_args, pass_recv = buffer.pointer, ctypes.byref(args), ctypes.byref(recv)
    lib.ep_ll_dispatch(other.pointer, pass_args, ctypes.byref(kept), None)
    back.y, back.handle = kept.x, kept.handle
    pass_back = ctypes.byref(back)
    return (
        Call(
            lambda: lib.ep_ll_dispatch(pointer, pass_args, pass_recv, None),
            lambda: lib.ep_ll_recv_release(pass_recv),
        ),
        Call(lambda: lib.ep_ll_combine(other.pointer, pass_back, None) or (out, weights, idx)),
    )


def measure(to, iterations):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    idx = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :TOPK].astype(np.int64)
    weights = rng.random((TOKENS, TOPK), dtype=np.float32)
    group = entrepot.Group(0, 1, allgather=lambda mine: [mine])
    tx, tidx, tweights = to(x), to(idx), to(weights)
    device = "cuda" if kind_of(tx).device == CUDA else "cpu"
    buffer = entrepot.Buffer(group, device=device)
    low, other = (entrepot.Buffer(group, device=device) for _ in range(2))
    drop_in = deep_ep.Buffer(group)
    ours = buffer.dispatch(tx, tidx, tweights, num_experts=EXPERTS)
    # deep_ep asks for as many SMs as its class says, entrepot for all.
    sms = deep_ep.Buffer.num_sms if device == "cuda" else 0
    narrow = to(x.astype(bfloat16))
    ll_dispatch, ll_combine = c_low_latency(low, other, narrow, tidx, tweights)
    _, _, per_expert, in_rank, _ = drop_in.get_dispatch_layout(tidx, EXPERTS)
    layout = {"num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    got = drop_in.dispatch(tx, topk_idx=tidx, topk_weights=tweights, **layout)

    def with_arrays():
        r = buffer.dispatch(tx, tidx, tweights, num_experts=EXPERTS)
        return r, r.x, r.topk_idx, r.topk_weights, r.tokens_per_expert

    def decode():
        return drop_in.low_latency_dispatch(narrow, tidx, TOKENS, EXPERTS, use_fp8=False)

    batch = None

    def bring():
        return drop_in.low_latency_combine(batch[0], tidx, tweights, batch[2])

    calls = {
        "entrepot dispatch": (c_dispatch(buffer, tx, tidx, tweights, 0), with_arrays),
        "entrepot combine": (
            c_combine(buffer, ours.x, ours.handle, 0),
            lambda: buffer.combine(ours.x, ours.handle),
        ),
        "deep_ep dispatch": (
            c_dispatch(buffer, tx, tidx, tweights, sms),
            lambda: drop_in.dispatch(tx, topk_idx=tidx, topk_weights=tweights, **layout),
        ),
        "deep_ep cached dispatch": (
            c_cached(buffer, tx, ours.handle, sms),
            lambda: drop_in.dispatch(tx, got[4]),
        ),
        "deep_ep combine": (
            c_combine(buffer, ours.x, ours.handle, sms),
            lambda: drop_in.combine(got[0], got[4]),
        ),
        "deep_ep low-latency dispatch": (ll_dispatch, decode),
        "deep_ep low-latency combine": (ll_combine, bring),
        "deep_ep get_dispatch_layout": (
            None,
            lambda: drop_in.get_dispatch_layout(tidx, EXPERTS),
        ),
    }
    result = {}
    for name, (c_call, call) in calls.items():
        batch = decode()
        timed = [Call(call), Call(lib.ep_version)] + ([c_call] if c_call else [])
        total, enter, *inner = medians_us(timed, iterations)
        result[name] = {"total_us": round(total, 2)}
        if inner:
            result[name]["c_us"] = round(inner[0] - enter, 2)
            result[name]["added_us"] = round(total - inner[0] + enter, 2)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=3000)
    parser.add_argument("--torch", action="store_true", help="torch CPU tensors instead of NumPy")
    parser.add_argument("--cuda", action="store_true", help="torch tensors on the current GPU")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    to = np.asarray
    if arguments.torch or arguments.cuda:
        import torch

        torch.set_num_threads(1)
        to = torch_view_of
    if arguments.cuda:
        global settle
        settle = torch.cuda.synchronize

        def to(array):
            return torch_view_of(array).cuda()

    result = measure(to, arguments.iterations)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{'median of ' + str(arguments.iterations):30}{'C call':>9}{'Python':>9}{'added':>9}")
    for name, row in result.items():
        print(f"{name:30}{row.get('c_us', ''):>9}{row['total_us']:>9}{row.get('added_us', ''):>9}")


if __name__ == "__main__":
    main()
