"""How much longer the runs of a suite take than their training, from their records.

    python benchmarks/speed/overhead.py benchmarks/results/badpatches-table1/small [FOLDER ...] [--json FILE]

A run's time includes preparing the images, stamping, the evaluation of clean and triggered test images, and writing the
run folder; what an optimised trigger needs to be made is counted as well. Start-up is not: a worker of a suite starts
once for all of its runs. Defended runs and runs that were continued, whose times are in parts, are left out.
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
    parser.add_argument("folders", type=records_file, nargs="+", metavar="FOLDER", help="with records.jsonl")
    files = parser.parse_args()
    result = {
        "benchmark": "overhead",
        "suites": {"/".join(file.parts[-3:-1]): measure(file) for file in files.folders},
        "environment": environment_of(),
    }
    finish(result, make_table(result), [], files.json)


def records_file(text: str) -> Path:
    """Read a folder of results, for argparse."""
    if not (file := Path(text) / "records.jsonl").is_file():
        raise argparse.ArgumentTypeError(f"expected a folder with records.jsonl, got {text}")
    return file.resolve()


def measure(file: Path) -> dict[str, Any]:
    """Add up the seconds of the runs of a file, those of their training, and the ratio of the two."""
    times = list(timings(file))
    training, total = (sum(each[f"{key}_seconds"] for each in times) for key in ("train", "total"))
    return {
        "runs": len(times),
        "training": training,
        "total": total,
        "ratio": total / training if training else None,
    }


def timings(file: Path) -> Iterator[dict[str, float]]:
    """The times of each run that was trained in one go."""
    with file.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            timing = record["timing"]
            whole = timing.get("train_seconds", 0) and timing["train_seconds"] <= timing["total_seconds"]
            if whole and not record["spec"].get("defenses"):
                yield timing


def make_table(result: dict[str, Any]) -> Table:
    """One row for each suite."""
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
