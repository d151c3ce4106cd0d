# SPDX-License-Identifier: MIT
"""Tests of deep_ep run on NumPy arrays, and on torch tensors where torch is there."""

import importlib.util
import os

import numpy as np
import pytest

HAS_TORCH = importlib.util.find_spec("torch") is not None


class NumpyArrays:
    name = "numpy"

    def to(self, array):
        return array

    def back(self, array):
        return array


class TorchTensors:
    name = "torch"

    def to(self, array):
        import torch

        from entrepot._tensor import torch_view_of

        assert torch is not None
        return torch_view_of(np.ascontiguousarray(array))

    def back(self, tensor):
        import ml_dtypes
        import torch

        if tensor.dtype == torch.bfloat16:
            return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        if tensor.dtype == torch.float8_e4m3fn:
            return tensor.contiguous().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
        return tensor.numpy()


class CudaTensors(TorchTensors):
    name = "cuda"

    def to(self, array):
        return super().to(array).cuda()

    def back(self, tensor):
        return super().back(tensor.cpu())


needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
#: tools/gpu_python.sh sets EP_TEST_CUDA; asking torch would begin CUDA before ranks are forked.
HAS_CUDA = bool(os.environ.get("EP_TEST_CUDA"))
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU: tools/gpu_python.sh")
BOTH = [
    pytest.param(NumpyArrays(), id="numpy"),
    pytest.param(TorchTensors(), id="torch", marks=needs_torch),
]
ALL = BOTH + ([pytest.param(CudaTensors(), id="cuda")] if HAS_CUDA else [])
