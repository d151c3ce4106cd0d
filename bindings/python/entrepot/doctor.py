# SPDX-License-Identifier: MIT
"""Tells what is installed, which backend would be used, and whether two ranks can exchange tokens.

usage: python -m entrepot.doctor [--json]
Exit status: 0 all is well, 1 the self test failed, 3 the library cannot be used.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any, Dict, List, Optional

_SELF_TEST_SECONDS = 20
_SHORT_FOLDER = "/tmp"
_TOKENS, _HIDDEN, _TOPK, _EXPERTS = 64, 1024, 4, 8


def packages() -> Dict[str, Optional[str]]:
    """Versions of what matters here; None: not installed."""
    found: Dict[str, Optional[str]] = {}
    for name in ("numpy", "ml_dtypes", "torch", "mpi4py"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def library() -> Dict[str, Any]:
    """The C library: where it is and what it says of itself."""
    try:
        from . import _lib
    except ImportError as error:
        return {"usable": False, "problem": str(error)}
    return {"usable": True, "path": _lib.lib._name, "version": _lib.version}


def deep_ep() -> Dict[str, Any]:
    """Whose deep_ep an import would get."""
    spec = importlib.util.find_spec("deep_ep")
    if spec is None or spec.origin is None:
        return {"installed": False}
    ours = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return {
        "installed": True,
        "path": spec.origin,
        "ours": os.path.dirname(os.path.dirname(spec.origin)) == ours,
    }


def accelerators() -> Dict[str, Any]:
    """GPUs as the driver reports them, and whether the CUDA module is there."""
    from ._lib import lib
    from .devices import num_gpus

    folder = os.path.dirname(os.path.abspath(lib._name))
    module = os.path.join(folder, "libentrepot_cuda.so")
    names: List[str] = []
    try:
        answer = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
        )
        if answer.returncode == 0:
            names = [line.strip() for line in answer.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.TimeoutExpired):
        pass
    return {
        "gpus": names,
        "cuda_module": module if os.path.exists(module) else None,
        "usable_gpus": num_gpus(),
    }


def _folder() -> "tempfile.TemporaryDirectory[str]":
    """For the ranks' sockets, whose paths have at most 107 bytes."""
    long = len(os.fsencode(tempfile.gettempdir())) > 80
    return tempfile.TemporaryDirectory(dir=_SHORT_FOLDER if long else None)


def self_test() -> Dict[str, Any]:
    """Two ranks as processes: a dispatch and a combine, checked."""
    start = time.monotonic()
    with _folder() as folder:
        addresses = [os.path.join(folder, f"rank{r}") for r in range(2)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "entrepot.doctor", "--rank", str(r), *addresses],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
            for r in range(2)
        ]
        outputs = []
        for process in ranks:
            try:
                outputs.append(process.communicate(timeout=_SELF_TEST_SECONDS)[0])
            except subprocess.TimeoutExpired:
                process.kill()
                outputs.append(process.communicate()[0] + "\nno answer in time")
    failed = [
        f"rank {r}: {_last_line(text)}"
        for r, (process, text) in enumerate(zip(ranks, outputs))
        if process.returncode != 0
    ]
    return {
        "ok": not failed,
        "seconds": round(time.monotonic() - start, 2),
        "problem": "; ".join(failed) or None,
        "transport": None if failed else outputs[0].strip(),
    }


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "ended without a word"


def run_rank(rank: int, addresses: List[str]) -> None:
    """One rank of the self test: every token must come back as often as it was sent."""
    import numpy as np

    from . import Buffer, Group, layout

    rng = np.random.default_rng(rank)
    x = rng.integers(-8, 8, (_TOKENS, _HIDDEN)).astype(np.float32)
    idx = np.argsort(rng.random((_TOKENS, _EXPERTS)), axis=1)[:, :_TOPK].astype(np.int64)
    with Group.from_addresses(addresses, rank, timeout_ms=1000 * _SELF_TEST_SECONDS) as group:
        with Buffer(group, verify=True) as buffer:
            received = buffer.dispatch(x, idx, num_experts=_EXPERTS)
            out, _ = buffer.combine(received.x, received.handle)
        copies = layout(idx, _EXPERTS, group.size).token_in_rank.sum(axis=1, keepdims=True)
        if not np.array_equal(out, x * copies):
            raise AssertionError("the combined tokens differ from those sent")
        print(group.transport)


def examine() -> Dict[str, Any]:
    """Everything, as one object."""
    report: Dict[str, Any] = {
        "python": platform.python_version(),
        "packages": packages(),
        "library": library(),
        "deep_ep": deep_ep(),
    }
    if not report["library"]["usable"]:
        report["verdict"] = "the C library cannot be used"
        return report
    report.update(accelerators())
    report["backend"] = _backend(report)
    report["self_test"] = self_test()
    report["verdict"] = "ok" if report["self_test"]["ok"] else "the self test failed"
    return report


def _backend(report: Dict[str, Any]) -> str:
    if report["usable_gpus"] and report["packages"]["torch"]:
        return "cuda for CUDA tensors, cpu for others"
    return "cpu"


def _print(report: Dict[str, Any]) -> None:
    library_report, own = report["library"], report["deep_ep"]
    versions = ", ".join(f"{n} {v or '-'}" for n, v in report["packages"].items())
    print(f"python     {report['python']}; {versions}")
    if not library_report["usable"]:
        print(f"library    {library_report['problem']}")
    else:
        print(f"library    {library_report['version']} at {library_report['path']}")
    if not own["installed"]:
        print("deep_ep    not installed")
    elif own["ours"]:
        print("deep_ep    this project's")
    else:
        print(f"deep_ep    ANOTHER PROJECT'S, at {own['path']}: uninstall it to use this one")
    if library_report["usable"]:
        gpus = ", ".join(report["gpus"]) or "no GPU"
        module = report["cuda_module"] or "no CUDA module"
        print(f"gpu        {gpus}; {module}")
        print(f"backend    {report['backend']}")
        test = report["self_test"]
        told = f"ok over {test['transport']}" if test["ok"] else f"FAILED: {test['problem']}"
        print(f"self test  2 ranks, dispatch and combine: {told} ({test['seconds']} s)")
    print(f"verdict    {report['verdict']}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m entrepot.doctor", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("addresses", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_rank(arguments.rank, arguments.addresses)
        return 0
    report = examine()
    if arguments.json:
        print(json.dumps(report))
    else:
        _print(report)
    if not report["library"]["usable"]:
        return 3
    return 0 if report["self_test"]["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
