#!/bin/bash
# SPDX-License-Identifier: MIT
# Checks that every public header stands alone, in C99 and in C++11, without a warning.
set -u
cd "$(dirname "$0")/.." || exit 1
bad=0
for header in include/entrepot/*.h; do
    for form in "gcc -x c -std=c99" "g++ -x c++ -std=c++11"; do
        $form -Iinclude -Wall -Wextra -Wpedantic -Werror -fsyntax-only - <<<"#include \"${header#include/}\"" ||
            { echo "$header does not stand alone: $form"; bad=1; }
    done
done
exit $bad
