#!/bin/bash
# SPDX-License-Identifier: MIT
# Checks the shared library's exports: names beginning with ep_ only, and every
# function that a public header declares.
# usage: tools/check_symbols.sh LIBRARY
set -u
[ $# -eq 1 ] || { echo "usage: check_symbols.sh LIBRARY" >&2; exit 2; }
headers=$(cd "$(dirname "$0")/../include/entrepot" && pwd)
exported=$(nm -D --defined-only "$1" | awk '{print $NF}' | sed 's/@.*//' | sort -u)
[ -n "$exported" ] || { echo "check_symbols: $1 exports nothing"; exit 1; }

stray=$(grep -vE '^ep_' <<<"$exported")
[ -z "$stray" ] || echo "exported without the ep_ prefix:" $stray

# A declaration is EP_API up to the next "(": its last word is the name.
declared=$(grep -hv '^#' "$headers"/*.h | tr '\n' ' ' | grep -oE 'EP_API [^(;]*\(' |
    sed -E 's/.*[ *]([a-z_0-9]+)\($/\1/' | sort -u)
absent=$(comm -13 <(echo "$exported") <(echo "$declared"))
[ -z "$absent" ] || echo "declared but not exported:" $absent
[ -z "$stray$absent" ]
