# SPDX-License-Identifier: MIT
"""What dispatch and combine must give, computed in one process with NumPy.

Written from the definition: for each receiver, the source ranks in order, for
each of them its tokens in order, one row per token that has an expert there.
"""

import ml_dtypes
import numpy as np

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float8 = np.dtype(ml_dtypes.float8_e4m3fn)


class World:
    """Random inputs of all ranks, the same in every process."""

    def __init__(self, ranks, tokens, hidden, topk, experts, seed=0, dtype=bfloat16, drop=0.1):
        rng = np.random.default_rng(seed)
        counts = [tokens] * ranks if np.isscalar(tokens) else list(tokens)
        self.ranks, self.hidden, self.topk, self.experts = ranks, hidden, topk, experts
        self.local = experts // ranks
        self.x = [rng.standard_normal((t, hidden)).astype(dtype) for t in counts]
        self.idx = [self._route(rng, t, drop) for t in counts]
        self.weights = [rng.random((t, topk), dtype=np.float32) for t in counts]

    def _route(self, rng, tokens, drop):
        scores = rng.random((tokens, self.experts))
        idx = np.argsort(scores, axis=1)[:, : self.topk].astype(np.int64)
        idx[rng.random(idx.shape) < drop] = -1
        return idx

    def rows(self, rank):
        """(source, token) of each row that the rank receives."""
        low, high = rank * self.local, (rank + 1) * self.local
        return [
            (s, t)
            for s in range(self.ranks)
            for t in range(len(self.x[s]))
            if ((self.idx[s][t] >= low) & (self.idx[s][t] < high)).any()
        ]

    def received(self, rank):
        """x, topk_idx, topk_weights, tokens per expert that the rank receives."""
        rows = self.rows(rank)
        low = rank * self.local
        x = np.array([self.x[s][t] for s, t in rows], self.x[0].dtype).reshape(-1, self.hidden)
        idx = np.array([self.idx[s][t] for s, t in rows], np.int64).reshape(-1, self.topk)
        weights = np.array([self.weights[s][t] for s, t in rows], np.float32)
        here = (idx >= low) & (idx < low + self.local)
        counts = [int((idx == low + e).sum()) for e in range(self.local)]
        return (
            x,
            np.where(here, idx - low, -1),
            np.where(here, weights.reshape(idx.shape), 0),
            counts,
        )

    def in_rank(self, rank):
        """[T, R] whether each token of the rank goes to each rank."""
        owner = np.where(self.idx[rank] >= 0, self.idx[rank] // self.local, -1)
        return np.stack([(owner == r).any(axis=1) for r in range(self.ranks)], axis=1)

    def combined(self, rank, outputs):
        """Sum over ranks, ascending, in float32 of what each rank's outputs hold for a token."""
        total = np.zeros((len(self.x[rank]), self.hidden), np.float32)
        for r in range(self.ranks):
            for row, (s, t) in enumerate(self.rows(r)):
                if s == rank:
                    total[t] += outputs[r][row].astype(np.float32)
        return total.astype(outputs[0].dtype)


def quantise(x):
    """E4M3 with one float32 scale per 128 channels."""
    blocks = x.astype(np.float32).reshape(len(x), -1, 128)
    amax = np.maximum(np.abs(blocks).max(axis=2, keepdims=True), np.float32(1e-4))
    scale = (amax / np.float32(448)).astype(np.float32)
    q = (blocks * (np.float32(448) / amax)).astype(float8).reshape(x.shape)
    return q, scale.reshape(len(x), -1)


def dequantise(q, scales):
    blocks = q.astype(np.float32).reshape(*q.shape[:-1], -1, 128)
    return (blocks * scales[..., None].astype(np.float32)).reshape(q.shape)


def calc_diff(a, b):
    """1 - cosine-like similarity in float64, both moved by one."""
    a, b = np.asarray(a, np.float64) + 1, np.asarray(b, np.float64) + 1
    return 1 - 2 * (a * b).sum() / (a * a + b * b).sum() if a.size else 0.0
