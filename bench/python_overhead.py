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


def now_and_then(i):
    """So that calls never queue for long, and yet come one after the other."""
    if i % 8 == 0:
        settle()


def median_us(call, iterations):
    samples = []
    for i in range(iterations):
        now_and_then(i)
        start = time.perf_counter_ns()
        kept = call()
        samples.append(time.perf_counter_ns() - start)
        del kept
    return statistics.median(samples) / 1e3


def c_dispatch(buffer, x, idx, weights, num_sms, iterations):
    args = _abi.DispatchArgs(num_experts=EXPERTS, num_sms=num_sms)
    for name, tensor in (("x", x), ("topk_idx", idx), ("topk_weights", weights)):
        fill(args, getattr(_abi.DispatchArgs, name).offset, describe(tensor))
    recv = _abi.Recv()
    pointer, pass_args, pass_recv = buffer.pointer, ctypes.byref(args), ctypes.byref(recv)
    samples = []
    for i in range(iterations):
        now_and_then(i)
        start = time.perf_counter_ns()
        lib.ep_dispatch(pointer, pass_args, pass_recv, None)
        samples.append(time.perf_counter_ns() - start)
        lib.ep_recv_release(pass_recv)
        lib.ep_handle_release(recv.handle)
    return statistics.median(samples) / 1e3


def c_combine(buffer, y, handle, num_sms, iterations):
    out = empty((TOKENS, HIDDEN), dtype_code(y.dtype), kind_of(y))
    args = _abi.CombineArgs(handle=handle.pointer, num_sms=num_sms)
    fill(args, _abi.CombineArgs.y.offset, describe(y))
    fill(args, _abi.CombineArgs.out.offset, describe(out))
    pointer, passed = buffer.pointer, ctypes.byref(args)
    return median_us(lambda: lib.ep_combine(pointer, passed, None), iterations)


def c_low_latency(buffer, x, idx, weights, iterations):
    """A dispatch and a combine of the C interface, in microseconds each."""
    args = _abi.LlDispatchArgs(max_tokens=TOKENS, num_experts=EXPERTS)
    back = _abi.LlCombineArgs()
    out = empty(x.shape, dtype_code(x.dtype), kind_of(x))
    for name, tensor in (("x", x), ("topk_idx", idx)):
        fill(args, getattr(_abi.LlDispatchArgs, name).offset, describe(tensor))
    for name, tensor in (("topk_idx", idx), ("topk_weights", weights), ("out", out)):
        fill(back, getattr(_abi.LlCombineArgs, name).offset, describe(tensor))
    recv = _abi.LlRecv()
    pointer, pass_args, pass_recv = buffer.pointer, ctypes.byref(args), ctypes.byref(recv)
    sending, bringing = [], []
    for i in range(iterations):
        now_and_then(i)
        start = time.perf_counter_ns()
        lib.ep_ll_dispatch(pointer, pass_args, pass_recv, None)
        sending.append(time.perf_counter_ns() - start)
        back.y, back.handle = recv.x, recv.handle
        start = time.perf_counter_ns()
        lib.ep_ll_combine(pointer, ctypes.byref(back), None)
        bringing.append(time.perf_counter_ns() - start)
        lib.ep_ll_recv_release(pass_recv)
    return statistics.median(sending) / 1e3, statistics.median(bringing) / 1e3


def measure(to, iterations):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    idx = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :TOPK].astype(np.int64)
    weights = rng.random((TOKENS, TOPK), dtype=np.float32)
    group = entrepot.Group(0, 1, allgather=lambda mine: [mine])
    tx, tidx, tweights = to(x), to(idx), to(weights)
    device = "cuda" if kind_of(tx).device == CUDA else "cpu"
    buffer = entrepot.Buffer(group, device=device)
    low = entrepot.Buffer(group, device=device)
    drop_in = deep_ep.Buffer(group)
    enter = median_us(lib.ep_version, iterations)
    received = buffer.dispatch(tx, tidx, tweights, num_experts=EXPERTS)
    # deep_ep asks for as many SMs as its class says, entrepot for all.
    sms = deep_ep.Buffer.num_sms if device == "cuda" else 0
    dispatch, dispatch_few = (
        c_dispatch(buffer, tx, tidx, tweights, n, iterations) - enter for n in (0, sms)
    )
    combine, combine_few = (
        c_combine(buffer, received.x, received.handle, n, iterations) - enter for n in (0, sms)
    )
    narrow = to(x.astype(bfloat16))
    ll_dispatch, ll_combine = c_low_latency(low, narrow, tidx, tweights, iterations)
    _, _, per_expert, in_rank, _ = drop_in.get_dispatch_layout(tidx, EXPERTS)
    layout = {"num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    got = drop_in.dispatch(tx, topk_idx=tidx, topk_weights=tweights, **layout)
    ours = buffer.dispatch(tx, tidx, tweights, num_experts=EXPERTS)

    def with_arrays():
        r = buffer.dispatch(tx, tidx, tweights, num_experts=EXPERTS)
        return r, r.x, r.topk_idx, r.topk_weights, r.tokens_per_expert

    def decode():
        return drop_in.low_latency_dispatch(narrow, tidx, TOKENS, EXPERTS, use_fp8=False)

    batch = decode()

    def bring():
        return drop_in.low_latency_combine(batch[0], tidx, tweights, batch[2])

    calls = {
        "entrepot dispatch": (dispatch, with_arrays),
        "entrepot combine": (combine, lambda: buffer.combine(ours.x, ours.handle)),
        "deep_ep dispatch": (
            dispatch_few,
            lambda: drop_in.dispatch(tx, topk_idx=tidx, topk_weights=tweights, **layout),
        ),
        "deep_ep cached dispatch": (None, lambda: drop_in.dispatch(tx, got[4])),
        "deep_ep combine": (combine_few, lambda: drop_in.combine(got[0], got[4])),
        "deep_ep low-latency combine": (ll_combine - enter, bring),
        "deep_ep low-latency dispatch": (ll_dispatch - enter, decode),
        "deep_ep get_dispatch_layout": (None, lambda: drop_in.get_dispatch_layout(tidx, EXPERTS)),
    }
    result = {}
    for name, (c_call, call) in calls.items():
        total = median_us(call, iterations)
        result[name] = {"total_us": round(total, 2)}
        if c_call is not None:
            result[name]["c_us"] = round(c_call, 2)
            result[name]["added_us"] = round(total - c_call, 2)
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
