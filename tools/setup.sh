#!/bin/sh
# SPDX-License-Identifier: MIT
# Installs what is missing to build and test Entrepot on Debian or Ubuntu.
# usage: tools/setup.sh [build] [test] [lint] [bench]      (default: build)
# Does nothing, and calls no package manager, when everything is there.
set -eu

missing=""

need_command() { # need_command COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}

need_library() { # need_library PKG-CONFIG-NAME PACKAGE
    pkg-config --exists "$1" 2>/dev/null || missing="$missing $2"
}

# A compiler without its C library's headers is of no use.
need_compiler() { # need_compiler COMMAND LANGUAGE PACKAGES
    if ! command -v "$1" >/dev/null 2>&1 ||
        ! echo '#include <stdlib.h>' | "$1" -x "$2" -fsyntax-only - 2>/dev/null; then
        missing="$missing $3"
    fi
}

build_needs() {
    need_command cmake cmake
    need_command ninja ninja-build
    need_command pkg-config pkg-config
    need_compiler gcc c "gcc libc6-dev"
    need_library libcjson libcjson-dev
}

for set in "${@:-build}"; do
    build_needs
    case "$set" in
    build) ;;
    test)
        need_library cmocka libcmocka-dev
        need_compiler g++ c++ g++
        need_command nm binutils
        need_command python3 "python3 python3-venv"
        ;;
    lint)
        need_command clang-format clang-format
        need_command cppcheck cppcheck
        need_command clang clang
        need_compiler g++ c++ g++
        ;;
    bench)
        need_command mpicc libopenmpi-dev
        need_command mpirun openmpi-bin
        ;;
    *)
        echo "setup.sh: '$set' is not one of build, test, lint, bench" >&2
        exit 2
        ;;
    esac
done

[ -n "$missing" ] || exit 0
# shellcheck disable=SC2086  # one word per package
missing=$(printf '%s\n' $missing | sort -u | tr '\n' ' ')

if ! command -v apt-get >/dev/null 2>&1; then
    echo "setup.sh: missing: $missing(Debian's names). There is no apt-get here; install them by hand." >&2
    exit 1
fi
as_root=""
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null 2>&1; then
        echo "setup.sh: missing: $missing. Installing needs root or sudo; run as root: apt-get install $missing" >&2
        exit 1
    fi
    as_root="sudo"
fi
echo "setup.sh: installing $missing"
$as_root apt-get update -q
# shellcheck disable=SC2086
$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $missing
