"""Overhead of the runs of a suite over their training time, from their records.

    python benchmarks/speed/overhead.py benchmarks/results/badpatches-table1/small [FOLDER ...] [--json FILE]

A run's time includes preparing the images, optimising the trigger (if any), stamping, evaluating clean and triggered
test images, and writing the run folder. It does not include start-up, as a worker of a suite starts once for all of its
runs. Defended runs, and continued runs, whose time is recorded in parts, are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import environment_of, finish, make_parser
from rich.table import Table


def main() -> None:
    """Read and print."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "folders", type=records_file, nargs="+", metavar="FOLDER", help="results folder with records.jsonl"
    )
    files = parser.parse_args()
    result = {
        "benchmark": "overhead",
        "suites": {"/".join(file.parts[-3:-1]): measure(file) for file in files.folders},
        "environment": environment_of(),
    }
    finish(result, make_table(result), [], files.json)


def records_file(text: str) -> Path:
    """Return the records file of a results folder, for argparse."""
    if not (file := Path(text) / "records.jsonl").is_file():
        raise argparse.ArgumentTypeError(f"expected a folder with records.jsonl, got {text}")
    return file.resolve()


def measure(file: Path) -> dict[str, Any]:
    """Return the total seconds of the runs in a file, those of their training, and their ratio."""
    times = list(timings(file))
    training, total = (sum(each[f"{key}_seconds"] for each in times) for key in ("train", "total"))
    return {
        "runs": len(times),
        "training": training,
        "total": total,
        "ratio": total / training if training else None,
    }


def timings(file: Path) -> Iterator[dict[str, float]]:
    """Yield the times of each run that was trained without interruption."""
    with file.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            timing = record["timing"]
            whole = timing.get("train_seconds", 0) and timing["train_seconds"] <= timing["total_seconds"]
            if whole and not record["spec"].get("defenses"):
                yield timing


def make_table(result: dict[str, Any]) -> Table:
    """Build a table with one row per suite."""
    table = Table("suite", title="The time of runs over that of their training", title_justify="left")
    for column in ("runs", "training, h", "in all, h", "ratio"):
        table.add_column(column, justify="right")
    for name, found in result["suites"].items():
        hours = (f"{found[key] / 3600:.2f}" for key in ("training", "total"))
        ratio = "–" if found["ratio"] is None else f"{found['ratio']:.3f}"
        table.add_row(name, str(found["runs"]), *hours, ratio)
    return table


if __name__ == "__main__":
    main()
