#!/bin/bash
# SPDX-License-Identifier: MIT
# House rules that clang-format does not know: licence line, file length, no
# tabs, no marks of unfinished work, no paths of somebody's machine.
# usage: tools/check_style.sh [ROOT]
set -u
root=${1:-$(dirname "$0")/..}
cd "$root" || exit 1
bad=0

report() {
    echo "$1"
    bad=1
}

files=$(git ls-files 2>/dev/null || find . -type f -not -path './build/*' | sed 's|^\./||')
# Spelt in pieces so that this file passes its own check.
marks='TO''DO|FIX''ME|XX''X|HA''CK'
paths='/(work|root|home|Users)/[A-Za-z0-9_.]'

while IFS= read -r file; do
    [ -f "$file" ] || continue
    case "$file" in
    *.c | *.h | *.cu | *.cuh | *.sh | *.cmake | *.py | CMakeLists.txt | Makefile)
        head -n 2 "$file" | grep -q 'SPDX-License-Identifier: MIT' ||
            report "$file: the first or second line must be SPDX-License-Identifier: MIT"
        lines=$(wc -l <"$file")
        [ "$lines" -le 700 ] || report "$file: $lines lines, at most 700 are allowed"
        ;;
    *.md | *.in | *.[1-9] | *.json | .ci/*) ;;
    *) continue ;;
    esac
    [ "$file" = Makefile ] || ! grep -nHP '\t' "$file" | head -3 | grep . ||
        report "$file: tabs"
    grep -nHP '[ \t]+$' "$file" | head -3 | grep . && report "$file: blanks at the end of a line"
    grep -nHwE "$marks" "$file" && report "$file: a mark of unfinished work"
    grep -nHE "(^|[^A-Za-z0-9_.}/])$paths" "$file" && report "$file: a path of one machine"
done <<<"$files"
exit $bad
