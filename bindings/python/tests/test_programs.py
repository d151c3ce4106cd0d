# SPDX-License-Identifier: MIT
"""The doctor, the examples, and a wheel, as a user runs them."""

import json
import os
import subprocess
import sys
import tempfile
import zipfile

import pytest
from arrays import needs_cuda, needs_torch

import entrepot
from entrepot import doctor

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "..")
EXAMPLES = os.path.join(ROOT, "examples", "python")
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(entrepot.__file__)))
needs_checkout = pytest.mark.skipif(not os.path.isdir(EXAMPLES), reason="needs the checkout")


def _python(*arguments, **variables):
    environment = {**os.environ, "PYTHONPATH": PACKAGE, **variables}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=150
    )


def test_doctor():
    done = _python("-m", "entrepot.doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "ok" and report["self_test"]["ok"]
    assert report["deep_ep"]["ours"] and report["library"]["version"] == entrepot.__version__
    assert report["self_test"]["seconds"] < 20
    plain = _python("-m", "entrepot.doctor")
    assert plain.returncode == 0 and plain.stdout.rstrip().endswith("verdict    ok")


def test_doctor_without_the_library():
    done = _python("-m", "entrepot.doctor", "--json", EP_LIBRARY="/nowhere/libentrepot.so")
    assert done.returncode == 3
    report = json.loads(done.stdout)
    assert "/nowhere" in report["library"]["problem"]


def test_doctor_tells_a_failed_self_test():
    done = _python("-m", "entrepot.doctor", "--json", EP_TRANSPORT="pigeon")
    assert done.returncode == 1
    assert "pigeon" in json.loads(done.stdout)["self_test"]["problem"]


def test_doctor_with_a_long_temporary_folder(tmp_path):
    """A Unix socket's path has at most 107 bytes."""
    folder = tmp_path / ("t" * 120)
    folder.mkdir()
    done = _python("-m", "entrepot.doctor", TMPDIR=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr


def test_doctor_tells_the_cause(tmp_path, monkeypatch):
    """No all-gather without a place for its socket."""
    long = tmp_path / ("t" * 120)
    long.mkdir()
    monkeypatch.setattr(doctor, "_folder", lambda: tempfile.TemporaryDirectory(dir=long))
    report = doctor.self_test()
    assert not report["ok"] and "OSError: AF_UNIX path too long" in report["problem"]


@needs_checkout
@pytest.mark.parametrize("ranks", [1, 4])
def test_training_with_numpy(ranks):
    done = _python(os.path.join(EXAMPLES, "train_moe_numpy.py"), "--ranks", str(ranks))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["largest_relative_error"] < 2e-5
    assert report["losses"] == sorted(report["losses"], reverse=True)


@needs_torch
@needs_checkout
@pytest.mark.parametrize("layout", ["token", "expert"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_training_with_torch(layout, device):
    program = os.path.join(EXAMPLES, "train_moe_torch.py")
    short = ("--device", "cuda", "--ranks", "2", "--steps", "3") if device == "cuda" else ()
    done = _python(program, "--layout", layout, *short)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["losses"] == sorted(report["losses"], reverse=True)


@needs_checkout
def test_wheel(tmp_path):
    """A wheel built from the checkout has all it needs, and works elsewhere."""
    pytest.importorskip("scikit_build_core")
    built = _python(
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-build-isolation",
        "--no-deps",
        "-C",
        "cmake.define.EP_CUDA=OFF",
        "-w",
        str(tmp_path),
        ROOT,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = tmp_path.glob("entrepot-*-py3-none-*.whl")
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(target)
    for name in ("entrepot/libentrepot.so", "entrepot/py.typed", "deep_ep/py.typed"):
        assert name in names
    environment = {k: v for k, v in os.environ.items() if k != "EP_LIBRARY"}
    environment["PYTHONPATH"] = str(target)
    done = subprocess.run(
        [sys.executable, "-m", "entrepot.doctor", "--json"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["library"]["path"] == str(target / "entrepot/libentrepot.so")
