#!/usr/bin/env bash
# Build wheels of the package and its plug-ins from the last commit, install them with their dependencies into an
# empty environment, and use them from another folder, for each Python:
#   tests/wheel.sh python3.11 python3.12 python3.13 python3.14
# Each takes several minutes and gigabytes, as it installs torch. tests/test_wheel.py is the same without network.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
mkdir "$place/source"
git -C "$root" archive HEAD | tar -x -C "$place/source"
# Neither the folder of the sources nor a user's packages may help.
unset PYTHONPATH
export PYTHONNOUSERSITE=1

for python in "${@:-python3}"; do
    cd "$place"  # Out of the folder that is deleted now.
    rm -rf "$place/environment" "$place/wheels" "$place/elsewhere"
    "$python" -m venv "$place/environment"
    bin=$place/environment/bin
    "$bin/python" -m pip wheel -q --no-deps --wheel-dir "$place/wheels" "$place/source" "$place"/source/plugins/*/
    "$bin/python" -m pip install -q "$place"/wheels/*.whl
    mkdir "$place/elsewhere"
    cd "$place/elsewhere"
    tiny=(--epochs 1 --no-twin --quiet --set dataset.train_images=200 --set dataset.test_images=100)
    "$bin/bbmoe" attack --trigger sinusoid --applicator random-tiles "${tiny[@]}"
    "$bin/bbmoe" attack --model vmoe "${tiny[@]}"
    "$bin/bbmoe" info model llama > /dev/null
    "$bin/bbmoe" analyze runs/*sinusoid* --quiet > /dev/null
    "$bin/bbmoe" bench suites > /dev/null
    echo "$("$bin/python" --version): $(ls "$place/wheels" | tr '\n' ' ')"
done
