# SPDX-License-Identifier: MIT
"""Stands in for utils.py of DeepEP's tests; see deepep_tests.sh.

Ranks share one GPU, or run on the CPU (EP_TEST_DEVICE=cpu). NCCL allows
neither, so the process group is gloo's and collectives on CUDA tensors go
through host memory. On the CPU, tensors asked for on "cuda" are made there.
Timing loops are short or left out: what counts here is what the tests assert.
Everything else is DeepEP's own, of deepep_utils.py beside this file.
"""

import os
import time

import torch
import torch.distributed as dist
from deepep_utils import *  # noqa: F401,F403
from deepep_utils import bench as _bench
from torch.overrides import TorchFunctionMode

ON_CPU = os.environ.get("EP_TEST_DEVICE") == "cpu"


class _OnCpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


if ON_CPU:
    _OnCpu().__enter__()  # for as long as the process lives
    torch.set_num_threads(1)


def init_dist(local_rank: int, num_local_ranks: int):
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{os.environ.get('MASTER_PORT', '8361')}",
        world_size=num_local_ranks,
        rank=local_rank,
    )
    torch.set_default_dtype(torch.bfloat16)
    if not ON_CPU:
        torch.cuda.set_device(0)
        torch.set_default_device("cuda")
    group = dist.new_group(list(range(num_local_ranks)))
    return dist.get_rank(), dist.get_world_size(), group


def bench(fn, num_warmups: int = 50, num_tests: int = 50, post_fn=None):
    if not ON_CPU:
        return _bench(fn, 2, 5, post_fn)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return sum(times) / len(times), min(times), max(times)


def bench_kineto(fn, kernel_names, num_tests: int = 30, **options):
    """On a GPU runs the function; per-kernel times of a GPU that ranks share would tell nothing.
    On the CPU its large matrix products would take minutes."""
    if not ON_CPU:
        for _ in range(3):
            fn()
        torch.cuda.synchronize()
    periods = options.get("num_kernels_per_period", 1)
    none = [float("nan")] * periods if periods > 1 else float("nan")
    return [none for _ in kernel_names] if isinstance(kernel_names, tuple) else none


_reduce, _gather = dist.all_reduce, dist.all_gather


def _all_reduce(tensor, *args, **kwargs):
    host = tensor.cpu()
    _reduce(host, *args, **kwargs)
    tensor.copy_(host)


def _all_gather(outputs, tensor, *args, **kwargs):
    hosts = [torch.empty_like(t, device="cpu") for t in outputs]
    _gather(hosts, tensor.cpu(), *args, **kwargs)
    for output, host in zip(outputs, hosts):
        output.copy_(host)


def _all_gather_into_tensor(output, tensor, *args, **kwargs):
    _all_gather(list(output), tensor, *args, **kwargs)


dist.all_reduce, dist.all_gather = _all_reduce, _all_gather
dist.all_gather_into_tensor = _all_gather_into_tensor
