#!/bin/bash
# SPDX-License-Identifier: MIT
# Runs DeepEP's own intranode and low-latency tests with this deep_ep.
# usage: tools/deepep_tests.sh DIR [--device cpu|cuda] [--ranks "2 4 8"] [--python PYTHON]
#        [--tests "intranode low_latency logfmt"]
#   DIR  tests/ of a DeepEP v1.2.1 checkout, which is not part of this repository
# The test files run as they are; tools/deepep_test_utils.py stands in for their
# utils.py. EP_LIBRARY and PYTHONPATH say which library and packages are tested.
# On the CPU sizes are smaller, and ranks run there; on a GPU they share it (MPS).
set -u
[ $# -gt 0 ] || { sed -n 3,9p "$0"; exit 2; }
tools=$(cd "$(dirname "$0")" && pwd)
tests=$1 device=cpu ranks="2 4 8" python=python3 chosen="intranode low_latency logfmt"
shift
while [ $# -gt 0 ]; do
    [ $# -gt 1 ] || {
        echo "deepep_tests.sh: '$1' is unknown, or needs a value" >&2
        exit 2
    }
    case "$1" in
    --device) device=$2 ;;
    --ranks) ranks=$2 ;;
    --python) python=$2 ;;
    --tests) chosen=$2 ;;
    *)
        echo "deepep_tests.sh: unknown option '$1'" >&2
        exit 2
        ;;
    esac
    shift 2
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$tests"/test_intranode.py "$tests"/test_low_latency.py "$work" &&
    cp "$tests"/utils.py "$work"/deepep_utils.py &&
    cp "$tools"/deepep_test_utils.py "$work"/utils.py || exit 1
export EP_TEST_DEVICE=$device OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1
passed=0 failed=""

attempt() { # attempt PROGRAM RANKS ARGUMENT...
    local program=$1 count=$2 start=$SECONDS
    shift 2
    export MASTER_PORT=$((20000 + RANDOM % 20000))
    echo "== $program, $count ranks on $device $*"
    if timeout 300 "$python" "$work/$program" --num-processes "$count" "$@" >"$work/log" 2>&1; then
        passed=$((passed + 1))
        echo "== passed in $((SECONDS - start)) s; cases that it prints as passed: $(grep -c ' passed$' "$work/log")"
    else
        failed="$failed $program/$count"
        tail -40 "$work/log"
        echo "== FAILED after $((SECONDS - start)) s"
    fi
}

small="" small_ll=""
if [ "$device" = cpu ]; then
    small="--num-tokens 300 --hidden 2048 --num-experts 64"
    small_ll="--num-tokens 24 --hidden 2048 --num-experts 32"
fi
for r in $ranks; do
    for test in $chosen; do
        # shellcheck disable=SC2086
        case "$test" in
        intranode) attempt test_intranode.py "$r" $small ;;
        low_latency) attempt test_low_latency.py "$r" $small_ll ;;
        logfmt) attempt test_low_latency.py "$r" $small_ll --use-logfmt ;;
        *)
            echo "deepep_tests.sh: unknown test '$test'" >&2
            exit 2
            ;;
        esac
    done
done
echo "passed $passed${failed:+, failed:$failed}"
[ -z "$failed" ]
