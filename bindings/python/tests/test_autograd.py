# SPDX-License-Identifier: MIT
"""Gradients of the autograd functions against those of the same sum written out."""

import pytest

torch = pytest.importorskip("torch")

import entrepot  # noqa: E402
from entrepot import autograd  # noqa: E402


def _inputs(rank):
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(5, 16, generator=generator, requires_grad=True)
    weights = torch.rand(5, 2, generator=generator, requires_grad=True)
    idx = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(5)])
    return x, idx, weights


def _scale(expert):
    return expert + 1.0


def _by_expert(group, given):
    """Expert e multiplies by e + 1; combine applies the weights, given again or the dispatch's."""
    buffer = entrepot.Buffer(group)
    x, idx, weights = _inputs(group.rank)
    got = autograd.dispatch(buffer, x, idx, weights, num_experts=4, layout="expert")
    first = group.rank * 2
    scale = torch.cat(
        [torch.full((n, 1), _scale(first + e)) for e, n in enumerate(got.tokens_per_expert)]
    )
    out = autograd.combine(buffer, got.x * scale, got.handle, weights if given else None)
    (out * out).sum().backward()

    x2, weights2 = (t.detach().clone().requires_grad_() for t in (x, weights))
    want = x2 * (weights2 * _scale(idx)).sum(dim=1, keepdim=True)
    (want * want).sum().backward()
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(x.grad, x2.grad)
    torch.testing.assert_close(weights.grad, weights2.grad)


@pytest.mark.parametrize("given", [False, True])
def test_rows_by_expert(run, given):
    run(2, _by_expert, given)
