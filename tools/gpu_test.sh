#!/bin/bash
# SPDX-License-Identifier: MIT
# Tests on a machine with a GPU, which ranks share under MPS of the script's own:
# the suites of the CPU transports on device memory, what only devices have, the
# commands with --check, and compute-sanitizer on small cases. One line each.
# usage: tools/gpu_test.sh [--parts "suites device commands sanitizer"] [--paths "sm90 sm80"]
#                          [--limit SECONDS] [--build DIR] [--no-build]
#   --paths  kernels to run: those of SM90, and those of SM80 on any device
#   --limit  of one line, 150 if not set; a line that takes longer has failed
# CUDA_VISIBLE_DEVICES chooses among GPUs.
# The Python packages have a script of their own, gpu_python.sh.
set -u
cd "$(dirname "$0")/.." || exit 1
parts="suites device commands sanitizer" paths="sm90 sm80" limit=150 build=build/cuda make=1
misuse() {
    echo "gpu_test.sh: $1" >&2
    exit 2
}
among() { # among OPTION "ALLOWED" VALUE...
    local option=$1 allowed=$2 value
    shift 2
    for value in "$@"; do
        case " $allowed " in
        *" $value "*) ;;
        *) misuse "$option has '$value'; it can be of: $allowed" ;;
        esac
    done
}
while [ $# -gt 0 ]; do
    case "$1" in
    --no-build) make=0 && shift && continue ;;
    --parts | --paths | --limit | --build) [ $# -gt 1 ] || misuse "$1 needs a value" ;;
    *) misuse "unknown option '$1'" ;;
    esac
    case "$1" in
    --parts) parts=$2 ;;
    --paths) paths=$2 ;;
    --limit) limit=$2 ;;
    --build) build=$2 ;;
    esac
    shift 2
done
# shellcheck disable=SC2086
among --parts "suites device commands sanitizer" $parts
# shellcheck disable=SC2086
among --paths "sm90 sm80" $paths
case "$limit" in
*[!0-9]* | "" | 0) misuse "--limit is '$limit'; it can be a number of seconds from 1" ;;
esac
for tool in nvidia-smi nvidia-cuda-mps-control; do
    command -v $tool >/dev/null || {
        echo "gpu_test.sh: $tool is not found; run this where a GPU's driver is installed" >&2
        exit 1
    }
done
work=$(mktemp -d)
failed=0 count=0
export CUDA_MPS_PIPE_DIRECTORY=$work/mps CUDA_MPS_LOG_DIRECTORY=$work/mps
mkdir "$work/mps"

# What the daemon sees its clients number from 0.
gpus=${CUDA_VISIBLE_DEVICES-}
mps_start() {
    nvidia-cuda-mps-control -d || exit 1
    [ -z "$gpus" ] || CUDA_VISIBLE_DEVICES=$(seq -s, 0 "$(tr -cd , <<<"$gpus" | wc -c)")
}
mps_stop() {
    echo quit | nvidia-cuda-mps-control >/dev/null 2>&1
    [ -z "$gpus" ] || CUDA_VISIBLE_DEVICES=$gpus
}
finish() {
    mps_stop
    rm -rf "$work"
}
trap finish EXIT

if [ "$make" = 1 ]; then
    { cmake --preset cuda && cmake --build --preset cuda -j "$(nproc)"; } >"$work/build.log" 2>&1 || {
        tail -40 "$work/build.log"
        exit 1
    }
fi

line() { # line PART PATH WHAT COMMAND...: runs it and prints a row; its output when it fails
    local part=$1 path=$2 what=$3 start=$SECONDS code result=ok
    shift 3
    EP_CUDA_PATH=$path timeout -k 5 "$limit" "$@" >"$work/log" 2>&1 </dev/null
    code=$?
    count=$((count + 1))
    case $code in
    0) grep -q "SKIPPED TEST" "$work/log" && result="ok, some skipped" ;;
    124 | 137) result="FAILED: over $limit s" ;;
    *) result="FAILED: exit code $code" ;;
    esac
    printf '%-10s %-5s %-62s %4d s  %s\n' "$part" "$path" "$what" $((SECONDS - start)) "$result"
    [ $code -eq 0 ] || {
        failed=$((failed + 1))
        grep -vE '^\[|FAILED TEST|SKIPPED TEST|^$' "$work/log" | head -12 | cut -c1-240 | sed 's/^/    | /'
        grep -E '^\[  FAILED' "$work/log" | sort -u | head -6 | sed 's/^/    | /'
    }
}

# The same programs as on the CPU; EP_TEST_DEVICE has them use devices.
suites() {
    local path
    for path in $paths; do
        for test in normal_test low_latency_test repeat_test arguments_dispatch_test \
            arguments_combine_test arguments_ll_test crossed_calls_test given_up_test refuse_test \
            early_counts_test recover_test; do
            line suites "$path" "$test" env EP_TEST_DEVICE=cuda "$build/bin/$test"
        done
        line suites "$path" "seeded_test" \
            env EP_TEST_DEVICE=cuda EP_SEEDED_WORLDS=4 "$build/bin/seeded_test"
        line suites "$path" "normal_stress_test, 240 calls" \
            env EP_TEST_DEVICE=cuda EP_STRESS_CALLS=240 "$build/bin/normal_stress_test"
        line suites "$path" "low_latency_stress_test, 100 steps" \
            env EP_TEST_DEVICE=cuda EP_STRESS_CALLS=100 "$build/bin/low_latency_stress_test"
        line suites "$path" "exhaustive_test, 40 worlds a space" \
            env EP_TEST_DEVICE=cuda EP_EXHAUSTIVE=40 "$build/bin/exhaustive_test"
        line suites "$path" "exhaustive_ll_test, 100 worlds a space" \
            env EP_TEST_DEVICE=cuda EP_EXHAUSTIVE=100 "$build/bin/exhaustive_ll_test"
    done
}

device() {
    local path part
    for path in $paths; do
        for part in low_latency graphs failures; do
            line device "$path" "cuda_test $part" "$build/bin/cuda_test" "$part"
        done
        line device "$path" "cuda_limits_test" "$build/bin/cuda_limits_test"
        line device "$path" "cuda_verify_test" "$build/bin/cuda_verify_test"
    done
    line device "" "cuda_layout_test" "$build/bin/cuda_layout_test"
}

bench() { # bench PATH ARGUMENT...
    line commands "$1" "bench ep ${*:2}" \
        "$build/bin/entrepot" bench ep --backend cuda --check --json --iters 3 --warmup 1 "${@:2}"
}

commands() {
    local path ranks
    line commands "" "demo, 3 ranks" "$build/bin/entrepot" demo --backend cuda --ranks 3 --tokens 9 --json
    for path in $paths; do
        for ranks in 1 3 5; do
            bench "$path" --ranks $ranks --experts $((ranks * 32)) --tokens 100
        done
        bench "$path" --ranks 8 --tokens 0
        bench "$path" --ranks 8 --tokens 64 --hidden 16384 --topk 32 --wire fp8
        bench "$path" --ranks 8 --tokens 4096 --hidden 128 --topk 1
        bench "$path" --ranks 8 --tokens 1024 --wire fp8 --sms 8
        for ranks in 1 3 8; do
            bench "$path" --mode ll --ranks $ranks --experts $((ranks * 32)) --tokens 100 --wire fp8
        done
    done
}

# The tool knows nothing of MPS: ranks take turns, and are given time. Each rank prints a summary.
sanitizer() {
    local path tool ranks mode
    local clean='"$@" 2>&1 | tee -a /dev/stderr |
        awk "/SUMMARY/ { n++; bad = bad || !/SUMMARY: 0 / } END { exit bad || n == 0 }"'
    mps_stop
    for path in $paths; do
        for tool in memcheck racecheck; do
            for ranks in 1 2 3; do
                for mode in normal ll; do
                    line sanitizer "$path" "$tool, $mode, $ranks ranks" \
                        env EP_TIMEOUT_MS=120000 bash -o pipefail -c "$clean" clean \
                        compute-sanitizer --tool "$tool" --target-processes all \
                        "$build/bin/entrepot" bench ep --backend cuda --mode "$mode" --wire fp8 \
                        --ranks "$ranks" --experts $((ranks * 4)) --topk 3 --tokens 6 --hidden 512 \
                        --iters 1 --warmup 0 --sms 2
                done
            done
        done
    done
    mps_start
}

nvidia-smi -L
mps_start
for part in $parts; do
    $part
done
echo "$((count - failed)) of $count passed, in $SECONDS s"
[ "$failed" -eq 0 ]
