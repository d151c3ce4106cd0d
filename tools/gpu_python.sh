#!/bin/bash
# SPDX-License-Identifier: MIT
# Runs the Python tests on a machine with a GPU, which the ranks share under MPS:
# this project's on CUDA tensors, what Python adds to a call, and DeepEP's own tests
# with this deep_ep. About a minute, and as much again for each number of DeepEP's ranks.
# usage: tools/gpu_python.sh [--deepep DIR] [--ranks "2 4 8"] [--python PYTHON]
#                            [--build BUILD] [--no-build]
#   DIR    tests/ of a DeepEP v1.2.1 checkout, see deepep_tests.sh
#   BUILD  where the library is built, or has been (--no-build): build/cuda if not set
# Needs torch with CUDA; pytest for this project's tests.
set -u
cd "$(dirname "$0")/.." || exit 1
deepep="" ranks="2 4 8" python=python3 build=build/cuda make=1
while [ $# -gt 0 ]; do
    [ "$1" != --no-build ] || { make=0 && shift && continue; }
    [ $# -gt 1 ] || {
        echo "gpu_python.sh: '$1' is unknown, or needs a value" >&2
        exit 2
    }
    case "$1" in
    --deepep) deepep=$2 ;;
    --ranks) ranks=$2 ;;
    --python) python=$2 ;;
    --build) build=$2 ;;
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

[ "$make" = 0 ] || {
    cmake --preset cuda -B "$build" -DEP_BUILD_TESTS=OFF -DEP_BUILD_APPS=OFF &&
        cmake --build "$build" -j "$(nproc)"
} >"$work/build.log" 2>&1 || {
    tail -40 "$work/build.log"
    exit 1
}
EP_LIBRARY=$(realpath "$build")/lib/libentrepot.so || exit 1
export EP_LIBRARY PYTHONPATH=$PWD/bindings/python:${PYTHONPATH:-}
export CUDA_MPS_PIPE_DIRECTORY=$work/pipe CUDA_MPS_LOG_DIRECTORY=$work/log
export PYTHONDONTWRITEBYTECODE=1
mkdir -p "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
gpu=${CUDA_VISIBLE_DEVICES:-0}
CUDA_VISIBLE_DEVICES=${gpu%%,*} nvidia-cuda-mps-control -d || exit 1
export CUDA_VISIBLE_DEVICES=0 # as the daemon's clients count
status=0
"$python" -m entrepot.doctor || status=1
EP_TEST_CUDA=1 timeout 400 "$python" -m pytest -q -x -p no:cacheprovider -k cuda \
    bindings/python/tests || status=1
timeout 60 "$python" bench/python_overhead.py --cuda --iterations 1000 || status=1
if [ -n "$deepep" ]; then
    tools/deepep_tests.sh "$deepep" --device cuda --ranks "$ranks" --python "$python" || status=1
fi
exit $status
