#!/bin/bash
# SPDX-License-Identifier: MIT
# With --mps a command leaves no daemon and no folder behind, however it ends; over the fake GPU
# and a control program that notes what it was asked.
# usage: mps_test.sh COMMAND FAKE_GPU
set -eu
command=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export EP_CUDA_MODULE=$2 PATH=$work:$PATH LOG=$work/log

fail() {
    echo "mps_test: $*"
    cat "$work/log" "$work/err"
    exit 1
}
daemon() { # daemon COMMAND: what the control program does when it is to start the daemon
    cat >"$work/nvidia-cuda-mps-control" <<END
#!/bin/bash
[ -d "\$CUDA_MPS_PIPE_DIRECTORY" ] || exit 9
if [ "\${1-}" = -d ]; then
    echo "start \$CUDA_MPS_PIPE_DIRECTORY" >>"\$LOG"
    $1
else
    echo "\$(cat)" >>"\$LOG"
fi
END
    chmod +x "$work/nvidia-cuda-mps-control"
}
run() { # run: the command, whose ranks fail on a GPU that does nothing; 0 or more is its exit code
    rm -f "$LOG"
    code=0
    "$command" bench ep --backend cuda --mps --ranks 1 --tokens 8 --iters 1 --experts 16 \
        >/dev/null 2>"$work/err" || code=$?
    folder=$(sed -n 's/^start //p' "$LOG")
    [ -n "$folder" ] || fail "the daemon was not started"
}
over() { [ ! -e "$folder" ] && [ "$(tail -1 "$LOG")" = "$1" ]; } # over LAST_LINE

daemon "exit 0"
run
over quit || fail "at its end the command left $folder"

daemon "exit 3"
run
[ $code = 3 ] || fail "exit code $code, not 3"
over "start $folder" || fail "a daemon that did not start was ended, or left $folder"
grep -q -- "--mps: nvidia-cuda-mps-control -d ended with 3" "$work/err" || fail "no reason"

for signal in INT TERM KILL; do
    daemon "kill -$signal \$PPID"
    run 2>/dev/null # bash tells of the signal
    [ $code -gt 128 ] || fail "exit code $code after SIG$signal"
    for ((i = 0; i < 100; i++)); do
        ! over quit || break
        sleep 0.1
    done
    over quit || fail "SIG$signal left the daemon or $folder"
done
echo "mps_test: ok"
