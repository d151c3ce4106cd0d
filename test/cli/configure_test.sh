#!/bin/bash
# SPDX-License-Identifier: MIT
# Values of EP_CUDA and EP_MPI that can't be followed end the configuration, also where there is no
# nvcc; what AUTO leaves out is said.
# usage: configure_test.sh SOURCE
set -eu
source_dir=$1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

configure() { # configure OPTION...: without nvcc
    rm -rf "$work/build"
    cmake -S "$source_dir" -B "$work/build" -G Ninja -DEP_BUILD_TESTS=OFF -DEP_BUILD_APPS=OFF \
        -DEP_NVCC= "$@" >"$work/log" 2>&1 || return 1
}
expect() { # expect CODE WORDS OPTION...
    local wanted=$1 words=$2 code=0
    shift 2
    configure "$@" || code=1
    if [ $code != "$wanted" ] || ! tr -s '\n ' ' ' <"$work/log" | grep -qF -- "$words"; then
        echo "configure_test: with $*: code $code, without the words '$words':"
        cat "$work/log"
        exit 1
    fi
}

expect 1 "EP_CUDA is 'YES'; it can be AUTO, ON or OFF" -DEP_CUDA=YES
expect 1 "EP_CUDA is 'off'; it can be AUTO, ON or OFF" -DEP_CUDA=off
expect 1 "EP_CUDA is ''; it can be AUTO, ON or OFF" -DEP_CUDA=
expect 1 "EP_CUDA is ON and nvcc was not found" -DEP_CUDA=ON
expect 1 "EP_CUDA is ON and EP_SANITIZE is 'address'; with sanitizers it can be AUTO or OFF" \
    -DEP_CUDA=ON -DEP_SANITIZE=address
expect 1 "EP_MPI is 'YES'; it can be AUTO, ON or OFF" -DEP_MPI=YES
expect 1 "EP_MPI is ON and EP_SANITIZE is 'thread'" -DEP_MPI=ON -DEP_SANITIZE=thread
expect 0 "CUDA module: left out, EP_SANITIZE is 'thread'" -DEP_SANITIZE=thread
expect 0 "CUDA module: left out, nvcc was not found" -DEP_CUDA=AUTO
expect 0 "" -DEP_CUDA=OFF
echo "configure_test: ok"
