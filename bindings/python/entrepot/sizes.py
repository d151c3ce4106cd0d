# SPDX-License-Identifier: MIT
"""Local computations: where tokens go, and how much memory calls need."""

from ctypes import byref
from typing import Any, List, NamedTuple, Optional, Tuple

from . import _abi
from ._args import SCALES, choose, expert_ranks
from ._lib import check, lib, raise_status
from ._tensor import (
    CUDA,
    I32,
    U8,
    Described,
    current_stream,
    describe,
    dtype_code,
    empty,
    fill,
    kind_of,
    put,
    torch_module,
)


class Layout(NamedTuple):
    tokens_per_rank: Any  #: [R] int32, each token counted once
    tokens_per_node: Any  #: [R / ranks_per_node] int32
    tokens_per_expert: Any  #: [E] int32
    token_in_rank: Any  #: [T, R] bool


def layout(
    topk_idx: Any,
    num_experts: int,
    num_ranks: int,
    *,
    expert_rank: Any = None,
    ranks_per_node: Optional[int] = None,
) -> Layout:
    """Counts where this rank's tokens go.

    Args:
        topk_idx: [T, K] int32 or int64; -1: no expert. Of a torch tensor on a GPU it is counted
            there, in the order of torch's current stream.
        num_experts: E.
        num_ranks: R.
        expert_rank: [E] rank of each expert; None: equal blocks.
        ranks_per_node: consecutive ranks of one node; None: all.
    """
    kind = kind_of(topk_idx)
    if kind.device == CUDA and kind.torch:
        return _on_current_stream(topk_idx, num_experts, num_ranks, expert_rank, ranks_per_node)
    described = describe(topk_idx, "topk_idx")
    keep: List[Any] = []
    table = None if expert_rank is None else expert_ranks(expert_rank, num_experts, keep)
    per_node = num_ranks if ranks_per_node is None else ranks_per_node
    nodes = num_ranks // per_node if per_node > 0 else 0
    out = [empty((n,), I32, kind) for n in (num_ranks, nodes, num_experts)]
    out.append(empty((described.shape[0], num_ranks), U8, kind))
    tensor = _abi.Tensor()
    fill(tensor, 0, described)
    check(
        lib.ep_layout(
            byref(tensor), num_experts, table, num_ranks, per_node, *(_address(o) for o in out)
        )
    )
    out[3] = out[3].view(_bool_like(out[3]))
    return Layout(*out)


def _on_current_stream(
    topk_idx: Any,
    num_experts: int,
    num_ranks: int,
    expert_rank: Any,
    ranks_per_node: Optional[int],
) -> Layout:
    torch, table = torch_module(), None
    if expert_rank is not None:
        keep: List[Any] = []
        expert_ranks(expert_rank, num_experts, keep)
        table = torch.from_numpy(keep[0]).to(topk_idx.device)
    per_node = num_ranks if ranks_per_node is None else ranks_per_node
    nodes = topk_idx.new_empty(num_ranks // per_node if per_node > 0 else 0, dtype=torch.int32)
    stream = current_stream(topk_idx.get_device())
    ranks, experts, members = layout_on_stream(
        topk_idx, num_experts, num_ranks, stream, table, per_node, nodes
    )
    return Layout(ranks, nodes, experts, members)


def layout_on_stream(
    topk_idx: Any,
    num_experts: int,
    num_ranks: int,
    stream: Optional[int],
    table: Any = None,
    ranks_per_node: int = 1,
    nodes: Any = None,
) -> Tuple[Any, Any, Any]:
    """Tokens per rank and per expert, and membership, of a torch tensor on a GPU, counted in the
    order of a stream; also tokens per node, into `nodes`. `table`: expert_rank there."""
    torch = torch_module()
    ids = _abi.Tensor()
    put(ids, _abi.Tensor.data, topk_idx, [])  # the whole of it begins there
    int32 = torch.int32
    ranks = topk_idx.new_empty(num_ranks, dtype=int32)
    experts = topk_idx.new_empty(num_experts, dtype=int32)
    members = topk_idx.new_empty(topk_idx.shape[0], num_ranks, dtype=torch.bool)
    status = lib.ep_layout_on_stream(
        ids,
        num_experts,
        None if table is None else table.data_ptr(),
        num_ranks,
        ranks_per_node,
        ranks.data_ptr(),
        None if nodes is None else nodes.data_ptr(),
        experts.data_ptr(),
        members.data_ptr(),
        stream,
    )
    if status:
        raise_status(status)
    return ranks, experts, members


def _address(array: Any) -> int:
    view: Described = describe(array)
    return view.data


def _bool_like(array: Any) -> Any:
    if type(array).__module__ == "numpy":
        return "bool"
    import torch

    return torch.bool


class NormalSize(NamedTuple):
    control_bytes: int  #: notifications and counts, whatever the routing
    row_bytes: int  #: one received row with everything that travels along
    expected_bytes: int  #: window for one live result when routing is uniform
    worst_bytes: int  #: window for one live result whatever the routing


def normal_size(
    *,
    num_ranks: int,
    num_tokens: int,
    hidden: int,
    topk: int,
    num_experts: int,
    dtype: Any = "bfloat16",
    scale: str = "f32",
    by_expert: bool = False,
    expert_alignment: int = 1,
    topk_bytes: int = 8,
) -> NormalSize:
    """Exact sizes for dispatch: a window of worst_bytes per live result never grows."""
    shape = _abi.NormalShape(
        num_ranks=num_ranks,
        num_tokens=num_tokens,
        hidden=hidden,
        topk=topk,
        num_experts=num_experts,
        max_experts=num_experts,
        dtype=dtype_code(dtype),
        scale=choose(SCALES, "scale", scale),
        layout=int(by_expert),
        expert_alignment=expert_alignment,
        topk_bytes=topk_bytes,
    )
    size = _abi.NormalSize()
    check(lib.ep_normal_size_query(byref(shape), byref(size)))
    return NormalSize(*(getattr(size, name) for name in NormalSize._fields))


class LlSize(NamedTuple):
    window_bytes: int  #: memory that two live results can come to need of the window
    private_bytes: int  #: likewise outside the window
    address_bytes: int  #: address space of both


def ll_size(
    *,
    num_ranks: int,
    max_tokens: int,
    hidden: int,
    topk: int,
    num_experts: int,
    max_expert_rows: int = 0,
    fp8: bool = False,
    scale: str = "f32",
) -> LlSize:
    """Exact sizes for two live low-latency results."""
    shape = _abi.LlShape(
        num_ranks=num_ranks,
        max_tokens=max_tokens,
        hidden=hidden,
        topk=topk,
        num_experts=num_experts,
        max_expert_rows=max_expert_rows,
        wire=_abi.DType.E4M3 if fp8 else _abi.DType.BF16,
        scale=choose(SCALES, "scale", scale),
    )
    size = _abi.LlSize()
    check(lib.ep_ll_size_query(byref(shape), byref(size)))
    return LlSize(*(getattr(size, name) for name in LlSize._fields))
