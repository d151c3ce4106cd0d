#!/bin/bash
# SPDX-License-Identifier: MIT
# Installs the build and uses it as others would: pkg-config, find_package, static and shared, the
# command and its manual from their new place.
# usage: install_test.sh SOURCE BUILD
set -eu
source_dir=$1 build=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
prefix=$work/prefix
cmake --install "$build" --prefix "$prefix" >"$work/log" || { cat "$work/log"; exit 1; }

fail() {
    echo "install_test: $*"
    exit 1
}

libdir=$(dirname "$(find "$prefix" -name entrepot.pc)")/..
export PKG_CONFIG_PATH=$libdir/pkgconfig
[ "$(pkg-config --variable=prefix entrepot)" = "$prefix" ] || fail "entrepot.pc has another prefix"

# The command finds its library without help, also when everything moves together.
mv "$prefix" "$work/moved"
env -u LD_LIBRARY_PATH "$work/moved/bin/entrepot" info >/dev/null || fail "the moved command"
mv "$work/moved" "$prefix"

expect_two_ranks() { # expect_two_ranks PROGRAM
    LD_LIBRARY_PATH=$libdir "$prefix/bin/entrepot" run -n 2 -- "$1" >"$work/out"
    [ "$(grep -c 'are 10 and 40' "$work/out")" = 2 ] || fail "$1 printed: $(cat "$work/out")"
}

# shellcheck disable=SC2046
cc -std=c99 -o "$work/by_pkg_config" "$source_dir/examples/minimal.c" \
    $(pkg-config --cflags --libs entrepot)
expect_two_ranks "$work/by_pkg_config"

mkdir "$work/project"
cat >"$work/project/CMakeLists.txt" <<END
cmake_minimum_required(VERSION 3.25)
project(user LANGUAGES C)
find_package(entrepot 0.1 REQUIRED)
foreach(kind entrepot entrepot_static)
  add_executable(with_\${kind} "$source_dir/examples/minimal.c")
  target_link_libraries(with_\${kind} PRIVATE entrepot::\${kind})
endforeach()
END
cmake -S "$work/project" -B "$work/build" -G Ninja -DCMAKE_PREFIX_PATH="$prefix" >"$work/log" &&
    cmake --build "$work/build" >>"$work/log" || { cat "$work/log"; exit 1; }
expect_two_ranks "$work/build/with_entrepot"
expect_two_ranks "$work/build/with_entrepot_static"

for page in man1/entrepot.1 man3/entrepot.3; do
    file=$(find "$prefix" -path "*/$page")
    [ -n "$file" ] || fail "no $page"
    ! command -v groff >/dev/null || [ -z "$(groff -man -Tutf8 -ww -z "$file" 2>&1)" ] ||
        fail "$page is malformed"
done
echo "install_test: ok"
