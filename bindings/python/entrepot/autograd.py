# SPDX-License-Identifier: MIT
"""Dispatch and combine as differentiable torch functions.

Their backward calls are collective too: the loss of every rank must depend on
the combined tokens. Whether a rank's experts used any row does not matter:
the backward of dispatch runs whenever that of its combine does.
"""

from typing import Any, List, NamedTuple, Optional

import torch

from .buffer import Buffer
from .results import Handle


class Dispatched(NamedTuple):
    x: torch.Tensor  #: [rows, H]
    topk_idx: torch.Tensor  #: [rows, K] local expert ids, -1 elsewhere
    topk_weights: Optional[torch.Tensor]  #: [rows, K] float32
    tokens_per_expert: List[int]
    handle: "DifferentiableHandle"


class DifferentiableHandle(NamedTuple):
    core: Handle
    anchor: torch.Tensor  #: empty; ties the backward of dispatch to that of combine
    topk_weights: Optional[torch.Tensor] = None  #: of the dispatch


def dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: Optional[torch.Tensor] = None,
    **options: Any,
) -> Dispatched:
    """Buffer.dispatch with gradients to x and topk_weights."""
    rows, idx, weights, anchor, received = _Dispatch.apply(
        x, topk_weights, buffer, topk_idx, options
    )
    return Dispatched(
        rows,
        idx,
        weights,
        received.tokens_per_expert,
        DifferentiableHandle(received.handle, anchor, topk_weights),
    )


def combine(
    buffer: Buffer,
    y: torch.Tensor,
    handle: DifferentiableHandle,
    topk_weights: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Buffer.combine with gradients to y and, with rows by expert, to the [T, K] topk_weights
    that it applies, which are those of the dispatch where none are given."""
    if topk_weights is None and handle.core.by_expert:
        topk_weights = handle.topk_weights
    return _Combine.apply(y, topk_weights, handle.anchor, buffer, handle.core)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_weights, buffer, topk_idx, options):  # type: ignore[override]
        received = buffer.dispatch(x.detach(), topk_idx, _detached(topk_weights), **options)
        ctx.buffer, ctx.handle = buffer, received.handle
        ctx.weighted = topk_weights is not None
        ctx.mark_non_differentiable(received.topk_idx)
        return received.x, received.topk_idx, received.topk_weights, x.new_empty(0), received

    @staticmethod
    def backward(ctx, grad_x, _idx, grad_weights, _anchor, _received):  # type: ignore[override]
        wanted = grad_weights.contiguous() if ctx.weighted else None
        grad, grad_topk_weights = ctx.buffer.dispatch_backward(
            grad_x.contiguous(), ctx.handle, wanted
        )
        return grad, grad_topk_weights, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, topk_weights, anchor, buffer, handle):  # type: ignore[override]
        ctx.buffer, ctx.handle = buffer, handle
        ctx.weighted = topk_weights is not None
        ctx.save_for_backward(*((y, topk_weights) if ctx.weighted else ()))
        ctx.anchor = anchor
        out, _ = buffer.combine(y.detach(), handle, _detached(topk_weights))
        return out

    @staticmethod
    def backward(ctx, grad_out):  # type: ignore[override]
        y, topk_weights = ctx.saved_tensors if ctx.weighted else (None, None)
        grad_y, grad_weights = ctx.buffer.combine_backward(
            grad_out.contiguous(), ctx.handle, y, topk_weights
        )
        return grad_y, grad_weights, torch.empty_like(ctx.anchor), None, None


def _detached(tensor: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if tensor is None else tensor.detach()
