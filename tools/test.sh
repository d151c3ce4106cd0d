#!/bin/bash
# SPDX-License-Identifier: MIT
# Builds and runs the tests under the named presets (default, asan, tsan).
# The sanitizer builds leave out tests that say "ctest-label: plain" (or noasan,
# notsan); TSan also those in which nothing runs at the same time: the parsers,
# codecs and planning.
# The last line is ctest's own form, over all presets.
set -u
cd "$(dirname "$0")/.." || exit 1
jobs=${JOBS:-$(nproc)}
total=0 failed=0 broken=""

run_preset() { # run_preset PRESET CTEST-ARGUMENT...
    local preset=$1 log=build/$1/ctest.log
    shift
    echo "== $preset build"
    if ! cmake --preset "$preset" >"build/$preset.configure.log" 2>&1; then
        cat "build/$preset.configure.log"
        return 1
    fi
    cmake --build --preset "$preset" -j "$jobs" -- --quiet || return 1
    echo "== $preset tests"
    ctest --preset "$preset" -j "$jobs" --no-tests=error "$@" 2>&1 | tee "$log"
    local counts
    counts=$(sed -nE 's/^[0-9]+% tests passed, ([0-9]+) tests failed out of ([0-9]+)$/\1 \2/p' "$log")
    [ -n "$counts" ] || return 1
    failed=$((failed + ${counts% *}))
    total=$((total + ${counts#* }))
}

mkdir -p build
for preset in "$@"; do
    case "$preset" in
    default) arguments=() ;;
    asan) arguments=(-LE "plain|noasan") ;;
    tsan)
        arguments=(-LE "plain|notsan|fuzz|golden|cli"
            -E "^(check|codec|eplb|json|logfmt|options|placement|rows|scalar|schedule|trace)_")
        ;;
    *)
        echo "test.sh: '$preset' is not one of default, asan, tsan" >&2
        exit 2
        ;;
    esac
    run_preset "$preset" "${arguments[@]}" || broken="$broken $preset"
done

echo
[ -z "$broken" ] || echo "did not build or run:$broken"
[ -e build/python/ready ] || echo "left out: the Python tests, whose packages could not be installed"
if [ "$total" -eq 0 ]; then
    echo "no tests were run"
    exit 1
fi
percent=$((100 * (total - failed) / total))
echo "$percent% tests passed, $failed tests failed out of $total"
[ "$failed" -eq 0 ] && [ -z "$broken" ]
