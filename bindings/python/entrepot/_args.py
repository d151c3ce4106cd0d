# SPDX-License-Identifier: MIT
"""Filling argument structures."""

from typing import Any, Dict, List, Tuple

import numpy as np

from . import _abi
from ._tensor import I32, UE8M0X4, Described, Kind, describe, fill, row_major

SCALES = {"f32": 0, "pow2": 1, "ue8m0": 2}


def choose(table: Dict[str, int], name: str, value: str) -> int:
    """Code of an option given by name."""
    code = table.get(value)
    if code is None:
        raise ValueError(f"{name} is {value!r}; it can be {', '.join(map(repr, table))}")
    return code


def put_scales(args: Any, field: Any, obj: Any, keep: List[Any]) -> None:
    """Scales that are int32 hold four exponents each."""
    described = describe(obj, "scales")
    fill(args, field.offset, described, UE8M0X4 if described.dtype == I32 else None)
    keep.append(described.keep)


def expert_ranks(expert_rank: Any, num_experts: int, keep: List[Any]) -> int:
    """Address of the expert-to-rank table as contiguous int32 in host memory."""
    table = np.ascontiguousarray(expert_rank, dtype=np.int32)
    if table.shape != (num_experts,):
        raise ValueError(f"expert_rank has shape {table.shape}; it must be ({num_experts},)")
    keep.append(table)
    return table.ctypes.data


def contiguous(pointer: int, shape: Tuple[int, ...], dtype: int, kind: Kind) -> _abi.Tensor:
    tensor = _abi.Tensor()
    described = Described(
        pointer, dtype, shape, row_major(shape), kind.device, max(kind.device_index, 0), None
    )
    fill(tensor, 0, described)
    return tensor
