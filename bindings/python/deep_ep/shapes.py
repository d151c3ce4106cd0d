# SPDX-License-Identifier: MIT
"""Shapes of arguments, checked where Python needs them before the library does."""

from typing import Any, Tuple

from entrepot import ArgumentError
from entrepot._tensor import describe


def matrix_shape(call: str, name: str, tensor: Any) -> Tuple[int, int]:
    """Shape of a tensor that must have two dimensions."""
    shape = getattr(tensor, "shape", None)
    if shape is None:  # an object with __dlpack__ or a buffer only, or no tensor
        shape = describe(tensor, name).shape
    if len(shape) != 2:
        raise ArgumentError(f"{call}: {name} has shape {tuple(shape)}; it must be two-dimensional")
    return shape


def length_of(call: str, name: str, counts: Any) -> int:
    """Number of counts in a tensor or a list."""
    try:
        return len(counts)
    except TypeError:
        raise TypeError(
            f"{call}: {name} is {counts!r}; it must be a tensor or a list, one count an expert"
        ) from None
