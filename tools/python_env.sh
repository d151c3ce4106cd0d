#!/bin/sh
# SPDX-License-Identifier: MIT
# Makes the Python environments of the tests under build/, once.
# usage: tools/python_env.sh [torch]     build/python, or build/python-torch with torch
set -eu
cd "$(dirname "$0")/.."
case "${1:-}" in
"") home=build/python packages="numpy ml_dtypes pytest scikit-build-core" ;;
torch) home=build/python-torch packages="numpy ml_dtypes pytest torch" ;;
*)
    echo "python_env.sh: '$1' is not torch" >&2
    exit 2
    ;;
esac
[ ! -e "$home/ready" ] || exit 0
echo "python_env.sh: installing $packages in $home"
rm -rf "$home"
"${PYTHON:-python3}" -m venv "$home"
# shellcheck disable=SC2086  # one word per package
if ! "$home/bin/python" -m pip install --quiet --disable-pip-version-check $packages; then
    rm -rf "$home"
    echo "python_env.sh: could not install $packages (no network?): see pip's words above" >&2
    [ -z "${1:-}" ] || exit 1
    # The tests of the C library need none of it; tools/test.sh says at its end what was left out.
    exit 0
fi
touch "$home/ready"
