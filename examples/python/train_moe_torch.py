#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Trains a mixture-of-experts layer over several ranks with torch, and checks it.

Ranks are processes of a gloo group, on the CPU or on GPUs that they may share;
dispatch and combine are autograd functions. The losses and gradients of every
step are compared with those of one process that holds all tokens and experts
and does not use Entrepot.
usage: train_moe_torch.py [--ranks 4] [--steps 5] [--layout expert] [--device cuda]
"""

import argparse
import json
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn

import entrepot
from entrepot import autograd

TOKENS, HIDDEN, INNER, EXPERTS, TOPK = 48, 32, 24, 8, 2


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HIDDEN, INNER, bias=False)
        self.up = nn.Linear(HIDDEN, INNER, bias=False)
        self.down = nn.Linear(INNER, HIDDEN, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(HIDDEN, EXPERTS, bias=False)

    def forward(self, x):
        weights, idx = torch.topk(torch.softmax(self.linear(x), dim=-1), TOPK)
        return idx, weights / weights.sum(dim=-1, keepdim=True)


def by_token(experts, x, idx, weights):
    """Weighted sum of the experts of each row; -1: the expert is elsewhere."""
    y = torch.zeros_like(x)
    for e, expert in enumerate(experts):
        row, k = (idx == e).nonzero(as_tuple=True)
        y = y.index_add(0, row, weights[row, k, None] * expert(x[row]))
    return y


class MoeLayer(nn.Module):
    """Router on every rank, experts spread over the ranks."""

    def __init__(self, group, buffer, router, experts, layout):
        super().__init__()
        self.buffer, self.layout = buffer, layout
        local = EXPERTS // group.size
        self.router = router
        self.experts = nn.ModuleList(experts[group.rank * local : (group.rank + 1) * local])

    def forward(self, x):
        idx, weights = self.router(x)
        if self.layout == "token":
            got = autograd.dispatch(self.buffer, x, idx, weights, num_experts=EXPERTS)
            y = by_token(self.experts, got.x, got.topk_idx, got.topk_weights)
            return autograd.combine(self.buffer, y, got.handle)
        got = autograd.dispatch(
            self.buffer, x, idx, num_experts=EXPERTS, layout="expert", expert_alignment=8
        )
        groups = torch.split(got.x, got.tokens_per_expert)
        y = torch.cat([expert(rows) for expert, rows in zip(self.experts, groups)])
        return autograd.combine(self.buffer, y, got.handle, weights)


def model(seed):
    torch.manual_seed(seed)
    return Router(), [Expert() for _ in range(EXPERTS)]


def relative(got, want):
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-20))


def sum_over_ranks(tensor):
    """In host memory, where gloo works whatever the device."""
    total = tensor.cpu()
    dist.all_reduce(total)
    tensor.copy_(total)


def train(rank, ranks, folder, steps, layout, device, queue):
    torch.set_num_threads(1)
    index = 0
    if device == "cuda":
        index = rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    group = entrepot.Group.from_torch(dist.group.WORLD)
    buffer = entrepot.Buffer(group, device=device, device_index=index)
    torch.manual_seed(7)
    x, target = torch.randn(2, ranks * TOKENS, HIDDEN).to(device)
    mine = slice(rank * TOKENS, (rank + 1) * TOKENS)

    layer = MoeLayer(group, buffer, *model(0), layout).to(device)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.5)
    router, experts = model(0)  # the same weights, for the single-process run
    everything = nn.ModuleList([router, *experts]).to(device)
    reference = torch.optim.SGD(everything.parameters(), lr=0.5)

    losses, worst = [], 0.0
    for _ in range(steps):
        optimiser.zero_grad()
        loss = (layer(x[mine]) - target[mine]).square().sum() / target.numel()
        loss.backward()
        total = loss.detach()
        sum_over_ranks(total)
        sum_over_ranks(layer.router.linear.weight.grad)

        reference.zero_grad()
        want = (by_token(experts, x, *router(x)) - target).square().mean()
        want.backward()
        want = want.detach()
        local = EXPERTS // ranks
        pairs = [(layer.router, router), *zip(layer.experts, experts[rank * local :])]
        for ours, theirs in pairs:
            for p, q in zip(ours.parameters(), theirs.parameters()):
                worst = max(worst, relative(p.grad, q.grad))
        worst = max(worst, abs(float(total) - float(want)) / float(want))
        losses.append(float(total))
        optimiser.step()
        reference.step()
    queue.put((losses, worst))
    dist.barrier()
    buffer.close()
    group.close()
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layout", choices=("token", "expert"), default="token")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    context = torch.multiprocessing.get_context("fork")
    queue = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        options = (arguments.steps, arguments.layout, arguments.device)
        common = (arguments.ranks, folder, *options, queue)
        ranks = [context.Process(target=train, args=(r, *common)) for r in range(arguments.ranks)]
        for process in ranks:
            process.start()
        results = [queue.get(timeout=120) for _ in ranks]
        for process in ranks:
            process.join()
    worst = max(error for _, error in results)
    print(json.dumps({"losses": results[0][0], "largest_relative_error": worst}))
    sys.exit(0 if worst < 1e-4 and all(p.exitcode == 0 for p in ranks) else 1)


if __name__ == "__main__":
    os.environ.setdefault("EP_TIMEOUT_MS", "20000")
    main()
