"""Parallel against sequential runs of a suite: `bbmoe bench run --workers N`.

    python benchmarks/speed/workers.py [--workers 2] [--rounds 3] [--train-images N] [--epochs N] [--json FILE]

A suite of four trainings of the small pmoe on signs is run both ways, in turn. The time includes starting the
processes, generating the images and evaluating. A sequential run uses all cores, a parallel one its share.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import SMALL_PMOE, at_least_one, bbmoe_command, environment_of, finish, make_parser, run_child
from rich.table import Table

RUNS = 4  # Three attacks and their clean twin, a multiple of common numbers of workers.


def main() -> None:
    """Measure and print."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--workers", type=int, choices=range(2, RUNS + 1), default=2, help="number of parallel runs [2]"
    )
    parser.add_argument("--rounds", type=at_least_one, default=3, help="number of rounds [3]")
    parser.add_argument("--train-images", type=at_least_one, default=4000, metavar="N", help="[4000]")
    parser.add_argument("--epochs", type=at_least_one, default=5, help="[5]")
    arguments = parser.parse_args()
    result = measure(arguments.workers, arguments.rounds, arguments.train_images, arguments.epochs)
    finish(result, make_table(result), notes(result), arguments.json)


def measure(workers: int, rounds: int, images: int, epochs: int) -> dict[str, Any]:
    """Time both ways in turn."""
    seconds: dict[str, list[float]] = {"1": [], str(workers): []}
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "suite.yaml"
        suite.write_text(json.dumps(make_suite(images, epochs)))
        for number in range(rounds):
            for way in seconds:
                output = Path(folder) / f"{number}-{way}"
                seconds[way].append(time_suite(suite, way, output))
    ratios = [one / many for one, many in zip(*seconds.values(), strict=True)]
    return {
        "benchmark": "workers",
        "runs": RUNS,
        "workers": workers,
        "train_images": images,
        "epochs": epochs,
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
        "seconds_rounds": seconds,
        "speedup": statistics.median(ratios),
        "speedup_rounds": ratios,
        "environment": environment_of("cpu"),
    }


def make_suite(images: int, epochs: int) -> dict[str, Any]:
    """Return a suite of three attacks that share a clean twin."""
    return {
        "title": "Workers",
        "version": 1,
        "base": {
            "recipe": "paper",
            "dataset": {"name": "signs", "train_images": images, "test_images": 500},
            "model": {"name": "pmoe", **SMALL_PMOE},
            "train": {"epochs": epochs},
            "device": "cpu",
        },
        "grid": {"trigger": "square", "applicator": "image", "poison.rate": [0.05, 0.1, 0.2]},
        "tables": [{"title": "signs", "rows": ["poison.rate"], "columns": "trigger.name"}],
    }


def time_suite(suite: Path, workers: str, output: Path) -> float:
    """Return the wall seconds of the command. Exits if it fails."""
    command = [*bbmoe_command(), "bench", "run", str(suite), "--workers", workers, "--output", str(output)]
    child = run_child(command, quiet=True)
    if child.returncode != 0 or len(list(output.glob("*/record.json"))) != RUNS:
        sys.exit(f"bbmoe bench run ended with exit code {child.returncode}")
    return child.seconds


def make_table(result: dict[str, Any]) -> Table:
    """Build a table of the seconds of both ways."""
    title = f"{result['runs']} runs of {result['epochs']} epochs of {result['train_images']} images"
    table = Table("workers", title=title, title_justify="left")
    for column in ("seconds", "runs an hour"):
        table.add_column(column, justify="right")
    for way, seconds in result["seconds"].items():
        table.add_row(way, f"{seconds:.1f}", f"{3600 * result['runs'] / seconds:.0f}")
    return table


def notes(result: dict[str, Any]) -> list[str]:
    """Return a line about the ratio and its range."""
    low, high = min(result["speedup_rounds"]), max(result["speedup_rounds"])
    return [
        f"{result['workers']} workers: {result['speedup']:.2f}x ({low:.2f} – {high:.2f}) one after the other"
    ]


if __name__ == "__main__":
    main()
