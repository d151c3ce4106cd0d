#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Trains a mixture-of-experts layer over several ranks with NumPy, and checks it.

Each rank holds some experts and some tokens. The losses and gradients of every
step are compared with those of one process that holds everything and does not
use Entrepot. usage: train_moe_numpy.py [--ranks 4] [--steps 5]
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile

import numpy as np

import entrepot

TOKENS, HIDDEN, INNER, EXPERTS, TOPK = 48, 32, 24, 8, 2
RATE = 0.5


def parameters(rng):
    """Router [H, E], and the experts' two matrices [E, H, F] and [E, F, H]."""
    return {
        "router": rng.standard_normal((HIDDEN, EXPERTS)).astype(np.float32) / HIDDEN**0.5,
        "w1": rng.standard_normal((EXPERTS, HIDDEN, INNER)).astype(np.float32) / HIDDEN**0.5,
        "w2": rng.standard_normal((EXPERTS, INNER, HIDDEN)).astype(np.float32) / INNER**0.5,
    }


def route(x, router):
    """Softmax over experts, the K largest kept and normalised."""
    logits = x @ router
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    idx = np.argsort(-p, axis=1, kind="stable")[:, :TOPK].astype(np.int64)
    chosen = np.take_along_axis(p, idx, axis=1)
    return idx, (chosen / chosen.sum(axis=1, keepdims=True)).astype(np.float32)


def route_backward(x, idx, weights, grad_weights):
    """Gradient of the router: the weights are a softmax over the chosen logits alone."""
    inner = (grad_weights * weights).sum(axis=1, keepdims=True)
    grad_logits = np.zeros((len(x), EXPERTS), np.float32)
    np.put_along_axis(grad_logits, idx, weights * (grad_weights - inner), axis=1)
    return x.T @ grad_logits


def experts_forward(x, idx, weights, w1, w2):
    """Weighted sum of each row's experts; idx counts experts of w1, -1: none."""
    y = np.zeros_like(x)
    kept = []
    for e in range(len(w1)):
        row, k = np.nonzero(idx == e)
        inner = np.maximum(x[row] @ w1[e], 0)
        out = inner @ w2[e]
        np.add.at(y, row, weights[row, k, None] * out)
        kept.append((row, k, inner, out))
    return y, kept


def experts_backward(x, idx, weights, w1, w2, kept, grad_y):
    grad_x, grad_weights = np.zeros_like(x), np.zeros_like(weights)
    grad_w1, grad_w2 = np.zeros_like(w1), np.zeros_like(w2)
    for e, (row, k, inner, out) in enumerate(kept):
        grad_out = grad_y[row]
        grad_weights[row, k] = (grad_out * out).sum(axis=1)
        grad_out = grad_out * weights[row, k, None]
        grad_w2[e] = inner.T @ grad_out
        grad_inner = (grad_out @ w2[e].T) * (inner > 0)
        grad_w1[e] = x[row].T @ grad_inner
        np.add.at(grad_x, row, grad_inner @ w1[e].T)
    return grad_x, grad_weights, grad_w1, grad_w2


def distributed_step(group, buffer, x, target, model):
    """Loss and gradients of one step, with this rank's tokens and experts."""
    idx, weights = route(x, model["router"])
    got = buffer.dispatch(x, idx, weights, num_experts=EXPERTS)
    y, kept = experts_forward(got.x, got.topk_idx, got.topk_weights, model["w1"], model["w2"])
    out, _ = buffer.combine(y, got.handle)
    error = out - target
    count = TOKENS * group.size * HIDDEN
    loss = np.float64((error.astype(np.float64) ** 2).sum() / count)

    grad_y, _ = buffer.combine_backward((2 * error / count).astype(np.float32), got.handle)
    grad_rows, grad_row_weights, grad_w1, grad_w2 = experts_backward(
        got.x, got.topk_idx, got.topk_weights, model["w1"], model["w2"], kept, grad_y
    )
    _, grad_weights = buffer.dispatch_backward(grad_rows, got.handle, grad_row_weights)
    grad_router = route_backward(x, idx, weights, grad_weights)
    return sum_over_ranks(group, loss), {
        "router": sum_over_ranks(group, grad_router),
        "w1": grad_w1,
        "w2": grad_w2,
    }


def sum_over_ranks(group, array):
    array = np.asarray(array)
    parts = group.allgather(array.tobytes())
    return sum(np.frombuffer(part, array.dtype).reshape(array.shape) for part in parts)


def single_step(x, target, model):
    """The same of all tokens and experts, in this process alone."""
    idx, weights = route(x, model["router"])
    out, kept = experts_forward(x, idx, weights, model["w1"], model["w2"])
    error = out - target
    loss = (error.astype(np.float64) ** 2).sum() / error.size
    grad_out = (2 * error / error.size).astype(np.float32)
    _, grad_weights, grad_w1, grad_w2 = experts_backward(
        x, idx, weights, model["w1"], model["w2"], kept, grad_out
    )
    return loss, {
        "router": route_backward(x, idx, weights, grad_weights),
        "w1": grad_w1,
        "w2": grad_w2,
    }


def data(ranks):
    rng = np.random.default_rng(1)
    shape = (ranks * TOKENS, HIDDEN)
    return rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(
        np.float32
    )


def train(group, steps):
    """Losses, and the largest relative error of a gradient against the single process."""
    x, target = data(group.size)
    whole = parameters(np.random.default_rng(0))
    local = EXPERTS // group.size
    mine = slice(group.rank * local, (group.rank + 1) * local)
    tokens = slice(group.rank * TOKENS, (group.rank + 1) * TOKENS)
    model = {name: w.copy() if name == "router" else w[mine].copy() for name, w in whole.items()}
    losses, worst = [], 0.0
    with entrepot.Buffer(group) as buffer:
        for _ in range(steps):
            loss, grads = distributed_step(group, buffer, x[tokens], target[tokens], model)
            want_loss, want = single_step(x, target, whole)
            for name, grad in grads.items():
                expected = want[name] if name == "router" else want[name][mine]
                scale = np.abs(want[name]).max()
                worst = max(worst, float(np.abs(grad - expected).max() / scale))
                model[name] -= RATE * grad
                whole[name] -= RATE * want[name]
            worst = max(worst, abs(float(loss) - float(want_loss)) / float(want_loss))
            losses.append(float(loss))
    return losses, worst


def rank_main(rank, addresses, steps, pipe):
    with entrepot.Group.from_addresses(addresses, rank) as group:
        pipe.send(train(group, steps))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        addresses = [os.path.join(folder, f"rank{r}") for r in range(arguments.ranks)]
        pipes, ranks = [], []
        for r in range(arguments.ranks):
            mine, theirs = multiprocessing.Pipe()
            process = multiprocessing.Process(
                target=rank_main, args=(r, addresses, arguments.steps, theirs)
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            ranks.append(process)
        results = [pipe.recv() for pipe in pipes]
        for process in ranks:
            process.join()
    worst = max(error for _, error in results)
    print(json.dumps({"losses": results[0][0], "largest_relative_error": worst}))
    sys.exit(0 if worst < 2e-5 else 1)


if __name__ == "__main__":
    main()
