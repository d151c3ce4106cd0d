#!/bin/bash
# SPDX-License-Identifier: MIT
# Runs the Python tests on a machine with a GPU, which the ranks share under MPS:
# this project's on CUDA tensors, what Python adds to a call, and DeepEP's own tests
# with this deep_ep. About a minute, and as much again for each number of DeepEP's ranks.
# usage: tools/gpu_python.sh [--deepep DIR] [--ranks "2 4 8"] [--python PYTHON]
#   DIR  tests/ of a DeepEP v1.2.1 checkout, see deepep_tests.sh
# Needs torch with CUDA; pytest for this project's tests.
set -u
cd "$(dirname "$0")/.." || exit 1
deepep="" ranks="2 4 8" python=python3
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || {
        echo "gpu_python.sh: '$1' is unknown, or needs a value" >&2
        exit 2
    }
    case "$1" in
    --deepep) deepep=$2 ;;
    --ranks) ranks=$2 ;;
    --python) python=$2 ;;
    *)
        echo "gpu_python.sh: unknown option '$1'" >&2
        exit 2
        ;;
    esac
    shift 2
done
command -v nvidia-cuda-mps-control >/dev/null || {
    echo "gpu_python.sh: nvidia-cuda-mps-control is not found; run this where a GPU's driver is installed" >&2
    exit 1
}
work=$(mktemp -d)
finish() {
    echo quit | nvidia-cuda-mps-control >/dev/null 2>&1
    rm -rf "$work"
}
trap finish EXIT

{ cmake --preset cuda -DEP_BUILD_TESTS=OFF -DEP_BUILD_APPS=OFF &&
    cmake --build --preset cuda -j "$(nproc)"; } >"$work/build.log" 2>&1 || {
    tail -40 "$work/build.log"
    exit 1
}
export EP_LIBRARY=$PWD/build/cuda/lib/libentrepot.so PYTHONPATH=$PWD/bindings/python:${PYTHONPATH:-}
export CUDA_MPS_PIPE_DIRECTORY=$work/pipe CUDA_MPS_LOG_DIRECTORY=$work/log
export CUDA_VISIBLE_DEVICES=0 PYTHONDONTWRITEBYTECODE=1
mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
nvidia-cuda-mps-control -d || exit 1
status=0
"$python" -m entrepot.doctor || status=1
EP_TEST_CUDA=1 timeout 400 "$python" -m pytest -q -x -p no:cacheprovider -k cuda \
    bindings/python/tests || status=1
timeout 60 "$python" bench/python_overhead.py --cuda --iterations 1000 || status=1
if [ -n "$deepep" ]; then
    tools/deepep_tests.sh "$deepep" --device cuda --ranks "$ranks" --python "$python" || status=1
fi
exit $status
