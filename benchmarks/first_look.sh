#!/usr/bin/env bash
# The runs behind benchmarks/results/first-look: image against patch, one seed each. Stopped, it goes on.
# usage: benchmarks/first_look.sh DATA_ROOT [OUTPUT]
set -euo pipefail
cd "$(dirname "$0")/.."
small=(bbmoe attack --config benchmarks/small.yaml --data-root "$1" --output "${2:-runs}")

"${small[@]}" --dataset cifar10 --trigger square --poison-rate 1% --applicator image
"${small[@]}" --dataset cifar10 --trigger square --poison-rate 1% --applicator patch --set trigger.size=1
"${small[@]}" --dataset cifar10 --trigger warp --poison-rate 10% --applicator image
"${small[@]}" --dataset cifar10 --trigger warp --poison-rate 10% --applicator patch
"${small[@]}" --dataset gtsrb --trigger warp --poison-rate 10% --applicator image
"${small[@]}" --dataset gtsrb --trigger warp --poison-rate 10% --applicator patch
