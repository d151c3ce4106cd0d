#!/bin/bash
# SPDX-License-Identifier: MIT
# Format, a second compiler's warnings, static analysis and house rules.
set -u
cd "$(dirname "$0")/.." || exit 1
jobs=${JOBS:-$(nproc)}
failed=""

step() { # step NAME COMMAND...
    local name=$1 start=$SECONDS
    shift
    if "$@"; then
        echo "lint: $name ok ($((SECONDS - start)) s)"
    else
        failed="$failed $name"
        echo "lint: $name FAILED"
    fi
}

sources() { # sources REGEX: tracked and new files, not ignored ones
    git ls-files --cached --others --exclude-standard 2>/dev/null | grep -E "$1" ||
        find src include apps examples test bench -type f 2>/dev/null | grep -E "$1"
}

format() {
    sources '\.(c|h|cu|cuh)$' | xargs -P "$jobs" -n 40 clang-format --dry-run -Werror
}

# Sources of a processor's instruction set need its flags, those of a device its runtime's headers;
# the build compiles both.
clang_warnings() {
    sources '^(src|apps|examples|test)/.*\.c$' | grep -vE '_avx(2|512)\.c$|^src/(device/cuda|transport/cuda_ipc)/' |
        xargs -P "$jobs" -n 8 clang -std=c11 -D_GNU_SOURCE -Iinclude -Isrc -Itest -Iapps \
            -DEP_TEST_DATA='""' -DEP_SOURCE_DIR='""' -DEP_COMMAND='""' -DEP_BINARY_DIR='""' -DEP_FAKE_GPU='""' \
            -Wall -Wextra -Wshadow -Wvla -Wstrict-prototypes -Wmissing-prototypes \
            -Wimplicit-fallthrough -Wunreachable-code-break -Werror -fsyntax-only
}

cppcheck_quick() {
    cppcheck -j "$jobs" --quiet --std=c11 --error-exitcode=1 --inline-suppr \
        --enable=warning,portability --suppress=missingIncludeSystem --suppress=invalidPointerCast \
        --suppress=normalCheckLevelMaxBranches --max-configs=2 \
        -D_GNU_SOURCE -D__x86_64__ -Iinclude -Isrc src apps
}

step format format
step clang clang_warnings
step cppcheck cppcheck_quick
step headers tools/check_headers.sh
step includes tools/check_includes.sh
step includes-self-test tools/check_includes.sh --self-test
step style tools/check_style.sh
[ -z "$failed" ] || { echo "lint failed:$failed"; exit 1; }
echo "lint passed in $SECONDS s"
