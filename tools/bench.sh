#!/bin/bash
# SPDX-License-Identifier: MIT
# Measures the tables of docs/performance.md on this machine, a few minutes.
# usage: tools/bench.sh [COMMAND]     (default: build/release/bin/entrepot)
# Every other load of the machine shows. As root, "chrt -f 10 tools/bench.sh" keeps it off the
# cores while ranks have something to do.
set -eu
cd "$(dirname "$0")/.."
entrepot=${1:-build/release/bin/entrepot}
json=""

value() { # value KEY: the first number after "KEY": in $json
    sed -nE "s/.*\"$1\": (\{\"dispatch\": )?(-?[0-9.e+-]+).*/\2/p" <<<"$json"
}

ratio() { # ratio A B [FORMAT]
    awk -v a="$1" -v b="$2" -v f="${3:-%.2f}" 'BEGIN { printf f, a / b }'
}

milliseconds() { # milliseconds KEY
    ratio "$(value "$1")" 1000
}

microseconds() { # microseconds KEY
    ratio "$(value "$1")" 1 %.1f
}

baseline=""
if "$entrepot" info --json | grep -q '"mpi_baseline": true'; then
    baseline="--baseline mpi"
else
    echo "This build has no MPI baseline; its columns stay empty."
fi

run() { # run OPTION...
    # shellcheck disable=SC2086
    json=$("$entrepot" bench ep --check --json $baseline "$@")
}

faster() { # faster PHASE: how many times as fast as MPI
    [ -z "$baseline" ] || ratio "$(value "baseline_$1_us")" "$(value "$1_us")"
}

normal_row() { # normal_row RANKS TOKENS WIRE
    run --ranks "$1" --tokens "$2" --wire "$3" --iters 20
    local copied
    copied=$(ratio "$(value copy_limit_us)" "$(value dispatch_us)")
    echo "| $1 | $2 | $3 | $(milliseconds dispatch_us) | $(faster dispatch) | $copied" \
        "| $(milliseconds combine_us) | $(faster combine)" \
        "| $(ratio "$(value combine_ordinary_us)" "$(value combine_us)")" \
        "| $(ratio "$(value peak_to_inputs_outputs)" 1) |"
}

low_latency_row() { # low_latency_row RANKS TOKENS EXPERTS
    run --mode ll --ranks "$1" --tokens "$2" --experts "$3" --wire fp8 --iters 100 --warmup 10
    echo "| $1 | $2 | $3 | $(microseconds dispatch_us) | $(faster dispatch)" \
        "| $(ratio "$(value copy_limit_us)" "$(value dispatch_us)") | $(microseconds combine_us)" \
        "| $(faster combine) | $(microseconds hook_send_us) | $(microseconds hook_recv_us)" \
        "| $(microseconds round_trip_us) |"
}

echo "Normal mode, hidden 7168, top-8 of 256 experts, ranks as processes"
echo "| ranks | tokens | wire | dispatch ms | times MPI | of copy limit | combine ms | times MPI | ordinary / window | memory / tensors |"
echo "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
normal_row 2 1024 bf16
normal_row 8 1024 bf16
normal_row 8 128 bf16
normal_row 8 1024 fp8
normal_row 64 64 bf16

echo
echo "Low-latency mode, hidden 7168, top-8, FP8 dispatch, BF16 combine"
echo "| ranks | tokens | experts | dispatch us | times MPI | of copy limit | combine us | times MPI | hook send us | hook receive us | round trip us |"
echo "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
low_latency_row 2 1 64
low_latency_row 2 128 64
low_latency_row 8 128 256
