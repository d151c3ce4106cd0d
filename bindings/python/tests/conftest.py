# SPDX-License-Identifier: MIT
import os
import sys

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
if os.environ.get("EP_LIBRARY"):  # the checkout's packages, unless installed ones are tested
    sys.path.insert(0, os.path.dirname(HERE))
sys.path.insert(0, HERE)
os.environ.setdefault("EP_TIMEOUT_MS", "20000")

if os.environ.get("EP_TEST_CUDA"):
    import torch  # noqa: F401  once, before ranks are forked; that begins nothing of CUDA

from ranks import run_processes, run_threads  # noqa: E402


def pytest_collection_modifyitems(items):
    """Ranks on CUDA are processes."""
    for item in items:
        if "threads" in item.name and "cuda" in item.name:
            item.add_marker(pytest.mark.skip(reason="CUDA ranks are processes"))


@pytest.fixture(params=["processes", "threads"])
def run(request):
    return run_processes if request.param == "processes" else run_threads


@pytest.fixture
def processes():
    return run_processes


@pytest.fixture
def threads():
    return run_threads
