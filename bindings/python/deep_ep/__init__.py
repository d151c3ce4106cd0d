# SPDX-License-Identifier: MIT
"""The interface of DeepEP (its V1 names) over Entrepot.

Code written for DeepEP runs unchanged, on CPU and CUDA tensors and on NumPy
arrays; docs/python.md tells what differs. Without torch, NumPy arrays with
ml_dtypes take the place of tensors.
"""

from typing import Any

from .buffer import Buffer
from .config import Config
from .utils.event import EventHandle, EventOverlap

#: Of the interface, not of Entrepot, whose version is entrepot.__version__.
__version__ = "1.2.1"
__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]


def __getattr__(name: str) -> Any:
    if name != "topk_idx_t":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:  # here and not above: torch takes seconds to import
        import torch
    except ImportError:
        import numpy

        globals()[name] = numpy.int64
    else:
        globals()[name] = torch.int64
    return globals()[name]
