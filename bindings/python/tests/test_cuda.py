# SPDX-License-Identifier: MIT
"""What only a GPU has: streams, graphs, device errors. Run by tools/gpu_python.sh."""

import numpy as np
import pytest
from arrays import CudaTensors, needs_cuda
from reference import World, bfloat16, calc_diff

import deep_ep
import entrepot

pytestmark = needs_cuda
cuda = CudaTensors()


def _weighted(world, rank, x):
    kept = np.where(world.idx[rank] >= 0, world.weights[rank], 0).sum(axis=1, keepdims=True)
    return x.astype(np.float32) * kept


# ----------------------------------------------------------------- graphs


class _Decode:
    """A decode step of two micro-batches with hooks, in fixed tensors, as vLLM captures it."""

    def __init__(self, buffer, world, rank, fp8):
        import torch

        self.buffer, self.world, self.fp8 = buffer, world, fp8
        half = len(world.x[rank]) // 2
        self.parts = [slice(0, half), slice(half, 2 * half)]
        self.x = cuda.to(world.x[rank])
        self.idx, self.weights = cuda.to(world.idx[rank]), cuda.to(world.weights[rank])
        self.out = torch.zeros_like(self.x)

    def _experts(self, recv):
        import torch

        if not self.fp8:
            return recv.clone()
        q, scales = recv
        wide = q.float().unflatten(-1, (-1, 128)) * scales.unsqueeze(-1)
        return torch.nan_to_num(wide).flatten(-2).to(torch.bfloat16)

    def __call__(self):
        sent = []
        for part in self.parts:
            sent.append(
                self.buffer.low_latency_dispatch(
                    self.x[part],
                    self.idx[part],
                    32,
                    self.world.experts,
                    use_fp8=self.fp8,
                    return_recv_hook=True,
                )
            )
        receivers = []
        for part, (recv, _, handle, _, hook) in zip(self.parts, sent):
            hook()
            receivers.append(
                self.buffer.low_latency_combine(
                    self._experts(recv),
                    self.idx[part],
                    self.weights[part],
                    handle,
                    return_recv_hook=True,
                    out=self.out[part],
                )[2]
            )
        for receive in receivers:
            receive()


def _graph(group, world, fp8):
    import torch

    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True)
    step = _Decode(buffer, world, rank, fp8)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    group.barrier()
    rng = np.random.default_rng(rank)
    for i in range(6):
        x = rng.standard_normal(world.x[rank].shape).astype(bfloat16)
        step.x.copy_(cuda.to(x))
        step.out.zero_()
        if i == 3:
            step()  # between replays
        else:
            graph.replay()
        torch.cuda.synchronize()
        assert calc_diff(cuda.back(step.out), _weighted(world, rank, x)) < (9e-4 if fp8 else 1e-5)
    buffer.destroy()


@pytest.mark.parametrize("fp8", [True, False])
def test_cuda_graph_of_decode_with_hooks(processes, fp8):
    processes(2, _graph, World(2, 24, 512, 3, 8), fp8)


def _normal_graph(group, world):
    """Worst-case dispatch, experts and combine in a graph, routing changed between replays."""
    import torch

    rank = group.rank
    buffer = deep_ep.Buffer(group, 1 << 26, explicitly_destroy=True)
    bound = world.ranks * len(world.x[0])
    x, idx, weights = (cuda.to(a[rank]) for a in (world.x, world.idx, world.weights))
    out = torch.empty_like(x)

    def step():
        layout = buffer.get_dispatch_layout(idx, world.experts)
        rows, local, row_weights, _, handle, _ = buffer.dispatch(
            x,
            topk_idx=idx,
            topk_weights=weights,
            num_tokens_per_rank=layout[0],
            num_tokens_per_expert=layout[2],
            is_token_in_rank=layout[3],
            num_worst_tokens=bound,
        )
        factor = (row_weights * (local >= 0)).sum(1, keepdim=True)
        y = torch.where((local >= 0).any(1, keepdim=True), rows.float() * factor, 0)
        out.copy_(buffer.combine(y.to(torch.bfloat16), handle)[0])

    for _ in range(2):
        step()
    # Rows of a call on the communication stream, given up just before.
    layout = buffer.get_dispatch_layout(idx, world.experts)
    args = {"num_tokens_per_expert": layout[2], "is_token_in_rank": layout[3]}
    rows = buffer.dispatch(x, topk_idx=idx, async_finish=True, **args)
    rows[5].current_stream_wait()
    del rows
    torch.cuda.synchronize()
    group.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    group.barrier()
    for seed in range(4):
        fresh = World(world.ranks, len(world.x[0]), world.hidden, world.topk, world.experts, seed)
        for tensor, values in ((x, fresh.x), (idx, fresh.idx), (weights, fresh.weights)):
            tensor.copy_(cuda.to(values[rank]))
        graph.replay()
        torch.cuda.synchronize()
        want = _weighted(fresh, rank, fresh.x[rank])
        assert calc_diff(cuda.back(out).astype(np.float32), want) < 2e-5
    buffer.destroy()


def test_cuda_graph_of_worst_case_dispatch(processes):
    processes(2, _normal_graph, World(2, 40, 256, 3, 8))


# ---------------------------------------------------------------- streams


def _hooks_do_not_wait(group, world):
    """The host gets through whole layers while the device is kept busy before the first one."""
    import time

    import torch

    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    step = _Decode(buffer, world, rank, False)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    group.barrier()
    start, done = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(1_500_000_000)
    start.record()
    began = time.perf_counter()
    for _ in range(3):
        step()
    seconds = time.perf_counter() - began
    submitted_first = not start.query()
    done.record()
    done.synchronize()
    assert submitted_first, f"the host waited: {seconds:.3f} s"
    assert calc_diff(cuda.back(step.out), _weighted(world, rank, world.x[rank])) < 1e-5


def test_cuda_hooks_do_not_make_the_host_wait(processes):
    processes(2, _hooks_do_not_wait, World(2, 24, 256, 2, 8))


def _give_up(group, world):
    """Rows that the caller's slow kernels still read are not written over by a call on the
    communication stream, whether they were dropped before or after calls began to use it."""
    import torch

    rank = group.rank
    buffer = deep_ep.Buffer(group, 1 << 21)
    x, idx = cuda.to(world.x[rank]), cuda.to(world.idx[rank])
    layout = buffer.get_dispatch_layout(idx, world.experts)
    args = {
        "topk_idx": idx,
        "num_tokens_per_expert": layout[2],
        "is_token_in_rank": layout[3],
    }
    want = world.received(rank)[0]
    other = torch.full_like(x, 7)
    for _ in range(3):
        rows = buffer.dispatch(x, **args)[0]
        previous = buffer.capture()
        torch.cuda._sleep(50_000_000)
        copy = rows.clone()
        del rows
        for _ in range(2):  # where the rows were is free now
            late = buffer.dispatch(other, **args, previous_event=previous, async_finish=True)
            late[5].current_stream_wait()
            assert bool((late[0] == 7).all())
            late = None
        np.testing.assert_array_equal(cuda.back(copy).view(np.uint16), want.view(np.uint16))


def test_cuda_rows_given_up_early(processes):
    processes(2, _give_up, World(2, 64, 512, 2, 8))


def _streams(group, world):
    """Inputs made on the caller's stream just before, outputs used on another just after."""
    import torch

    rank = group.rank
    buffer = deep_ep.Buffer(group)
    idx = cuda.to(world.idx[rank])
    copies = torch.tensor(world.in_rank(rank).sum(axis=1, keepdims=True), device="cuda")
    streams = [torch.cuda.Stream() for _ in range(2)]
    for i in range(6):
        stream = streams[i % 2]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(3_000_000)
            x = torch.full((len(world.x[rank]), world.hidden), float(i + 1), device="cuda")
            after = None
            layout = buffer.get_dispatch_layout(idx, world.experts, async_finish=True)
            asynchronous = i >= 2
            got = buffer.dispatch(
                x,
                topk_idx=idx,
                num_tokens_per_expert=layout[2],
                is_token_in_rank=layout[3],
                previous_event=buffer.capture() if i >= 4 else None,
                async_finish=asynchronous,
                allocate_on_comm_stream=i >= 4,
            )
            if asynchronous:
                after = got[5]
            else:
                layout[4].current_stream_wait()
            out, _, event = buffer.combine(
                got[0], got[4], previous_event=after, async_finish=asynchronous
            )
            if asynchronous:
                event.current_stream_wait()
            assert bool((out == copies * (i + 1)).all()), i


def test_cuda_streams(processes):
    processes(2, _streams, World(2, 40, 256, 2, 8))


# ------------------------------------------------------------------ errors


def _late(group, world):
    """A rank that does not come is named by the next call, and nothing hangs."""
    import torch

    rank = group.rank
    buffer = deep_ep.Buffer(group, low_latency_mode=True)
    step = _Decode(buffer, world, rank, False)
    step()
    torch.cuda.synchronize()
    if rank == 0:
        group.timeout_ms = 400
        with pytest.raises(entrepot.WaitTimeoutError, match="rank 1"):
            step()
            torch.cuda.synchronize()
            step()
        group.timeout_ms = 20000
    group.barrier()  # a rank that ends while a kernel waits for it keeps the device busy a while


def test_cuda_late_rank_is_named(processes):
    processes(2, _late, World(2, 24, 256, 2, 8))


# ----------------------------------------------------------------- layout


def _layout(group, tokens, dtype, table):
    import torch

    world = World(3, tokens, 8, 4, 12, drop=0.3)
    idx = world.idx[0].astype(dtype)
    ranks = np.arange(world.experts)[::-1] % 3 if table else None
    want = entrepot.layout(idx, world.experts, 3, expert_rank=ranks, ranks_per_node=1)
    for at in (None, torch.cuda.Stream()):
        with torch.cuda.stream(at):
            got = entrepot.layout(
                cuda.to(idx), world.experts, 3, expert_rank=ranks, ranks_per_node=1
            )
            for counted, expected in zip(got, want):
                assert counted.is_cuda and counted.is_contiguous()
                np.testing.assert_array_equal(counted.cpu().numpy(), expected)
                assert counted.cpu().numpy().dtype == expected.dtype
    with pytest.raises(entrepot.ArgumentError, match="must be a multiple of the 7 ranks"):
        entrepot.layout(cuda.to(idx), world.experts, 7)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
@pytest.mark.parametrize("table", [False, True])
def test_cuda_layout(processes, dtype, table):
    """Tokens on a GPU are counted there as those of the host are. Not in this process: those that
    it forks later could not use the GPU."""

    def all_sizes(group):
        for tokens in (0, 1, 37, 4096):
            _layout(group, tokens, dtype, table)

    processes(1, all_sizes)
