"""Time, BA and ASR of the command that `make demo` runs, for several seeds, with and without bf16.

    python benchmarks/speed/demo.py [--seeds 5] [--first-seed 0] [--precision avx2] [--former 1]

Every run is a separate process and includes the complete command: start-up, generating the images, training the victim
and its clean twin, and evaluating both. `avx2` is fp32 with the kernels of a CPU without AVX-512. `--former N` also
runs the `quick` recipe as it was until November 2026 (`FORMER`) on the first N seeds, alternating with the current one;
their ratio is less affected by a busy machine than the seconds are.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import AVX2_ONLY, at_least_one, bbmoe_command, environment_of, finish, make_parser, met, run_child
from rich.table import Table

from backdoorbench_moe.wording.counting import count

COMMAND = ["attack", "--model", "pmoe", "--trigger", "warp", "--applicator", "patch"]
# Goals for the command, in seconds on two cores, and for BA and ASR of every seed, in percent.
GOAL_SECONDS = {"bf16": 45.0, "avx2": 90.0}
GOAL_PERCENT = 95.0
FORMER = [
    *("model.widen_factor=2", "model.moe_channels=128", "model.expert_channels=32", "model.bn_momentum=0.1"),
    *(
        "train.epochs=5",
        "train.batch_size=64",
        "train.optimizer=adamw",
        "train.lr=0.003",
        "train.warmup=0.25",
    ),
    *("train.weight_decay=0.0005", "train.schedule=one-cycle"),
]


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument("--seeds", type=at_least_one, default=5, metavar="N", help="number of seeds [5]")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="first seed [0]")
    parser.add_argument("--precision", action="append", choices=list(GOAL_SECONDS), help="[both]")
    parser.add_argument(
        "--former",
        type=int,
        default=0,
        metavar="N",
        help="number of seeds to also run with the former recipe [0]",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="option for `bbmoe attack`"
    )
    arguments = parser.parse_args()
    precisions = arguments.precision or list(GOAL_SECONDS)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    result = measure(seeds, precisions, arguments.former, arguments.set)
    finish(result, make_table(result), notes(result), arguments.json)


def measure(seeds: range, precisions: list[str], former: int, settings: list[str]) -> dict[str, Any]:
    """Run every seed in every precision, the former recipe directly after the current one."""
    runs = []
    for precision, seed in itertools.product(precisions, seeds):
        recipes = {"quick": settings, "former": [*FORMER, *settings]}
        for recipe in recipes if seed in seeds[:former] else ["quick"]:
            run = {"recipe": recipe, **run_once(precision, seed, recipes[recipe])}
            # Show progress, as runs take minutes.
            line = f"{precision}, {recipe}, seed {seed}: {run['seconds']:.1f} s, {run['cpu_seconds']:.1f} CPU s, "
            print(line + f"BA {run['ba']:.2f}, ASR {run['asr']:.2f}", file=sys.stderr, flush=True)
            runs.append(run)
    return {
        "benchmark": "demo",
        "command": " ".join(["bbmoe", *COMMAND]),
        "settings": settings,
        "former_settings": FORMER,
        "goal_seconds": GOAL_SECONDS,
        "goal_percent": GOAL_PERCENT,
        "runs": runs,
        "summary": {precision: summary(runs, precision) for precision in precisions},
        "environment": environment_of("cpu"),
    }


def run_once(precision: str, seed: int, settings: list[str]) -> dict[str, Any]:
    """Run the command in a separate process. Exits if it fails."""
    with tempfile.TemporaryDirectory() as output:
        command = [*bbmoe_command(), *COMMAND, "--seed", str(seed), "--device", "cpu", "--output", output]
        command += ["--precision", "bf16" if precision == "bf16" else "fp32"]
        command += [part for setting in settings for part in ("--set", setting)]
        child = run_child(command, quiet=True, variables=AVX2_ONLY if precision == "avx2" else {})
        if child.returncode != 0:
            sys.exit(f"bbmoe attack ended with exit code {child.returncode}")
        records = [json.loads(path.read_text()) for path in sorted(Path(output).glob("*/record.json"))]
    [victim] = (record for record in records if record["poison"])
    [twin] = (record for record in records if not record["poison"])
    return {
        "precision": precision,
        "seed": seed,
        "seconds": child.seconds,
        "cpu_seconds": child.cpu_seconds,
        "ba": victim["metrics"]["ba"]["value"],
        "asr": victim["metrics"]["asr"]["value"],
        "twin_ba": twin["metrics"]["ba"]["value"],
        "model": victim["spec"]["model"],
        "train": victim["spec"]["train"],
    }


def summary(runs: list[dict[str, Any]], precision: str) -> dict[str, Any]:
    """Return medians and lowest values of the current recipe, and its cost relative to the former on the same seeds."""
    here = [run for run in runs if run["precision"] == precision]
    present = [run for run in here if run["recipe"] == "quick"]
    former = {run["seed"]: run for run in here if run["recipe"] == "former"}
    pairs = [(run, former[run["seed"]]) for run in present if run["seed"] in former]
    seconds = statistics.median(run["seconds"] for run in present)
    lowest = {key: min(run[key] for run in present) for key in ("ba", "asr")}
    ratios = {
        f"{key}_ratio": statistics.median(new[key] / old[key] for new, old in pairs) if pairs else None
        for key in ("seconds", "cpu_seconds")
    }
    return {
        "seconds": seconds,
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in present),
        "seeds": len(present),
        "pairs": len(pairs),
        "lowest": lowest,
        **ratios,
        "goal_seconds_met": seconds <= GOAL_SECONDS[precision],
        "goal_percent_met": min(lowest.values()) >= GOAL_PERCENT,
    }


def make_table(result: dict[str, Any]) -> Table:
    """Build a table with one row per run."""
    table = Table("precision", "recipe", title=result["command"], title_justify="left")
    for column in ("seed", "seconds", "CPU s", "BA %", "ASR %", "BA of the twin %"):
        table.add_column(column, justify="right")
    for run in result["runs"]:
        numbers = [f"{run[key]:.1f}" for key in ("seconds", "cpu_seconds")]
        numbers += [f"{run[key]:.2f}" for key in ("ba", "asr", "twin_ba")]
        table.add_row(run["precision"], run["recipe"], str(run["seed"]), *numbers)
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """Return lines about the goals and the cost relative to the former recipe."""
    lines = []
    for precision, row in result["summary"].items():
        lines.append(
            f"{precision}: {count(row['seeds'], 'seed')}, each measured once; "
            f"median {row['seconds']:.0f} s, goal {GOAL_SECONDS[precision]:g} s "
            f"{met(row['goal_seconds_met'])}; lowest BA {row['lowest']['ba']:.2f}, lowest ASR "
            f"{row['lowest']['asr']:.2f}, goal {GOAL_PERCENT:g} {met(row['goal_percent_met'])}"
        )
        if row["seconds_ratio"] is not None:
            lines.append(
                f"{precision}: {row['seconds_ratio']:.2f} of the former recipe's seconds, "
                f"{row['cpu_seconds_ratio']:.2f} of its CPU seconds (median of {count(row['pairs'], 'pair')})"
            )
    return lines


if __name__ == "__main__":
    main()
