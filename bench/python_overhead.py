#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""What the Python layers add to a call of the library, in microseconds.

One rank, so that nobody is waited for; a few small rows, so that the call
itself is short. The C call is timed with its arguments ready; the cost of
entering it through ctypes, measured on a function that does nothing, counts
as added.
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
from entrepot._tensor import describe, fill

TOKENS, HIDDEN, TOPK, EXPERTS = 4, 64, 2, 8


def median_us(call, iterations):
    samples = []
    for _ in range(iterations):
        start = time.perf_counter_ns()
        kept = call()
        samples.append(time.perf_counter_ns() - start)
        del kept
    return statistics.median(samples) / 1e3


def c_dispatch(buffer, x, idx, weights, iterations):
    args = _abi.DispatchArgs(num_experts=EXPERTS)
    for name, tensor in (("x", x), ("topk_idx", idx), ("topk_weights", weights)):
        fill(args, getattr(_abi.DispatchArgs, name).offset, describe(tensor))
    recv = _abi.Recv()
    pointer, pass_args, pass_recv = buffer.pointer, ctypes.byref(args), ctypes.byref(recv)
    samples = []
    for _ in range(iterations):
        start = time.perf_counter_ns()
        lib.ep_dispatch(pointer, pass_args, pass_recv, None)
        samples.append(time.perf_counter_ns() - start)
        lib.ep_recv_release(pass_recv)
        lib.ep_handle_release(recv.handle)
    return statistics.median(samples) / 1e3


def c_combine(buffer, y, handle, iterations):
    out = np.empty((TOKENS, HIDDEN), y.dtype)
    args = _abi.CombineArgs(handle=handle.pointer)
    fill(args, _abi.CombineArgs.y.offset, describe(y))
    fill(args, _abi.CombineArgs.out.offset, describe(out))
    pointer, passed = buffer.pointer, ctypes.byref(args)
    return median_us(lambda: lib.ep_combine(pointer, passed, None), iterations)


def measure(to, iterations):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, HIDDEN)).astype(np.float32)
    idx = np.argsort(rng.random((TOKENS, EXPERTS)), axis=1)[:, :TOPK].astype(np.int64)
    weights = rng.random((TOKENS, TOPK), dtype=np.float32)
    group = entrepot.Group(0, 1, allgather=lambda mine: [mine])
    buffer = entrepot.Buffer(group)
    drop_in = deep_ep.Buffer(group)
    enter = median_us(lib.ep_version, iterations)
    dispatch = c_dispatch(buffer, x, idx, weights, iterations) - enter
    received = buffer.dispatch(x, idx, weights, num_experts=EXPERTS)
    combine = c_combine(buffer, received.x, received.handle, iterations) - enter
    tx, tidx, tweights = to(x), to(idx), to(weights)
    _, _, per_expert, in_rank, _ = drop_in.get_dispatch_layout(tidx, EXPERTS)
    layout = {"num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    got = drop_in.dispatch(tx, topk_idx=tidx, topk_weights=tweights, **layout)
    ours = buffer.dispatch(tx, tidx, tweights, num_experts=EXPERTS)

    def with_arrays():
        r = buffer.dispatch(tx, tidx, tweights, num_experts=EXPERTS)
        return r, r.x, r.topk_idx, r.topk_weights, r.tokens_per_expert

    calls = {
        "entrepot dispatch": (dispatch, with_arrays),
        "entrepot combine": (combine, lambda: buffer.combine(ours.x, ours.handle)),
        "deep_ep dispatch": (
            dispatch,
            lambda: drop_in.dispatch(tx, topk_idx=tidx, topk_weights=tweights, **layout),
        ),
        "deep_ep cached dispatch": (None, lambda: drop_in.dispatch(tx, got[4])),
        "deep_ep combine": (combine, lambda: drop_in.combine(got[0], got[4])),
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
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    to = np.asarray
    if arguments.torch:
        import torch

        torch.set_num_threads(1)
        to = torch.from_numpy
    result = measure(to, arguments.iterations)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{'median of ' + str(arguments.iterations):28}{'C call':>9}{'Python':>9}{'added':>9}")
    for name, row in result.items():
        print(f"{name:28}{row.get('c_us', ''):>9}{row['total_us']:>9}{row.get('added_us', ''):>9}")


if __name__ == "__main__":
    main()
