#!/bin/bash
# SPDX-License-Identifier: MIT
# Checks that each room includes only what lies below it (docs/architecture.md).
# usage: tools/check_includes.sh [--self-test] [ROOT]
set -u
tools=$(cd "$(dirname "$0")" && pwd)

# What a room may include beside <entrepot/...>, itself and, in its tests, support/.
allowed() {
    case "$1" in
    src/base) echo "" ;;
    src/codec | src/device | src/plan) echo "base/" ;;
    src/transport) echo "base/ device/" ;;
    src/ep) echo "base/ codec/ device/ transport/ops.h transport/peer.h" ;;
    src/kernel) echo "base/ codec/ device/" ;;
    *) echo "" ;; # apps, examples, bindings, bench: the public headers only
    esac
}

check_one() { # check_one ROOT FILE
    local file=$2 room included prefix ok line text
    case "$file" in
    src/*) room=${file#src/} && room=src/${room%%/*} ;;
    *) room=${file%%/*} ;;
    esac
    local own=${room#src/}/ folder=${file%/*} below
    below=$(allowed "$room")
    while IFS=: read -r line text; do
        included=${text#*\"}
        included=${included%%\"*}
        case "$included" in
        entrepot/*) continue ;;
        esac
        ok=no
        for prefix in "$own" $below; do
            [[ $included == "$prefix"* ]] && ok=yes
        done
        [[ $file == *_test.c && $included == support/* ]] && ok=yes
        # A name without a folder is a file beside this one.
        [[ $included != */* && -f $1/$folder/$included ]] && ok=yes
        # Siblings never see each other: what lies in transport/NAME/ is for NAME
        # and for the files that stand directly in src/transport.
        if [[ $included =~ ^(transport|device)/([^/]+)/ ]]; then
            local sibling=src/${BASH_REMATCH[1]}/${BASH_REMATCH[2]}
            [[ $folder == "$sibling" || $folder == "${sibling%/*}" ]] || ok=no
        fi
        if [ $ok = no ]; then
            echo "$file:$line: $room may not include \"$included\""
            bad=1
        fi
    done < <(grep -nE '^[[:space:]]*#[[:space:]]*include[[:space:]]*"' "$1/$file")
    # Accelerator and network headers stay in the rooms named for them.
    if [[ ! $file =~ ^src/(device|transport)/[^/]+/ && ! $file =~ \.cuh?$ ]] &&
        grep -nHE '#[[:space:]]*include[[:space:]]*<(cuda|nccl|rdma/|infiniband/)' "$1/$file"; then
        echo "$file: accelerator and network headers belong to a module's folder"
        bad=1
    fi
}

check_tree() { # check_tree ROOT
    local file
    bad=0
    while IFS= read -r file; do
        check_one "$1" "$file"
    done < <(cd "$1" && find src apps examples bindings -regex '.*\.\(c\|h\|cu\|cuh\)' 2>/dev/null | sort)
    return $bad
}

# A planted include of every forbidden kind must be found, an allowed one must not.
self_test() {
    root=$(mktemp -d) # global: the trap outlives this function
    trap 'rm -rf "$root"' EXIT
    plant() {
        mkdir -p "$root/$(dirname "$1")"
        printf '%s\n' "$2" >"$root/$1"
    }
    expect() { # expect STATUS WHAT
        check_tree "$root" >"$root/out"
        local got=$?
        if [ $got -ne "$1" ]; then
            echo "self-test: $2: status $got, expected $1"
            cat "$root/out"
            exit 1
        fi
        rm -rf "$root/src" "$root/apps"
    }
    plant src/base/a.c '#include "codec/rows.h"' && expect 1 "base includes codec"
    plant src/codec/a.c '#include "ep/group.h"' && expect 1 "codec includes ep"
    plant src/ep/a.c '#include "transport/shm/shm.h"' && expect 1 "ep includes one transport"
    plant src/ep/a.c '  #  include "transport/pages.h"' && expect 1 "ep includes a transport's inside"
    plant src/transport/shm/a.c '#include "transport/fault/x.h"' && expect 1 "siblings"
    plant src/plan/a.c '#include "codec/rows.h"' && expect 1 "plan includes codec"
    plant apps/main.c '#include "base/error.h"' && expect 1 "app includes the inside"
    plant src/ep/a.c '#include <cuda_runtime.h>' && expect 1 "core includes CUDA"
    plant src/transport/open.c '#include "transport/shm/shm.h"' && expect 0 "the list of transports"
    plant src/ep/a_test.c '#include "support/test.h"' && expect 0 "a unit test"
    plant src/ep/a.c '#include "transport/ops.h"' && expect 0 "ep includes the plug-in point"
    plant apps/main.c '#include "entrepot/ep.h"' && expect 0 "app includes public headers"
    echo "check_includes: self-test passed"
}

if [ "${1:-}" = --self-test ]; then
    self_test
    exit 0
fi
check_tree "${1:-$tools/..}"
