#!/bin/bash
# SPDX-License-Identifier: MIT
# House rules that clang-format does not know: licence line, file length, no
# tabs, no marks of unfinished work, no paths of somebody's machine.
# usage: tools/check_style.sh [ROOT]
set -u
cd "${1:-$(dirname "$0")/..}" || exit 1
bad=0

# Spelt in pieces so that this file passes its own check.
marks='TO''DO|FIX''ME|XX''X|HA''CK'
paths='/(work|root|home|Users)/[A-Za-z0-9_.]'

all=$(git ls-files 2>/dev/null || find . -type f -not -path './build/*' | sed 's|^\./||')
code=() text=() indented=()
while IFS= read -r file; do
    [ -f "$file" ] || continue
    case "$file" in
    *.c | *.h | *.cu | *.cuh | *.sh | *.cmake | *.py | CMakeLists.txt | Makefile) code+=("$file") ;;
    *.md | *.in | *.[1-9] | *.json | .ci/*) ;;
    *) continue ;;
    esac
    text+=("$file")
    [ "$file" = Makefile ] || indented+=("$file")
done <<<"$all"

report() { # report WHAT LINES: fails where there are any
    [ -z "$2" ] || { echo "$1:"; echo "$2" | head -20; bad=1; }
}

report "the first or second line must be SPDX-License-Identifier: MIT" \
    "$(awk 'FNR == 1 { ok = 0 }
            FNR <= 2 && /SPDX-License-Identifier: MIT/ { ok = 1 }
            FNR == 2 && !ok { print FILENAME }' "${code[@]}")"
report "more than 700 lines" "$(awk 'FNR == 701 { print FILENAME }' "${code[@]}")"
report "tabs" "$(grep -nHP '\t' "${indented[@]}")"
report "blanks at the end of a line" "$(grep -nHP '[ \t]+$' "${text[@]}")"
report "a mark of unfinished work" "$(grep -nHwE "$marks" "${text[@]}")"
report "a path of one machine" "$(grep -nHE "(^|[^A-Za-z0-9_.}/])$paths" "${text[@]}")"
exit $bad
